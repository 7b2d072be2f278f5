"""Training processes and what starts them: they stop when asked, end together, and say what of."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training import GOLDEN, REPO, environment, flags, history, losses, start, write_data

from sqllava.train import run
from sqllava.train.output import last_complete_checkpoint, look
from sqllava.train.process import Stopped, whole_process

# A worker that says who it is, and does as a training process that is loading.
_WORKER = """
import os, time
from sqllava.train.process import end_with_launcher
end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""
_CALL = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(pids, seconds) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(map(alive, pids)):
            return True
        time.sleep(0.1)
    return False


def descendants(pid: int) -> list[int]:
    """A process and all that stem from it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found


def launched(*words, **variables) -> tuple[subprocess.Popen, int]:
    """Starts a command that starts a worker; gives the command's process and the worker's id."""
    process = subprocess.Popen(
        [*words, _WORKER],
        env=environment(LOCAL_RANK="0", **variables),
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_whose_launcher_dies_ends(by):
    launcher, worker = launched(sys.executable, "-c", _CALL)
    launcher.send_signal(by)
    assert ended([worker], 5)
    launcher.wait()


def test_a_worker_ends_when_only_deepspeeds_runner_dies():
    # As DeepSpeed does it: a runner starts a launcher, which starts the workers.
    runner, worker = launched(sys.executable, "-c", _CALL, _CALL + "# deepspeed.launcher.launch")
    (launcher,) = (pid for pid in descendants(runner.pid) if pid not in (runner.pid, worker))
    runner.kill()
    assert ended([worker], 5)
    assert ended([launcher], 5)
    runner.wait()


def test_a_process_that_nobody_launched_outlives_what_started_it():
    variables = environment()
    variables.pop("LOCAL_RANK", None)
    shell = subprocess.Popen(
        [sys.executable, "-c", _CALL, _WORKER], env=variables, stdout=subprocess.PIPE, text=True
    )
    worker = int(shell.stdout.readline())
    shell.kill()
    shell.wait()
    try:
        assert not ended([worker], 2.5)
    finally:
        os.kill(worker, signal.SIGKILL)


# --- scripts/processes.sh


def as_one(command: str) -> subprocess.Popen:
    script = f"set -euo pipefail; source scripts/processes.sh; as_one {command}"
    process = subprocess.Popen(
        ["bash", "-c", script], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("by", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_one_signal_to_a_script_ends_all_that_it_started(by, code):
    # A launcher that dies at once, and a child of its own that takes its time.
    child = "trap 'sleep 1; exit' TERM; echo ready; while :; do sleep 0.1; done"
    process = as_one(f'bash -c "bash -c \\"{child}\\"; true"')
    family = descendants(process.pid)
    assert len(family) > 2
    process.send_signal(by)
    assert process.wait(10) == code
    assert not any(map(alive, family))


def test_a_second_signal_kills_what_does_not_listen():
    process = as_one("bash -c \"trap '' TERM; echo ready; while :; do sleep 0.1; done\"")
    family = descendants(process.pid)
    process.terminate()
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    assert process.wait(5) == 143
    assert ended(family, 2)


@pytest.mark.parametrize("code", [0, 3])
def test_a_commands_own_exit_code_is_kept(code):
    process = as_one(f"bash -c 'echo ready; exit {code}'")
    assert process.wait(5) == code


# --- the last word


def test_a_process_leaves_what_it_dies_of_and_whether_it_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("SQLLAVA_LAST_WORDS", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    with whole_process():
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"1.begun", "1.done"}
    with pytest.raises(RuntimeError), whole_process():
        raise RuntimeError("a shard is missing")
    with pytest.raises(ValueError), whole_process():
        # as torch's loader brings it from a worker
        raise ValueError(
            "Caught ValueError\nTraceback (most recent call last)\n  ...\nValueError: bad"
        )
    with pytest.raises(SystemExit), whole_process():
        raise SystemExit("error: no such file")
    with pytest.raises(Stopped), whole_process():
        raise Stopped(signal.SIGTERM)
    words = [path.read_text() for path in sorted(tmp_path.glob("*-1.word"))]
    assert words == [
        "RuntimeError: a shard is missing\n",
        "ValueError: bad\n",
        "error: no such file\n",
    ]


# --- real runs

LONG = {"max_steps": 400, "save_strategy": "steps", "save_steps": 1000}


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the process ended without {text!r}")


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_from_which_the_losses_go_on(tmp_path, by):
    data = write_data(tmp_path / "mixed.json", "mixed")
    common = {"max_steps": 30, "group_by_modality_length": True, "save_strategy": "no"}
    run.main(flags(2, data, tmp_path / "whole", **common))
    words = flags(2, data, tmp_path / "cut", dataloader_num_workers=1, **common)
    process = start(words)
    wait_for(process, "'loss'")
    with pytest.raises(SystemExit, match=f"in use by process {process.pid} on"):
        run.main(words)
    process.send_signal(by)
    process.stdout.read()
    assert process.wait() == 128 + by
    checkpoint = last_complete_checkpoint(tmp_path / "cut")
    assert checkpoint and not (tmp_path / "cut" / "adapter_model.safetensors").exists()
    run.main(words)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ends = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cut", "whole")]
    assert all((ends[0][key] == value).all() for key, value in ends[1].items())


def script(tmp_path, port, *extra):
    """Stage 1 by its script: two processes with a loader's worker each, ZeRO-2."""
    values = {
        "MODEL": GOLDEN / "vicuna-tiny",
        "VISION_TOWER": GOLDEN / "clip-tiny",
        "DATA_PATH": write_data(tmp_path / "captions.json", "caption"),
        "IMAGE_FOLDER": GOLDEN / "images",
        "OUTPUT_DIR": tmp_path / "out",
        "NPROC": 2,
        "WORKERS": 1,
        "GLOBAL_BATCH": 4,
        "BATCH": 2,
        "NUM_LATENTS": 8,
        "CHECKPOINTING": False,
        "MASTER_PORT": port,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    words = ["--logging_steps", "1", "--max_steps", "2000", "--disable_tqdm", "True", *extra]
    return subprocess.Popen(
        ["bash", str(REPO / "scripts" / "pretrain_clu.sh"), *words],
        env=environment(**{name: str(value) for name, value in values.items()}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "whom", "code"),
    [
        (signal.SIGTERM, "script", 143),
        (signal.SIGINT, "script", 130),
        (signal.SIGKILL, "script", -9),
        (signal.SIGTERM, "runner", 143),
        (signal.SIGKILL, "launcher", 1),
    ],
)
def test_whoever_dies_all_processes_end_with_a_checkpoint_and_leave_nothing(
    tmp_path, by, whom, code
):
    port = random.randint(20000, 50000)
    process = script(tmp_path, port)
    wait_for(process, "'loss'")
    family = descendants(process.pid)
    at = {"script": 0, "runner": 1, "launcher": 2}[whom]
    os.kill(family[at], by)
    rest = process.stdout.read()
    assert process.wait() == code, rest
    assert ended(family, 20), rest
    (checkpoint,) = look(tmp_path / "out").complete
    assert checkpoint.resumable and checkpoint.step < 2000
    assert not list(Path("/dev/shm").glob(f"*_{port}_*"))


@pytest.mark.slow
def test_what_the_first_process_died_of_stands_last(tmp_path):
    process = script(tmp_path, random.randint(20000, 50000), "--image_folder", str(tmp_path))
    told = process.stdout.read().strip().splitlines()
    assert process.wait() != 0
    assert told[-1].startswith("error: ") and ".png" in told[-1] and "(process " in told[-1]


@pytest.mark.slow
@pytest.mark.parametrize("pack", ["off", "rows", "shared"])
def test_another_split_of_the_same_global_batch_goes_on_with_the_same_losses(tmp_path, pack):
    data = write_data(tmp_path / "mixed.json", "mixed")
    common = {
        "pack": pack,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "lora_dropout": 0,
        "lora_dropout_vit": 0,
        "group_by_modality_length": True,
    }
    out = tmp_path / "out"
    run.main(flags(2, data, out, per_device_train_batch_size=8, **common))
    whole = losses(out)
    shutil.rmtree(out / "checkpoint-6")
    (out / "adapter_model.safetensors").unlink()
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    run.main(flags(2, data, out, **split, **common))
    assert losses(out) == pytest.approx(whole, abs=1e-4)


@pytest.mark.slow
def test_steps_of_logging_and_saving_are_those_of_the_flags_after_a_resume(tmp_path):
    data = write_data(tmp_path / "captions.json", "caption")
    common = {"save_strategy": "steps", "max_steps": 6}
    run.main(flags(1, data, tmp_path / "out", save_steps=3, save_total_limit=1, **common))
    for name in ("sqllava_run.json", "adapter_model.safetensors"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "config.json").unlink()
    (tmp_path / "out" / "adapter_config.json").unlink()
    run.main(
        [
            *flags(
                1,
                data,
                tmp_path / "out",
                save_steps=2,
                logging_steps=2,
                **common | {"max_steps": 12},
            ),
            "--resume_from_checkpoint",
            "True",
        ]
    )
    assert [c.step for c in look(tmp_path / "out").complete] == [6, 8, 10, 12]
    assert [entry["step"] for entry in history(tmp_path / "out")][-3:] == [8, 10, 12]
