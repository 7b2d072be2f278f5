"""transformers' Trainer with our sampler, learning rates, statistics and checkpoints."""

import contextlib
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from sqllava.checkpoint.weights import has_weights
from sqllava.data.dataset import InstructionDataset
from sqllava.data.sampler import GroupedSampler
from sqllava.model.adapters import adapter_state, save_adapter
from sqllava.train.arguments import TrainArguments
from sqllava.train.audit import GradientAudit
from sqllava.train.divergence import DivergenceError, FiniteSteps, check_weights
from sqllava.train.flops import Costs, Work, peak_flops
from sqllava.train.optim import build_param_groups
from sqllava.train.output import (
    OutputError,
    Record,
    begin_checkpoint,
    end_checkpoint,
    in_the_way,
    last_complete_checkpoint,
    look,
    outdated,
    remove,
    taken,
)
from sqllava.train.process import StopRequest, leave_signals_to_parent
from sqllava.train.room import told
from sqllava.train.rows import RowSampler, Sizes

logger = logging.getLogger(__name__)

# By the collators. Tokens are those of the records; computed are those that the model runs, padding
# included, pairs those of which one sees the other, and images those that the tower runs, each once
# where records share it.
_COUNTED = (
    "tokens",
    "computed",
    "padding",
    "pairs",
    "supervised",
    "images",
    "images_of_records",
    "dropped_turns",
)


class TooManyBadSamplesError(RuntimeError):
    """More records were skipped or replaced than --max_bad_samples allows."""


class Stop(TrainerCallback):
    """Ends a run after a step, with a checkpoint, when any rank was asked to stop.

    Attributes:
        request: what this rank was asked.
        agreed: the signal, once all ranks know; 0 until then.
    """

    def __init__(self) -> None:
        self.request = StopRequest()
        self.agreed = 0

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        by = torch.tensor(self.request.by)
        if args.world_size > 1:
            by = by.to(args.device)
            dist.all_reduce(by, op=dist.ReduceOp.MAX)
        self.agreed = int(by)
        if self.agreed:
            control.should_save = control.should_training_stop = True


