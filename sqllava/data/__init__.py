"""The data path: records -> index -> samples -> batches, and the order they come in."""
