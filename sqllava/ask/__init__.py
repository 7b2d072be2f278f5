"""Asking: an image -> its description, questions about it, answers, and records made of them."""
