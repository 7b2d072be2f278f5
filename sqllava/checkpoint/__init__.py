"""Checkpoints: every layout, ours and the published, read, written and turned into one another."""

# Largest size of a weight file that is written, unless another is asked for.
SHARD_BYTES = 2 * 10**9
