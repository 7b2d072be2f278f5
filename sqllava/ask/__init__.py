"""Asking: an image -> its description, questions about it, answers, and records made of them."""

# One in so many of the data engine's records begins with the image's description. One in seven of
# LLaVA-Instruct-150K's is a description, one in three of the miniature world's has one.
DESCRIBE_EVERY = 3
