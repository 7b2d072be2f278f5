"""Checkpoints: every layout, ours and the published, read, written and turned into one another."""

# Largest size of a weight file that is written, unless another is asked for.
SHARD_BYTES = 2 * 10**9

# The dtypes that a model may be held in, and what else they are called.
DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
}


def dtype_name(name: str) -> str:
    """A dtype's full name; ValueError names those that there are."""
    if name not in DTYPES:
        raise ValueError(
            f"no dtype {name!r} to hold a model in: choose auto, float32 (fp32), bfloat16 (bf16) "
            "or float16 (fp16)"
        )
    return DTYPES[name]