class SQLlavaTrainer(Trainer):
    """Trains SQ-LLaVA.

    Args:
        audit: the step-one audit.
        finite: the watch over every step's loss and gradient norm.
        max_bad_samples: skipped or replaced samples, over all ranks, at which the run stops.
        sizes: of the training records, to deal them out as rows, which the collator must make;
            None for rectangles.
        costs: what a step computes, for the log of the first rank.

    Attributes:
        record: on the first rank, what makes this run; each checkpoint holds it.
    """

    args: TrainArguments
    train_dataset: InstructionDataset
    record: Record | None = None

    def __init__(
        self,
        *,
        audit: GradientAudit,
        finite: FiniteSteps,
        max_bad_samples: int,
        sizes: Sizes | None = None,
        costs: Costs | None = None,
        **kwargs: Any,
    ) -> None:
        self.stop = Stop()
        super().__init__(callbacks=[audit, self.stop], **kwargs)
        self.audit = audit
        self.finite = finite
        self.sizes = sizes
        self.costs = costs
        self._order: GroupedSampler | RowSampler | None = None
        self.add_callback(_EpochOrder(self))
        self.max_bad_samples = max_bad_samples
        self.counts: Counter[str] = Counter()
        self.bad_samples = 0
        self._bad: dict[int, str] = {}  # seen by this rank since the last log line
        self._named: set[int] = set()
        self._saved_step: int | None = None
        self._last_log = time.monotonic()

    def get_train_dataloader(self) -> DataLoader:
        """Rectangles by the sampler below, or rows by a batch sampler."""
        if self.sizes is None:
            return super().get_train_dataloader()
        args = self.args
        self._order = RowSampler(
            self.sizes,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            budget=args.per_device_train_batch_size * args.model_max_length,
            drop_last=args.dataloader_drop_last,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self._order,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            worker_init_fn=partial(_begin_worker, None),
        )
        return cast(DataLoader, self.accelerator.prepare(loader))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        args = self.args
        micro = args.per_device_train_batch_size
        self._order = GroupedSampler(
            self.train_dataset.lengths,
            self.train_dataset.has_image,
            micro,
            micro * args.gradient_accumulation_steps * args.world_size,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            group_by_length=args.group_by_length or args.group_by_modality_length,
            group_by_modality=args.group_by_modality_length,
        )
        return self._order

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's holds the one that runs
        inner.worker_init_fn = partial(_begin_worker, inner.worker_init_fn)
        return loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or --optim) over `build_param_groups`."""
        if self.optimizer is None:
            model = cast(PreTrainedModel, self.model if model is None else model)
            groups = build_param_groups(model.named_parameters(), self.args)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """The schedule, in shares of each part's own rate."""
        inner = cast(Any, getattr(optimizer or self.optimizer, "optimizer", None))
        if inner is not None and not hasattr(inner, "defaults"):
            # DeepSpeed's wrapper lacks what some schedules read of the optimiser within.
            inner.defaults = inner.optimizer.defaults
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's loss; takes the batch's statistics out on the way."""
        stats = inputs.pop("sample_stats")
        if model.training:
            self.audit.images += stats["images"]
            self.audit.targets += stats["supervised"]
            self.counts.update({name: stats[name] for name in _COUNTED})
            for index, reason in stats["skipped"]:
                self.counts["skipped"] += 1
                self._bad[index] = reason
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            loss = cast(torch.Tensor, result[0] if return_outputs else result)
            self.finite.saw(loss, stats["indices"])
        return result

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None, *args: Any, **kw: Any
    ) -> None:
        """What comes after an optimiser step: first it must have been one."""
        self.finite.end_step(self.state.global_step, grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kw)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was counted since the last log line, over all ranks."""
        if not math.isfinite(logs.get("eval_loss", 0.0)):
            raise DivergenceError(
                f"training has diverged: the validation loss after step {self.state.global_step} "
                f"is {logs['eval_loss']}"
            )
        if "loss" in logs:
            logs |= self._statistics()
        elif "train_loss" in logs:  # the end of the run: what came after the last log line
            self._statistics()
        super().log(logs, start_time)
        if self.bad_samples > self.max_bad_samples:
            raise TooManyBadSamplesError(
                f"{self.bad_samples} records could not be used (more than --max_bad_samples "
                f"{self.max_bad_samples}); the warnings above name them"
            )

    def _statistics(self) -> dict[str, float]:
        names = (*_COUNTED, "skipped")
        counts = torch.tensor([float(self.counts[name]) for name in names], dtype=torch.float64)
        if self.args.world_size > 1:
            counts = counts.to(self.args.device)
            dist.all_reduce(counts)
        total = dict(zip(names, counts.tolist(), strict=True))
        self.counts.clear()
        self.bad_samples += int(total["skipped"])
        if total["skipped"]:
            self._name_bad_records()
        tokens, seconds = max(total["tokens"], 1.0), self._seconds_since_log()
        logs = {
            "tokens_per_second": round(total["tokens"] / seconds, 1),
            "padding_share": round(total["padding"] / (tokens + total["padding"]), 4),
            "supervised_share": round(total["supervised"] / tokens, 4),
            "computed_share": round(total["computed"] / tokens, 4),
            "images": total["images"],
        }
        if total["images_of_records"]:
            logs["images_share"] = round(total["images"] / total["images_of_records"], 4)
        logs |= self._speed(total, seconds)
        optional = {"dropped_turns": total["dropped_turns"], "bad_samples": self.bad_samples}
        return logs | {name: value for name, value in optional.items() if value}

    def _speed(self, total: dict[str, float], seconds: float) -> dict[str, float]:
        """The model's TFLOP a second, over all ranks; on a known card, their share of its peak."""
        if self.costs is None:
            return {}
        tokens = total["computed"] - total["padding"]
        work = Work(tokens, total["pairs"], total["images"], total["supervised"])
        speed = self.costs.of(work) / seconds
        logs = {"model_tflops": float(f"{speed / 1e12:.4g}")}
        device = self.args.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if peak:
            logs["mfu"] = round(speed / (peak * self.args.world_size), 4)
        return logs

    def _name_bad_records(self) -> None:
        """Logs each record that could not be used once, whichever ranks and epochs met it."""
        found = [self._bad]
        if self.args.world_size > 1:
            found = [{} for _ in range(self.args.world_size)]
            dist.all_gather_object(found, self._bad)
        for index, reason in sorted(item for one in found for item in one.items()):
            if index not in self._named and self.is_world_process_zero():
                logger.warning("record %d was not used: %s", index, reason)
            self._named.add(index)
        self._bad.clear()

    def _seconds_since_log(self) -> float:
        now = time.monotonic()
        seconds, self._last_log = now - self._last_log, now
        return max(seconds, 1e-9)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves an adapter directory (or the whole model, where all of it trains).

        Raises:
            DivergenceError: weights are not finite; nothing is written.
        """
        check_weights(cast(nn.Module, self.model))
        if not isinstance(self.model, PeftModel):
            super().save_model(output_dir, _internal_call)
            folder = Path(output_dir or cast(str, self.args.output_dir))
            if self.args.should_save and not has_weights(folder):
                raise RuntimeError(f"{folder}: the model was saved without its weights")
            return
        state = adapter_state(self.model)
        if self.args.should_save:
            folder = Path(output_dir or cast(str, self.args.output_dir))
            save_adapter(self.model, state or {}, folder)
            cast(Any, self.processing_class).save_pretrained(folder)

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """Also looks who is in the way, and keeps the flags' steps, not the checkpoint's."""
        if self.record:
            others = in_the_way(look(Path(cast(str, self.args.output_dir))).strangers, max_steps)
            if others:
                raise OutputError(taken(others))
        if max_steps <= self.args.get_warmup_steps(max_steps) and self.is_world_process_zero():
            logger.warning(
                "all of the %d steps warm up: the learning rate starts at 0 and never comes to "
                "--learning_rate",
                max_steps,
            )
        trained = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return trained

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, folder = self.state.global_step, Path(cast(str, self.args.output_dir))
        path = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if step == self._saved_step:  # at the end of a step, and again at that of the epoch
            return
        with self.saving(path.name, folder):
            if self.record:
                begin_checkpoint(path, step, self.record, not self.args.save_only_model)
            self._wait()
            with self._without_limit() as limit:
                super()._save_checkpoint(model, trial)
            self._wait()
            self._saved_step = step
            if self.record:
                end_checkpoint(path)
                # Only now may older ones go: a kill in between must find one that is whole.
                best = self.state.best_model_checkpoint
                remove(outdated(look(folder).complete, limit, best))

    def _finalize_training(self, *args: Any) -> TrainOutput:
        with self._without_limit():
            return super()._finalize_training(*args)

    @contextlib.contextmanager
    def _without_limit(self) -> Iterator[int | None]:
        """Keeps transformers from removing whatever is named like a checkpoint."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield limit
        finally:
            self.args.save_total_limit = limit

    def _wait(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def saving(self, what: str, folder: Path) -> Iterator[None]:
        """Says in a sentence that something could not be saved, and what is left."""
        try:
            yield
        except OutputError:
            raise
        except Exception as error:
            free = shutil.disk_usage(folder).free
            if not _is_of_the_disk(error, free):
                raise
            last = last_complete_checkpoint(folder)
            left = (
                f"{last} is whole: the same command goes on from there"
                if last
                else ("there is no whole checkpoint")
            )
            raise OutputError(
                f"{folder}: {what} could not be saved ({_first_line(error)}); {told(free)} are "
                f"free on its disk; {left}"
            ) from error


class _EpochOrder(TrainerCallback):
    """Tells the sampler its epoch.

    accelerate does so, but not through the shards of a run of several ranks that resumes within an
    epoch: that would go on in the order of the first.
    """

    def __init__(self, trainer: SQLlavaTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Before the loader of the epoch is asked for its first batch."""
        if self.trainer._order is not None:
            self.trainer._order.set_epoch(int(state.epoch or 0))


def _begin_worker(given: Callable[[int], None] | None, worker: int) -> None:
    leave_signals_to_parent()
    if given:
        given(worker)


def _is_of_the_disk(error: Exception, free: int) -> bool:
    """Whether an error while saving is the disk's; torch and safetensors raise their own kinds."""
    signs = ("PytorchStreamWriter", "file write failed", "os error", "enforce fail")
    return isinstance(error, OSError) or free < 1 << 20 or any(s in str(error) for s in signs)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
