"""Where a model goes and in which numbers: devices and dtypes, before anything is loaded.

First step of `load`, and of every command that has --device or --dtype.
"""

import torch

from sqllava.checkpoint import dtype_name


def choose_device(device: str | torch.device | None) -> torch.device:
    """A device by its name; a GPU if there is one, where none is named.

    Raises:
        ValueError: there is no such device on this machine.
    """
    if device is None or device == "":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        if chosen.type == "meta":
            raise ValueError(f"device {device!r} holds no values: choose cpu, cuda, cuda:1 ...")
        torch.zeros(1, device=chosen).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"there is no device {str(device)!r} here: choose {_there()}") from error
    return chosen


def _there() -> str:
    gpus = torch.cuda.device_count()
    return ", ".join(["cpu", *(f"cuda:{number}" for number in range(gpus))])


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A dtype by its name; "auto" is bfloat16 on a GPU that has it, and float32 elsewhere.

    Raises:
        ValueError: a model cannot be held in it.
    """
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise ValueError(f"a model cannot be held in {dtype}: choose a floating-point dtype")
        return dtype
    name = dtype_name(dtype)
    if name != "auto":
        return getattr(torch, name)
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if on_gpu else torch.float32
