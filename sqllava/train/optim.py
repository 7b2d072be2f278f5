"""Parameter groups of the optimiser: each part with its own learning rate."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from sqllava.model.adapters import PARTS, part_of
from sqllava.train.arguments import TrainArguments


def learning_rates(arguments: TrainArguments) -> dict[str, float]:
    """Each part's learning rate; a part without its own takes the base rate."""
    own = {"projector": arguments.mm_projector_lr, "vision tower": arguments.vision_tower_lr}
    rates = {part: own.get(part) for part in PARTS}
    return {part: arguments.learning_rate if rate is None else rate for part, rate in rates.items()}


def build_param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], arguments: TrainArguments
) -> list[dict[str, Any]]:
    """Sorts the parameters that train into groups by part and by weight decay.

    Biases and norms (parameters of one dimension) have no weight decay.

    Returns:
        Groups for a torch optimiser, each with `part`, `lr` and `weight_decay`; empty ones are
        left out. Every parameter that trains is in exactly one.
    """
    rates = learning_rates(arguments)
    groups: dict[tuple[str, bool], dict[str, Any]] = {
        (part, decays): {
            "params": [],
            "part": part,
            "lr": rates[part],
            "weight_decay": arguments.weight_decay if decays else 0.0,
        }
        for part in PARTS
        for decays in (True, False)
    }
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            groups[part_of(name), dimensions > 1]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
