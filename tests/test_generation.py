"""Generation through transformers' own `generate`: each of its ways works with images, or is
refused in a sentence."""

import copy

import pytest
import torch
from golden_numbers import GOLDEN, image
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TextIteratorStreamer,
    WatermarkingConfig,
)

from sqllava.checkpoint.load import load

PROMPT = "USER: <image>\nWhat is shown? ASSISTANT:"
NEW = 10


@pytest.fixture(scope="module")
def loaded():
    return load(GOLDEN / "sqllava-lora", dtype=torch.float32, device="cpu")


@pytest.fixture
def inputs(loaded):
    return loaded[1](text=PROMPT, images=image("0.png"))


@pytest.fixture(scope="module")
def greedy(loaded):
    """Generates greedily, NEW tokens; returns the new ids [B, NEW]."""
    model, processor = loaded

    def generate(**options):
        given = options or processor(text=PROMPT, images=image("0.png"))
        plain = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        return model.generate(**plain | dict(given))[:, -NEW:]

    return generate


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 16},
        {"output_scores": True, "output_logits": True},
    ],
    ids=str,
)
def test_other_ways_to_the_same_text_give_the_same_text(options, greedy, inputs):
    assert torch.equal(greedy(**inputs, **options), greedy())


def test_prompt_lookup_finds_what_was_said_and_no_placeholders(loaded, greedy):
    """The answer's ids stand in the prompt already, before the image and behind it."""
    model, processor = loaded
    said = processor.tokenizer.decode(greedy()[0])
    text = f"USER: {said}<image>\n{said} ASSISTANT:"
    inputs = processor(text=[text], images=image("0.png"))
    for size in (2, 8):
        looked = greedy(**inputs, prompt_lookup_num_tokens=size)
        assert torch.equal(looked, greedy(**inputs))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"encoder_repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 2},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2, "repetition_penalty": 1.2},
        {"guidance_scale": 1.5},
        {"sequence_bias": [[[7], 2.0]]},
        {"watermarking_config": WatermarkingConfig()},
        {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.2)])},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_shapes_a_text_works_beside_an_image_past_the_vocabulary(options, loaded, greedy):
    model, processor = loaded
    assert model.config.image_token_id == model.config.get_text_config().vocab_size
    inputs = processor(text=[PROMPT, PROMPT], images=[image("0.png"), image("1.png")])
    ids = greedy(**inputs, **options)
    assert ids.shape == (2 * options.get("num_return_sequences", 1), NEW)
    assert ids.max() < model.config.get_text_config().vocab_size


def test_the_encoders_penalty_takes_the_prompts_own_ids(loaded, inputs):
    model, _ = loaded
    (penalty,) = model._get_logits_processor(
        generation_config=_with(model, encoder_repetition_penalty=1.5),
        encoder_input_ids=inputs["input_ids"],
    )
    image_id = model.config.image_token_id
    assert set(penalty.encoder_input_ids[0].tolist()) == set(inputs["input_ids"][0].tolist()) - {
        image_id
    }


def _with(model, **options):
    config = copy.deepcopy(model.generation_config)
    config.update(**options)
    return config


def test_a_streamer_gets_the_text(loaded, inputs, greedy):
    model, processor = loaded
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    text = processor.tokenizer.decode(greedy(**inputs, streamer=streamer)[0])
    assert "".join(streamer) == text


# --- Guessing ---


def test_a_copy_of_the_model_guesses_all_it_would_write(loaded, inputs, greedy):
    model, _ = loaded
    assistant, steps = copy.deepcopy(model), []
    hook = model.register_forward_pre_hook(lambda *_: steps.append(1))
    try:
        assisted = greedy(**inputs, assistant_model=assistant)
    finally:
        hook.remove()
    assert torch.equal(assisted, greedy())
    # It sees the image too, so that its guesses are right: several tokens a step.
    assert len(steps) < NEW


def test_who_cannot_read_images_cannot_guess(loaded, inputs, greedy):
    model, _ = loaded
    language_model = LlamaForCausalLM(model.config.text_config)
    with pytest.raises(ValueError, match="must be an SQ-LLaVA model of that width"):
        greedy(**inputs, assistant_model=language_model)
    with pytest.raises(ValueError, match="assistant_early_exit is not possible"):
        greedy(**inputs, assistant_early_exit=1)


# --- Going on from a cache ---


@pytest.mark.parametrize("images", [0, 1])
def test_a_second_turn_goes_on_from_the_first_ones_cache(images, loaded, inputs, greedy):
    model, processor = loaded
    cache = DynamicCache()
    first = model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    text = " Why?" + "<image>" * processor.image_tokens * images + " ASSISTANT:"
    more = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    ids = torch.cat([first, more], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    new = processor.prepare_image(image("1.png"))[None][:images]
    both = torch.cat([inputs["pixel_values"], new])
    expected = greedy(**turn, pixel_values=both)
    given = {"pixel_values": new} if images else {}
    assert torch.equal(greedy(**turn, **given, past_key_values=copy.deepcopy(cache)), expected)
    with pytest.raises(ValueError, match="images of the text that is in it are not given again"):
        greedy(**turn, pixel_values=both, past_key_values=copy.deepcopy(cache))
    if images:
        with pytest.raises(ValueError, match="16 image placeholders, and no images come with it"):
            greedy(**turn, past_key_values=copy.deepcopy(cache))


# --- What a model is given ---


def test_images_that_would_be_passed_over_are_refused(loaded, inputs, greedy):
    model, _ = loaded
    ids = inputs["input_ids"]
    at_image = ids == model.config.image_token_id
    embeds = model.get_input_embeddings()(ids.masked_fill(at_image, 0))
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    for options in (given, given | {"input_ids": ids}):
        with pytest.raises(ValueError, match="inputs_embeds hold their images already"):
            greedy(**options, pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="16 image placeholders, and no images come with it"):
        greedy(input_ids=ids)
    with pytest.raises(ValueError, match="16 image placeholders, and no images come with it"):
        model(input_ids=ids)


def test_embeddings_with_the_images_in_them_give_the_same_text(loaded, inputs, greedy):
    model, _ = loaded
    ids = inputs["input_ids"]
    at_image = ids == model.config.image_token_id
    embeds = model.get_input_embeddings()(ids.masked_fill(at_image, 0))
    features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
    embeds = embeds.masked_scatter(at_image.unsqueeze(-1), features)
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(greedy(**given), greedy())
