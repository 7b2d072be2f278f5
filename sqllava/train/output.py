"""An output folder's life: what made what lies in it, who may go on there, what may be deleted.

All that this program writes it marks with a record of what made it. What bears no record of its own
making is somebody else's: it is neither resumed, nor written over, nor removed.
"""

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from sqllava.checkpoint.convert import RECORD_FILE as CONVERTED
from sqllava.model.card import RUN_FILE

# Written into a checkpoint when everything else in it is on disk; without it, it does not count.
COMPLETE = "complete"
# Before the name of a folder that is just being made or taken apart.
_ASIDE = ".sqllava-"
_LOCK = ".sqllava_run.lock"
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d*)")
_WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_CONFIGS = ("config.json", "adapter_config.json")

# Flags that name what a run is made of. They are compared by what lies there, not by its name.
DATA_FLAGS = ("data_path", "eval_data_path")
MODEL_FLAGS = ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter")
# A longer run has another learning rate at each step: it is gone on with only when asked for.
_LENGTH = ("num_train_epochs", "max_steps")
# Flags that do not change what is trained, beyond the last digit. All others are the recipe.
_FREE = frozenset(
    # places, compared by what lies there if at all
    (*DATA_FLAGS, *MODEL_FLAGS, "image_folder", "output_dir", "deepspeed")
    # what this file is about
    + ("overwrite_output_dir", "resume_from_checkpoint", "ignore_data_skip")
    + ("restore_callback_states_from_checkpoint",)
    # what is said and shown
    + ("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter")
    + ("log_on_each_node", "log_level", "log_level_replica", "disable_tqdm", "report_to")
    + ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
    + ("include_num_input_tokens_seen", "include_tokens_per_second", "debug")
    + ("skip_memory_metrics",)
    # when it is saved, and where to
    + ("save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "save_only_model")
    + ("enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id")
    + ("hub_strategy", "hub_always_push", "hub_revision")
    # when it is measured; which weights come out does not depend on it but by load_best_...
    + ("eval_strategy", "evaluation_strategy", "eval_steps", "eval_delay", "eval_on_start")
    + ("per_device_eval_batch_size", "eval_batch_size", "prediction_loss_only")
    + ("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps")
    + ("include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval")
    + ("do_train", "do_eval", "do_predict")
    # how the machine is used
    + ("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers")
    + ("dataloader_prefetch_factor", "dataloader_multiprocessing_context")
    + ("activation_checkpointing", "activation_checkpointing_kwargs")
    + ("gradient_checkpointing", "gradient_checkpointing_kwargs", "attn_implementation")
    + ("torch_empty_cache_steps", "torch_compile", "torch_compile_backend", "torch_compile_mode")
    + ("use_cpu", "local_rank", "use_cache", "ddp_find_unused_parameters", "ddp_bucket_cap_mb")
    + ("ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout")
    # what the global batch and the number of processes say, however they are made up
    + ("per_device_train_batch_size", "gradient_accumulation_steps", "train_batch_size")
    # taken up by other flags, or without effect
    + ("warmup_ratio", "mm_use_im_patch_token", "lazy_preprocess", "data_aug")
    # what a record that cannot be used does to the run; up to here there was none, or they agree
    + ("bad_samples", "max_bad_samples")
)
# Of a DeepSpeed file, what only logs, and what the flags say.
_FREE_OF_DEEPSPEED = frozenset(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    + ("steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown")
    + ("comms_logger", "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet")
)


class OutputError(ValueError):
    """The output folder cannot be used as the flags ask for."""


@dataclass(frozen=True)
class Record:
    """sqllava_run.json: everything that made a result or a checkpoint, in JSON's types.

    Attributes:
        model, data, training: every flag.
        sq_r: the share of turns to ask that was in force.
        deepspeed: the content of the DeepSpeed file.
        world_size: processes.
        inputs: a hash for each of DATA_FLAGS and MODEL_FLAGS that is given.
        base: which base and tower this is (`checkpoint/base.py`), once they are loaded.
        checkpoint: of a checkpoint's record, its step and whether it may be resumed from.
        finished: of a result's record, the step at which the run was done; None until then.
    """

    stage: int
    model: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]
    sq_r: float
    zero_stage: int
    deepspeed: dict[str, Any] | None
    world_size: int
    inputs: dict[str, str | None]
    packages: dict[str, str | None]
    base: dict[str, Any] | None = None
    checkpoint: dict[str, Any] | None = None
    finished: int | None = None

    @property
    def flags(self) -> dict[str, Any]:
        return self.model | self.data | self.training | {"sq_r": self.sq_r}


