"""What a run needs of its disk and of shared memory is checked before anything is loaded."""

import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import flags, losses, write_data

from sqllava.train import room, run, trainer
from sqllava.train.arguments import parse_arguments
from sqllava.train.output import OutputError, last_complete_checkpoint, look
from sqllava.train.room import check_shared_memory, make_writable, sizes, told


@contextmanager
def mounted(folder: Path, options: str):
    """A file system of its own in memory; skips where that is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs to be root, with the right to do so")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "captions.json", "caption")


@pytest.fixture
def unloaded(monkeypatch):
    """A run that comes to its model fails the test."""

    def load(*given):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(run, "build_model", load)


def test_a_read_only_output_folder_is_told_at_once(tmp_path, data, unloaded):
    with (
        mounted(tmp_path / "disk", "ro") as disk,
        pytest.raises(SystemExit, match="--output_dir .*disk/out cannot be written .Read-only"),
    ):
        run.main(flags(1, data, disk / "out"))


def test_an_output_folder_that_is_a_file_is_told_at_once(tmp_path, data, unloaded):
    (tmp_path / "out").write_text("a file")
    for folder in (tmp_path / "out", tmp_path / "out" / "inner"):
        with pytest.raises(SystemExit, match=f"--output_dir {folder}: .*/out is a file; give"):
            run.main(flags(1, data, folder))


def test_an_output_folder_that_is_a_dead_link_is_told_at_once(tmp_path, data, unloaded):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(SystemExit, match="/out is a link that leads nowhere; give"):
        run.main(flags(1, data, tmp_path / "out"))


def test_a_full_disk_is_told_at_once(tmp_path, data, unloaded):
    with mounted(tmp_path / "disk", "size=8k") as disk:
        (disk / "filler").write_bytes(b"x" * 8000)
        with pytest.raises(SystemExit, match="cannot be written .No space left on device"):
            run.main(flags(1, data, disk / "out"))


def test_checkpoints_that_will_not_fit_are_told_at_once(tmp_path, data, unloaded):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 4}
    with (
        mounted(tmp_path / "disk", "size=200k") as disk,
        pytest.raises(
            SystemExit,
            match=r"kB are free on its disk, but 3 checkpoints of \d.* kB and a result of .* need",
        ),
    ):
        run.main(flags(1, data, disk / "out", **saving))


def test_a_trial_leaves_nothing(tmp_path):
    make_writable(tmp_path / "out" / "deep")
    assert not list((tmp_path / "out" / "deep").iterdir())


@pytest.mark.parametrize("stage", [1, 2])
def test_the_size_of_a_checkpoint_is_known_from_the_flags(tmp_path, data, stage):
    words = flags(stage, data, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    expected, result = sizes(parse_arguments(words))
    run.main(words)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    states = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt")["state"]
    moments = [state[name] for state in states.values() for name in ("exp_avg", "exp_avg_sq")]
    assert bytes_of(weights.values()) == result
    # ln_1 is saved and has no moments: it does not train.
    assert bytes_of([*weights.values(), *moments]) == pytest.approx(expected, rel=0.05)


def bytes_of(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def test_full_finetuning_needs_room_for_the_whole_model(tmp_path, data):
    whole = {"lora_enable": False, "vit_lora_enable": False, "vision_tower_lr": None}
    adapter, full = (
        sizes(parse_arguments(flags(2, data, tmp_path, **changes))) for changes in ({}, whole)
    )
    assert full[1] > 2 * adapter[1]
    assert full[0] == 3 * full[1]


def test_a_disk_that_fills_up_leaves_the_last_whole_checkpoint(tmp_path, data, monkeypatch):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    with mounted(tmp_path / "disk", "size=20m") as disk:
        words = flags(1, data, disk / "out", **saving)
        real = trainer.end_checkpoint

        def end_and_fill(path):
            real(path)
            free = shutil.disk_usage(disk).free
            (disk / "filler").write_bytes(b"x" * (free - (50 << 10)))

        monkeypatch.setattr(trainer, "end_checkpoint", end_and_fill)
        with pytest.raises(SystemExit) as error:
            run.main(words)
        told_at_once = str(error.value)
        assert "checkpoint-2 could not be saved" in told_at_once and "\n" not in told_at_once
        assert "checkpoint-1 is whole: the same command goes on from there" in told_at_once
        assert last_complete_checkpoint(disk / "out") == disk / "out" / "checkpoint-1"
        (disk / "filler").unlink()
        monkeypatch.setattr(trainer, "end_checkpoint", real)
        run.main(words)
        assert len(losses(disk / "out")) == 3
        assert [c.step for c in look(disk / "out").complete] == [3]


def test_too_little_shared_memory_for_the_workers_is_told(tmp_path, data):
    arguments = parse_arguments(flags(1, data, tmp_path / "out", dataloader_num_workers=4))
    check_shared_memory(arguments, 2, tmp_path)
    with mounted(tmp_path / "shm", "size=1m") as shared:
        with pytest.raises(OutputError, match=r"1.0 MB free, but 2 x 4 workers .* need 1.2 MB"):
            check_shared_memory(arguments, 2, shared)
        none = parse_arguments(flags(1, data, tmp_path / "out"))
        check_shared_memory(none, 2, shared)


@pytest.mark.parametrize(
    ("size", "words"), [(999, "999 B"), (1500, "1.5 kB"), (66_000_000, "66.0 MB"), (4e9, "4.0 GB")]
)
def test_sizes_are_told_in_words(size, words):
    assert told(size) == words
    assert room.told is told
