"""The step-one audit: what is meant to train gets a gradient, and nothing else does.

The published code ran its tower under no_grad, so its ViT-LoRA never learned and nobody noticed.
Here a run stops when it would train something else than it says.
"""

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sqllava.model.adapters import Training, part_of, trained_names, trained_parts
from sqllava.model.model import SQLlavaForConditionalGeneration

logger = logging.getLogger(__name__)


class GradientAuditError(RuntimeError):
    """The first step's gradients are not where the flags say that they should be."""


class GradientAudit(TrainerCallback):
    """Watches the gradients of the first optimiser step and judges them at its end.

    Hooks see each gradient before DeepSpeed takes it away. Parts that need an image are judged at
    the first step that has one, and nothing before the first step that has tokens to learn.

    Args:
        training: what the flags ask for, by which the model and its gradients are judged.

    Attributes:
        images, targets: that this rank has read so far; the trainer counts them.
        idle: whether steps were made, and none had tokens to learn.

    Raises:
        GradientAuditError: the model is set to train something else.
    """

    def __init__(
        self,
        model: SQLlavaForConditionalGeneration | PeftModel,
        learning_rates: dict[str, float],
        training: Training,
    ) -> None:
        self.learning_rates = learning_rates
        self.model = model
        wanted = trained_names(model, training)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        faults = [f"{name} is to train and is not set to" for name in sorted(wanted - trained)]
        faults += [f"{name} is to stay and is set to train" for name in sorted(trained - wanted)]
        _raise(faults)
        self.names = sorted(wanted)
        self.seen: dict[str, bool] = {}  # name -> its gradient was not all zero
        self.pending = {part_of(name) for name in self.names}
        self.images = self.targets = 0
        self.idle = False
        self.hooks = [
            parameter.register_hook(self._recorder(name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def _recorder(self, name: str) -> Callable[[torch.Tensor], None]:
        def record(gradient: torch.Tensor) -> None:
            self.seen[name] = self.seen.get(name, False) or bool(gradient.detach().any())

        return record

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Judges the parts that this step could reach, while the gradients are still there."""
        if not self.pending:
            return
        self.idle = not _anywhere(self.targets)
        if self.idle:  # no record could be used, as yet: nothing could have a gradient
            return
        reached = set(self.pending) if _anywhere(self.images) else self.pending & {"language model"}
        faults = self._faults(reached)
        self.pending -= reached
        if not self.pending:
            for hook in self.hooks:
                hook.remove()
        _raise(faults)
        if reached:
            logger.info(
                "gradient audit at step %d passed for %s: %d tensors have gradients",
                state.global_step + 1,
                ", ".join(sorted(reached)),
                sum(part_of(name) in reached for name in self.names),
            )

    def _faults(self, parts: set[str]) -> list[str]:
        reached = torch.tensor([name in self.seen for name in self.names])
        nonzero = torch.tensor([self.seen.get(name, False) for name in self.names])
        reached, nonzero = any_rank(reached), any_rank(nonzero)
        faults = []
        for i, name in enumerate(self.names):
            if part_of(name) not in parts:
                continue
            if not reached[i]:
                faults.append(f"{name} is meant to train and is not part of the computation")
            elif not nonzero[i] and not _waits_for_its_partner(name, self.names, nonzero):
                faults.append(f"{name} is meant to train and has a gradient of zero")
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad and parameter.grad is not None:
                faults.append(f"{name} is meant to stay and has a gradient")
        return faults

    def table(self) -> str:
        """Parts, how many of their modules train, parameters, and learning rates, for the log."""
        columns = ("modules trained", "parameters", "trained", "learning rate")
        rows = [f"{'part':<16}" + "".join(f"{column:>16}" for column in columns)]
        for part, counts in trained_parts(self.model).items():
            rate = f"{self.learning_rates[part]:g}" if counts.trained else "frozen"
            modules = f"{counts.reached} of {counts.modules}"
            rows.append(
                f"{part:<16}{modules:>16}{counts.parameters:>16,}{counts.trained:>16,}{rate:>16}"
            )
        return "\n".join(rows)


def _raise(faults: list[str]) -> None:
    if faults:
        shown = "\n  ".join(faults[:20])
        raise GradientAuditError(f"{len(faults)} tensors fail the gradient audit:\n  {shown}")


def _waits_for_its_partner(name: str, names: list[str], nonzero: torch.Tensor) -> bool:
    """LoRA's B starts at zero, so A's first gradient is zero; B must have one."""
    if ".lora_A." not in name:
        return False
    partner = name.replace(".lora_A.", ".lora_B.")
    return partner in names and bool(nonzero[names.index(partner)])


def _anywhere(count: int) -> bool:
    return bool(any_rank(torch.tensor([count > 0]))[0])


def any_rank(flags: torch.Tensor) -> torch.Tensor:
    """Logical or of a flag tensor over all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return flags
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    counts = flags.int().to(device)
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    return counts.bool().cpu()