def write_record(record: Record, folder: Path) -> None:
    """Writes a record into a folder, whole or not at all."""
    unfinished = folder / f"{RUN_FILE}.tmp"
    with unfinished.open("w") as handle:
        handle.write(json.dumps(asdict(record), indent=1, default=str) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    unfinished.replace(folder / RUN_FILE)


def read_record(folder: Path) -> Record | None:
    """The record in a folder; None where there is none that this program could have written."""
    try:
        given = json.loads((folder / RUN_FILE).read_text())
        return Record(**{field.name: given[field.name] for field in fields(Record)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- the recipe -----------------------------------------------------------------------------------


def recipe(record: Record) -> dict[str, Any]:
    """What decides which weights come out, by name: flags, global batch, DeepSpeed file."""
    flags = record.flags
    best = bool(flags.get("load_best_model_at_end"))
    free = _FREE - {"eval_strategy", "eval_steps", "eval_delay"} if best else _FREE
    found = {f"--{name}": value for name, value in flags.items() if name not in free}
    if flags["max_steps"] > 0:  # then the epochs have no meaning
        del found["--num_train_epochs"]
    batch = flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"]
    found["global batch"] = batch * record.world_size
    found["processes"] = record.world_size
    for name, value in _leaves(record.deepspeed or {}):
        if name.split(".")[0] not in _FREE_OF_DEEPSPEED:
            found[f"{name} in --deepspeed"] = value
    return found


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@dataclass(frozen=True)
class Difference:
    """One thing that was otherwise, with both values as they are told."""

    name: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.then} then, {self.now} now"


def differences(then: Record, now: Record) -> list[Difference]:
    """Where the recipes of two runs differ, or what they are made from."""
    before, after = recipe(then), recipe(now)
    found = [
        Difference(name, before.get(name, "not given"), after.get(name, "not given"))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    measured = bool(now.flags.get("load_best_model_at_end"))
    for name in (*DATA_FLAGS, *MODEL_FLAGS):
        if then.inputs.get(name) == now.inputs.get(name):
            continue
        if name == "eval_data_path" and not measured:
            continue
        found.append(Difference(f"--{name}", _told(then, name), _told(now, name)))
    return found


def _told(record: Record, name: str) -> str:
    stamp = record.inputs.get(name)
    return f"{record.flags[name]} ({stamp[:15]})" if stamp else f"{record.flags[name]}"


def only_longer(changes: list[Difference]) -> bool:
    """Whether all that differs is that the run is to be longer."""
    return bool(changes) and all(
        change.name.removeprefix("--") in _LENGTH
        and isinstance(change.then, int | float)
        and isinstance(change.now, int | float)
        and change.now > change.then > 0
        for change in changes
    )


# --- what lies in a folder ------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that this program wrote, or began to write."""

    path: Path
    step: int
    record: Record
    complete: bool

    @property
    def resumable(self) -> bool:
        return bool((self.record.checkpoint or {}).get("resumable"))


@dataclass(frozen=True)
class Found:
    """What lies in an output folder.

    Attributes:
        record: of the run that made the result, or is making it.
        checkpoints: ours, by their step.
        strangers: folders named like checkpoints that are not ours.
        weights: files of a result, ours if `record` is there.
        configs: files that make a folder a model, likewise.
    """

    folder: Path
    record: Record | None
    checkpoints: tuple[Checkpoint, ...]
    strangers: tuple[Path, ...]
    weights: tuple[Path, ...]
    configs: tuple[Path, ...]

    @property
    def complete(self) -> list[Checkpoint]:
        return [checkpoint for checkpoint in self.checkpoints if checkpoint.complete]

    @property
    def finished(self) -> Record | None:
        """The record of a result that is there and whole."""
        done = self.record is not None and self.record.finished is not None and self.weights
        return self.record if done else None


def look(folder: Path) -> Found:
    """Reads what lies in an output folder; an empty or missing one is all empty."""
    named = sorted(folder.glob("checkpoint-*"))
    ours = [checkpoint for path in named if (checkpoint := read_checkpoint(path))]
    known = {checkpoint.path for checkpoint in ours}
    # A converted model has the record of what it was made from, but no run made it.
    record = None if (folder / CONVERTED).exists() else read_record(folder)
    return Found(
        folder,
        record,
        tuple(sorted(ours, key=lambda checkpoint: checkpoint.step)),
        tuple(path for path in named if path not in known),
        tuple(path for path in sorted(folder.glob("*")) if _WEIGHTS.fullmatch(path.name)),
        tuple(folder / name for name in _CONFIGS if (folder / name).is_file()),
    )


def read_checkpoint(path: Path) -> Checkpoint | None:
    """A checkpoint of ours; None for a copy under another name, or somebody else's."""
    name = _CHECKPOINT.fullmatch(path.name)
    if not name or path.is_symlink() or not path.is_dir():
        return None
    record = read_record(path)
    if record is None or (record.checkpoint or {}).get("step") != int(name[1]):
        return None
    return Checkpoint(path, int(name[1]), record, (path / COMPLETE).is_file())


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, if there is one."""
    complete = look(folder).complete
    return complete[-1].path if complete else None


# --- the rule -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run does with its folder.

    Attributes:
        remove: what goes first; all of it bears our mark.
        note: what to tell.
    """

    kind: Literal["start", "resume", "finished"]
    checkpoint: Path | None = None
    remove: tuple[Path, ...] = ()
    note: str = ""


def resume_choice(given: str | None) -> bool | Path | None:
    """What --resume_from_checkpoint asks for: a yes, a no, a place, or nothing."""
    if given is None:
        return None
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return words.get(given.lower(), Path(given))


def decide(found: Found, now: Record, resume: bool | Path | None, overwrite: bool) -> Plan:
    """The rule of an output folder: start, go on, or nothing to do.

    Raises:
        OutputError: what lies there was made otherwise, or by somebody else.
    """
    folder = found.folder
    _refuse_models_of_others(found)
    unfinished = tuple(c.path for c in found.checkpoints if not c.complete)
    # The weights go after their record: what is left of a broken-off removal is nobody's result.
    result = (folder / RUN_FILE, *found.weights) if found.record else ()
    if overwrite:
        if isinstance(resume, Path) or resume:
            raise OutputError(
                "--overwrite_output_dir True and --resume_from_checkpoint exclude each other"
            )
        return Plan("start", remove=(*result, *(c.path for c in found.checkpoints)))
    chosen = _chosen(found, resume)
    made = found.finished or (chosen.record if chosen else None)
    if resume is False and made:
        raise OutputError(
            f"--resume_from_checkpoint False, but {folder} holds "
            f"{'a finished run' if found.finished else chosen and chosen.path.name}: "
            "add --overwrite_output_dir True to start anew there, or give another --output_dir"
        )
    if made is None:
        return Plan("start", remove=unfinished)
    changes = differences(made, now)
    if changes and not (only_longer(changes) and resume):
        raise OutputError(_refusal(found, chosen, changes))
    if found.finished and not changes:
        return Plan(
            "finished",
            note=f"{folder}: this run is finished, with the same recipe and data, at step "
            f"{found.finished.finished}; nothing to do (--overwrite_output_dir True starts anew)",
        )
    if chosen is None:
        raise OutputError(
            f"{folder} holds a finished run but no checkpoint to go on from ({_list(changes)}): "
            "add --overwrite_output_dir True to start anew there, or give another --output_dir"
        )
    _refuse_dead_ends(found, chosen)
    note = f"resuming from {chosen.path}"
    if changes:
        note += (
            f", for a longer run ({_list(changes)}): from step {chosen.step} on the learning rate "
            "is that of the longer schedule"
        )
    return Plan("resume", chosen.path, (*unfinished, *(result if changes else ())), note)


def _chosen(found: Found, resume: bool | Path | None) -> Checkpoint | None:
    if isinstance(resume, Path):
        return _named(resume)
    if found.complete:
        return found.complete[-1]
    if resume and not found.finished:
        raise OutputError(
            f"--resume_from_checkpoint True, but {found.folder} holds no checkpoint that was "
            "written to its end; leave the flag out to start there"
        )
    return None


def _named(path: Path) -> Checkpoint:
    checkpoint = read_checkpoint(path.absolute())
    if checkpoint and checkpoint.complete:
        return checkpoint
    if checkpoint:
        raise OutputError(f"--resume_from_checkpoint {path}: it was never finished")
    if not path.is_dir():
        raise OutputError(f"--resume_from_checkpoint {path}: no such folder")
    inside = ", ".join(str(c.path) for c in look(path).complete)
    raise OutputError(
        f"--resume_from_checkpoint {path}: no checkpoint of this program's making under its own "
        + (f"name; in it are {inside}" if inside else f"name (no {RUN_FILE} in it that says so)")
    )


def _refuse_models_of_others(found: Found) -> None:
    if found.record is None and (found.weights or found.configs):
        names = ", ".join(path.name for path in (*found.weights, *found.configs)[:3])
        raise OutputError(
            f"{found.folder} holds a model that is not of this run's making ({names}, and no "
            f"{RUN_FILE} of ours), which would be written over; give another --output_dir"
        )


def _refuse_dead_ends(found: Found, chosen: Checkpoint) -> None:
    later = [c.path.name for c in found.complete if c.step > chosen.step]
    if later:
        raise OutputError(
            f"{found.folder} holds later checkpoints than {chosen.path} ({', '.join(later)}): "
            "remove them to go on from there, or give another --output_dir"
        )
    if not chosen.resumable:
        raise OutputError(
            f"{chosen.path} was saved with --save_only_model True: weights without the optimizer's "
            "state cannot be resumed from; add --overwrite_output_dir True to start anew, or give "
            "another --output_dir"
        )


def _refusal(found: Found, chosen: Checkpoint | None, changes: list[Difference]) -> str:
    made = "a finished run" if found.finished else str(chosen and chosen.path.name)
    ways = [
        "the values of then",
        "another --output_dir",
        "--overwrite_output_dir True to start anew",
    ]
    if only_longer(changes) and chosen:
        ways.append(
            f"--resume_from_checkpoint True to go on from {chosen.path.name} with the learning "
            "rates of the longer run"
        )
    return (
        f"{found.folder} holds {made} of another making ({_list(changes)}): give "
        f"{', '.join(ways[:-1])}, or {ways[-1]}"
    )


def _list(changes: list[Difference]) -> str:
    return "; ".join(map(str, changes))


# --- writing and removing -------------------------------------------------------------------------


def begin_checkpoint(path: Path, step: int, record: Record, resumable: bool) -> None:
    """Marks a checkpoint as ours before anything else is written into it.

    Raises:
        OutputError: a folder of somebody else's is there.
    """
    if path.exists() or path.is_symlink():
        if read_checkpoint(path) is None:
            raise OutputError(taken([path]))
        remove([path])
    # Under its own name only with its record in it: a kill in between must not leave a stranger.
    begun = _aside(path)
    begun.mkdir(parents=True)
    write_record(replace(record, checkpoint={"step": step, "resumable": resumable}), begun)
    begun.rename(path)


def end_checkpoint(path: Path) -> None:
    """Marks a checkpoint as whole, once all of it is on the disk."""
    for file in path.rglob("*"):
        if file.is_file():
            _flush(file)
    (path / COMPLETE).touch()
    _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def in_the_way(strangers: tuple[Path, ...], last_step: int) -> list[Path]:
    """Folders of others that have the name of a checkpoint which a run may come to write."""
    numbered = [(path, _CHECKPOINT.fullmatch(path.name)) for path in strangers]
    return [path for path, name in numbered if name and int(name[1]) <= last_step]


def taken(paths: list[Path]) -> str:
    """What to say about folders in the way."""
    return (
        f"{', '.join(map(str, paths))}: not of this program's making, and this run would write a "
        "checkpoint of that name; move it, or give another --output_dir"
    )


def outdated(checkpoints: list[Checkpoint], limit: int | None, best: str | None) -> list[Path]:
    """Which checkpoints a limit lets go: the oldest, never the newest nor the best one."""
    if not limit or limit < 1:
        return []
    kept = {checkpoints[-1].path} if checkpoints else set()
    kept |= {c.path for c in checkpoints if best and c.path.absolute() == Path(best).absolute()}
    others = [c.path for c in checkpoints if c.path not in kept]
    return others[: max(len(checkpoints) - max(limit, len(kept)), 0)]


def remove(paths: tuple[Path, ...] | list[Path]) -> None:
    """Removes files and folders; a folder loses its name first, as half of one claims nothing."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            gone = _aside(path)
            path.rename(gone)
            shutil.rmtree(gone)
        else:
            path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Clears away what a kill left of checkpoints that were being begun or removed."""
    for path in folder.glob(f"{_ASIDE}*"):
        shutil.rmtree(path)


def _aside(path: Path) -> Path:
    """Where a folder is made or taken apart, out of everybody's way."""
    aside = path.with_name(_ASIDE + path.name)
    if aside.exists():
        shutil.rmtree(aside)
    return aside


# --- one run at a time ----------------------------------------------------------------------------


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Holds an output folder for this process; the system frees it when the process dies.

    Yields:
        Whether the file system has locks.

    Raises:
        OutputError: another run holds it.
    """
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            # Not flock: workers that are forked later would go on holding it.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            raise OutputError(
                f"{folder} is in use by {holder}: wait for that run, end it, or give another "
                "--output_dir"
            ) from None
        except OSError:
            yield False
            return
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield True
    finally:
        os.close(handle)
