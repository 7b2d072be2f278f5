"""Where a part's layers are, and where a vision tower ends: asked of the modules, never of a name.

Adapters put LoRA into the layers; the model reads its tower's last one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from transformers import MODEL_MAPPING, PretrainedConfig


def blocks_of(part: nn.Module, layers: int) -> Iterator[tuple[str, nn.Module]]:
    """The repeated layers of a tower or a language model, with their paths within it.

    They are the members of the outermost lists as long as the configuration says that there are
    layers; a list within a layer (as of a mixture's experts) is part of that layer.
    """
    found: list[str] = []
    for path, module in part.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == layers and not inside:
            found.append(path)
            yield from ((f"{path}.{n}", block) for n, block in enumerate(module))


def with_layers(vision_config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A tower's configuration with another number of layers, all else the same."""
    # The names of a backbone's stages (DINOv2) follow from the number of layers.
    stages = ("stage_names", "out_features", "out_indices")
    values = {name: v for name, v in vision_config.to_dict().items() if name not in stages}
    return type(vision_config).from_dict(values | {"num_hidden_layers": layers})


@dataclass(frozen=True)
class TowerEnd:
    """How a tower of some kind ends.

    Attributes:
        class_tokens: tokens that stand before the patches: 1 for CLIP, 0 for SigLIP.
        last_norm: path of the norm between the last layer and `last_hidden_state`, if there is
            one. No hidden state of transformers has passed it.
    """

    class_tokens: int
    last_norm: str | None


def tower_end(config: PretrainedConfig) -> TowerEnd:
    """Looks at how a tower ends, by running one layer of it without weights.

    Args:
        config: the tower's, of any number of layers.

    Raises:
        ValueError: such a tower cannot be read: it wants more than pixels, gives no token for each
            patch, or does more than a norm past its last layer.
    """
    values = json.dumps(with_layers(config, 1).to_dict(), sort_keys=True, default=str)
    return _tower_end(cast(Any, type(config)), values)


@lru_cache
def _tower_end(kind: type[PretrainedConfig], values: str) -> TowerEnd:
    config = kind.from_dict(json.loads(values))
    what = f"a vision tower of type {config.model_type!r} cannot be read"
    size, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    if not isinstance(size, int) or not isinstance(patch, int):
        raise ValueError(f"{what}: its image_size is {size} and its patch_size {patch}")
    with torch.device("meta"):
        # Not by from_config, which ZeRO-3 would make partition weights that are not there.
        tower = cast(Any, MODEL_MAPPING[kind])(config).eval()
        pixels = torch.zeros(1, 3, size, size)
    calls: list[tuple[str, Any, Any]] = []
    for path, module in tower.named_modules():
        if path:
            module.register_forward_hook(
                lambda _, given, result, path=path: calls.append((path, given, result))
            )
    try:
        with torch.no_grad():
            last = tower(pixels, return_dict=True).last_hidden_state
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} from pixels alone: {error}") from None
    patches = (size // patch) ** 2
    if last.ndim != 3 or last.shape[1] < patches:
        raise ValueError(
            f"{what}: for {patches} patches it gives features of shape {tuple(last.shape)}"
        )
    layers = dict(blocks_of(tower, 1))
    outputs = [_tensor(result) for path, _, result in calls if path in layers]
    class_tokens = last.shape[1] - patches
    if outputs and last is outputs[-1]:
        return TowerEnd(class_tokens, None)
    for path, given, result in calls:
        if outputs and given and given[0] is outputs[-1] and result is last:
            return TowerEnd(class_tokens, path)
    raise ValueError(f"{what}: it does more than a norm past its last layer")


def _tensor(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result
