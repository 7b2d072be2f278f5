"""The model in lmms-eval: `lmms-eval --model sqllava --model_args pretrained=DIR --tasks ...`.

lmms-eval brings its own prompts, decoding and scores; this hands its requests to our engine.
"""

DEFAULT_TOKENS = 128
