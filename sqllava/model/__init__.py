"""What a model is: configuration, tower to projector to language model, processor, adapters.

transformers comes first: its import registers the model, which imports the modules beside this one.
"""

import transformers  # noqa: F401
