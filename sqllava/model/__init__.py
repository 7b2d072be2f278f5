"""The model: tower, projector and language model, with the processor that feeds them."""
