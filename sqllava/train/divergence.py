"""Notices when training has diverged: a loss, a gradient norm or a weight is not finite."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from sqllava.train.audit import any_rank


class DivergenceError(RuntimeError):
    """Training has diverged: what comes after this step is worth nothing."""


class FiniteSteps:
    """Watches each optimiser step's losses and gradient norm, over all ranks.

    Args:
        data: the file of the records, for the message.
        gradients: whether a gradient norm that is not finite counts; with a loss scale (--fp16) it
            is part of finding the scale, and DeepSpeed leaves the step out.
    """

    def __init__(self, data: str, gradients: bool = True) -> None:
        self.data, self.gradients = data, gradients
        self.losses: list[torch.Tensor] = []
        self.records: list[int] = []

    def saw(self, loss: torch.Tensor, records: Iterable[int]) -> None:
        """Notes a micro-batch; nothing is waited for."""
        self.losses.append(loss.detach())
        self.records += records

    def end_step(self, step: int, norm: torch.Tensor | float | None) -> None:
        """Judges an optimiser step. Every rank must call it.

        Raises:
            DivergenceError: on all ranks, with the step and the numbers of its records.
        """
        losses, records = [float(loss) for loss in self.losses], self.records
        self.losses, self.records = [], []
        norm = float(norm) if norm is not None and self.gradients else 0.0
        faulty = [str(loss) for loss in losses if not math.isfinite(loss)]
        found = [f"a loss of {faulty[0]}"] if faulty else []
        found += [f"a gradient norm of {norm}"] if not math.isfinite(norm) else []
        if not any_rank(torch.tensor([bool(found)])).any():
            return
        everyone = [(found, records)]
        if dist.is_available() and dist.is_initialized():
            everyone = [([], []) for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, (found, records))
        what = sorted({one for found, _ in everyone for one in found})
        numbers = sorted(number for _, records in everyone for number in records)
        raise DivergenceError(
            f"training has diverged: step {step} has {' and '.join(what)}. Its records in "
            f"{self.data} are {', '.join(map(str, numbers))}. The run ends here, and nothing is "
            "saved after the last checkpoint; a lower --learning_rate may help"
        )


def check_weights(model: nn.Module) -> None:
    """Raises DivergenceError, on all ranks, if a weight that trains is not finite."""
    bad = None
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and bad is None:
            own = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3: this rank's piece
            bad = None if own is None or bool(torch.isfinite(own).all()) else name
    if any_rank(torch.tensor([bad is not None])).any():
        raise DivergenceError(
            f"training has diverged: weights are no longer finite ({bad or 'on another rank'}); "
            "they are not saved. A lower --learning_rate may help"
        )
