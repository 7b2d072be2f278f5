"""What a run needs of its disk and of shared memory, checked before anything is loaded."""

import math
import os
import shutil
from pathlib import Path

import torch

from sqllava.checkpoint.parts import language_config_of, read_vision_config
from sqllava.model.adapters import adapter_shapes
from sqllava.model.config import SQLlavaConfig
from sqllava.model.model import SQLlavaForConditionalGeneration
from sqllava.train.arguments import Arguments, TrainArguments
from sqllava.train.output import OutputError
from sqllava.train.zero import whole_models

_SHARED = Path("/dev/shm")
_TRIAL = b"\0" * (1 << 16)


def make_writable(folder: Path) -> None:
    """Makes an output folder, and sees that a file can be written there.

    Raises:
        OutputError: it cannot; the message says why.
    """
    trial = folder / f".trial-{os.getpid()}"
    there = next((p for p in (folder, *folder.parents) if p.exists() or p.is_symlink()), folder)
    if not there.is_dir():
        found = "a file" if there.exists() else "a link that leads nowhere"
        raise OutputError(
            f"--output_dir {folder}: {there} is {found}; give a folder, or a new name"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with trial.open("wb") as handle:
                handle.write(_TRIAL)
                handle.flush()
                os.fsync(handle.fileno())
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"--output_dir {folder} cannot be written ({error.strerror or error}); "
            "mend that, or give another"
        ) from None


def check_disk(arguments: Arguments, folder: Path, kept: int) -> None:
    """Raises OutputError if what a run is sure to write does not fit on the disk.

    Args:
        kept: checkpoints that are there and count for --save_total_limit.
    """
    checkpoint, result = sizes(arguments)
    saves = _saves(arguments.train)
    # A new one is written before the oldest one goes. Without a limit, one at least.
    count = min(max((arguments.train.save_total_limit or 0) + 1 - kept, 1), saves)
    needed, free = count * checkpoint + result, shutil.disk_usage(folder).free
    if needed > free:
        parts = [f"{count} checkpoints of {told(checkpoint)}"] if count else []
        raise OutputError(
            f"{folder}: {told(free)} are free on its disk, but "
            f"{' and '.join([*parts, f'a result of {told(result)}'])} need {told(needed)}; free "
            "some, lower --save_total_limit, or give another --output_dir"
        )


def _saves(train: TrainArguments) -> int:
    """How often a run is sure to save; taken as a few times where that hangs on the data."""
    if train.save_strategy == "no":
        return 0
    if train.save_strategy == "epoch":
        return math.ceil(train.num_train_epochs) if train.max_steps < 1 else 1
    if train.save_steps < 1:
        return math.ceil(1 / train.save_steps)
    return math.ceil(train.max_steps / train.save_steps) if train.max_steps > 0 else 3


def sizes(arguments: Arguments) -> tuple[int, int]:
    """Bytes of a checkpoint and of the result, from the models' configs and the flags alone."""
    train, training = arguments.train, arguments.training
    config = _config(arguments)
    with whole_models():
        if training.full_language:
            with torch.device("meta"):
                model = SQLlavaForConditionalGeneration(config)
            count = sum(parameter.numel() for parameter in model.parameters())
        else:
            count = sum(math.prod(shape) for shape in adapter_shapes(config, training).values())
    weight = 2 if train.deepspeed and (train.bf16 or train.fp16) else 4
    # AdamW's two moments in float32; DeepSpeed adds float32 weights and a copy of what trains.
    states = 8 if train.optim.startswith("adamw") and "bit" not in train.optim else 0
    if train.deepspeed:
        states += 4 + weight
    if train.save_only_model:
        states = 0
    return count * (weight + states), count * weight


def _config(arguments: Arguments) -> SQLlavaConfig:
    flags = arguments.model
    options = (
        {"centres": flags.num_latents} if flags.mm_projector_type.startswith("cluster") else {}
    )
    return SQLlavaConfig(
        vision_config=read_vision_config(str(flags.vision_tower), flags.mm_vision_select_layer),
        text_config=language_config_of(flags.model_name_or_path),
        vision_feature_layer=-1,
        projector_type=flags.mm_projector_type,
        projector_options=options,
    )


def check_shared_memory(arguments: Arguments, processes: int, shared: Path = _SHARED) -> None:
    """Raises OutputError if the loader's workers cannot hand over even a batch each.

    They do so in shared memory, of which a container has 64 MB by default; a worker that finds none
    dies of a bus error.

    Args:
        processes: training processes on this machine.
    """
    train = arguments.train
    workers = train.dataloader_num_workers
    if not workers or not arguments.data.image_folder or not shared.is_dir():
        return
    flags = arguments.model
    side = read_vision_config(str(flags.vision_tower), flags.mm_vision_select_layer).image_size
    batch = train.per_device_train_batch_size * 3 * side * side * 4
    needed, free = processes * workers * batch, shutil.disk_usage(shared).free
    if needed > free:
        raise OutputError(
            f"{shared} (shared memory) has {told(free)} free, but {processes} x {workers} workers "
            f"with a batch of {told(batch)} each need {told(needed)}: give the container more "
            "(docker run --shm-size=...), or lower --dataloader_num_workers (0 needs none)"
        )


def told(size: int) -> str:
    """A number of bytes in words."""
    for unit, power in (("GB", 3), ("MB", 2), ("kB", 1)):
        if size >= 1000**power:
            return f"{size / 1000**power:.1f} {unit}"
    return f"{size} B"
