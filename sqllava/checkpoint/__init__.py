"""Checkpoints: every layout, ours and the published, read, written and turned into one another."""
