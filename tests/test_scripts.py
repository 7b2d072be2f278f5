"""The shell scripts: their flags parse, the global batch is kept, missing things are named."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from training import GOLDEN, REPO, write_data
from transformers import HfArgumentParser

from sqllava.train.arguments import (
    DataArguments,
    ModelArguments,
    TrainArguments,
    parse_arguments,
)

STAGES = {"pretrain_clu.sh": 256, "finetune_lora_clu_sq.sh": 128}


@pytest.fixture
def launchers(tmp_path):
    """Stand-ins for the launchers and nvidia-smi, which write down how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("deepspeed", "torchrun"):
        script = folder / name
        script.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" > "{tmp_path}/called"\n')
        script.chmod(0o755)
    return tmp_path


def gpus(launchers, count):
    script = launchers / "bin" / "nvidia-smi"
    script.write_text("#!/bin/sh\n" + "echo 'GPU 0: a'\n" * count)
    script.chmod(0o755)


def run_script(launchers, script, *extra, **variables):
    data = write_data(launchers / "data.json", "caption", count=4)
    environment = {
        "PATH": f"{launchers / 'bin'}:{os.environ['PATH']}",
        "MODEL": str(GOLDEN / "vicuna-tiny"),
        "VISION_TOWER": str(GOLDEN / "clip-tiny"),
        "DATA_PATH": str(data),
        "IMAGE_FOLDER": str(GOLDEN / "images"),
        "PRETRAIN": str(GOLDEN / "sqllava-pretrain"),
        "OUTPUT_DIR": str(launchers / "out"),
    } | variables
    done = subprocess.run(
        ["bash", str(REPO / "scripts" / script), *extra],
        env=environment,
        cwd=launchers,
        capture_output=True,
        text=True,
    )
    called = launchers / "called"
    return done, called.read_text().splitlines() if called.exists() else None


def flags_of(called):
    at = called.index("--deepspeed")
    return called[at:]


def value(called, flag):
    return called[called.index(flag) + 1]


@pytest.mark.parametrize("script", STAGES)
@pytest.mark.parametrize("count", [0, 1, 8])
def test_flags_parse_and_the_global_batch_is_kept(launchers, script, count):
    gpus(launchers, count)
    done, called = run_script(launchers, script)
    assert done.returncode == 0, done.stderr
    batch = int(value(called, "--per_device_train_batch_size"))
    accumulation = int(value(called, "--gradient_accumulation_steps"))
    assert batch * accumulation * max(count, 1) == STAGES[script]
    assert f"global batch {STAGES[script]} = {batch} per device" in done.stdout
    # bf16 and tf32 cannot be parsed where there is no GPU; all else must.
    words = flags_of(called)
    for flag in ("--bf16", "--tf32"):
        if flag in words:
            at = words.index(flag)
            words = words[:at] + words[at + 2 :]
    if count == 0:
        assert "--use_cpu" in words
    else:
        words += ["--use_cpu", "True"]
    words = [word for word in words if word != "--deepspeed"][1:]  # no process group in this test
    arguments = parse_arguments(words)
    assert arguments.train.num_train_epochs == 1
    assert arguments.train.warmup_steps == 0.03


def test_the_recipe_is_the_published_one(launchers):
    gpus(launchers, 8)
    _, stage1 = run_script(launchers, "pretrain_clu.sh")
    assert value(stage1, "--deepspeed").endswith("zero2.json")
    recipe = {"--learning_rate": "1e-3", "--vision_tower_lr": "2e-4", "--version": "plain"}
    assert all(value(stage1, flag) == expected for flag, expected in recipe.items())
    _, stage2 = run_script(launchers, "finetune_lora_clu_sq.sh")
    assert value(stage2, "--deepspeed").endswith("zero3.json")
    recipe = {
        "--learning_rate": "2e-4",
        "--mm_projector_lr": "2e-5",
        "--vision_tower_lr": "2e-5",
        "--lora_r": "128",
        "--lora_alpha": "256",
        "--sq_r": "0.5",
        "--version": "v1_sq",
        "--group_by_modality_length": "True",
    }
    assert all(value(stage2, flag) == expected for flag, expected in recipe.items())


def test_extra_arguments_are_passed_on_last(launchers):
    gpus(launchers, 1)
    _, called = run_script(launchers, "pretrain_clu.sh", "--max_steps", "7")
    assert called[-2:] == ["--max_steps", "7"]


def test_a_batch_that_does_not_divide_is_lowered_and_one_that_cannot_be_split_refused(launchers):
    gpus(launchers, 3)
    done, called = run_script(launchers, "pretrain_clu.sh", GLOBAL_BATCH="96", BATCH="20")
    assert value(called, "--per_device_train_batch_size") == "16"
    assert "BATCH=20 does not divide it; using 16" in done.stdout
    done, _ = run_script(launchers, "pretrain_clu.sh")
    assert done.returncode == 1
    assert "cannot be split over 3 processes; set it to a multiple, such as 258" in done.stderr


def test_visible_devices_are_counted(launchers):
    gpus(launchers, 8)
    _, called = run_script(launchers, "pretrain_clu.sh", CUDA_VISIBLE_DEVICES="2,5")
    assert value(called, "--include") == "localhost:2,5"
    assert value(called, "--gradient_accumulation_steps") == "4"


def test_several_nodes_by_hostfile_and_by_torchrun(launchers):
    gpus(launchers, 8)
    (launchers / "hosts").write_text("# nodes\nnode1 slots=8\nnode2 slots=8\n")
    _, called = run_script(launchers, "pretrain_clu.sh", HOSTFILE="hosts", BATCH="16")
    assert called[:3] == ["deepspeed", "--hostfile", "hosts"]
    assert value(called, "--gradient_accumulation_steps") == "1"
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29501"}
    _, called = run_script(launchers, "pretrain_clu.sh", BATCH="16", **nodes)
    assert called[0] == "torchrun" and value(called, "--node_rank") == "1"
    assert value(called, "--gradient_accumulation_steps") == "1"
    del nodes["NODE_RANK"]
    done, _ = run_script(launchers, "pretrain_clu.sh", **nodes)
    assert done.returncode != 0 and "set NODE_RANK on every node" in done.stderr


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("DATA_PATH", "stage 2's data is missing: ./none.*download_data.sh"),
        ("IMAGE_FOLDER", "the image folder is missing: ./none"),
        ("PRETRAIN", "stage 1's result is missing: ./none.*pretrain_clu.sh"),
        ("MODEL", "the language model is missing: ./none.*hf download"),
        ("VISION_TOWER", "the vision tower is missing: ./none"),
    ],
)
def test_what_is_missing_is_named_in_one_line(launchers, variable, message):
    done, called = run_script(launchers, "finetune_lora_clu_sq.sh", **{variable: "./none"})
    assert done.returncode == 1 and called is None
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(message, done.stderr)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_configs_are_of_their_stage(stage):
    for path in (REPO / "scripts").glob(f"zero{stage}*.json"):
        assert json.loads(path.read_text())["zero_optimization"]["stage"] == stage


def commands(path: Path) -> list[str]:
    """The shell commands of a Markdown file's code blocks."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", path.read_text(), flags=re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize(
    "path", [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_documented_commands_name_files_and_flags_that_exist(path):
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainArguments))
    known = set(parser._option_string_actions)
    for command in commands(path):
        for word in shlex.split(command, comments=True):
            if re.fullmatch(r"(scripts|demo|tests)/[\w./]+\.(sh|py|json)", word):
                assert (REPO / word).exists(), f"{path.name}: {command}"
            if word.startswith("--") and (
                "pretrain_clu" in command or "finetune" in command or "sqllava.train" in command
            ):
                assert word.split("=")[0] in known, f"{path.name}: {command}"


def test_what_one_script_has_installed_serves_another_that_asks_for_less(tmp_path):
    steps = "; ".join(
        f"use_environment {extras}" for extras in ("train,eval", "train", "eval,test")
    )
    done = subprocess.run(
        ["bash", "-euc", f'source scripts/env.sh; install_packages() {{ echo "$1"; }}; {steps}'],
        env={**os.environ, "VIRTUAL_ENV": str(tmp_path)},
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["train,eval", "eval,test"]


def test_a_lock_that_a_killed_compilation_left_is_removed_and_a_fresh_one_is_kept(tmp_path):
    old, new = (tmp_path / "torch_extensions" / name / "lock" for name in ("killed", "running"))
    for lock in (old, new):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (0, 0))
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_EXTENSIONS_DIR"}
    subprocess.run(
        ["bash", "-ec", "source scripts/env.sh; install_packages() { :; }; use_environment train"],
        env=environment | {"VIRTUAL_ENV": str(tmp_path)},
        cwd=REPO,
        check=True,
    )
    assert not old.exists()
    assert new.exists()


# --- what a script may remove


def quickstart(clone, output):
    """The quickstart with an interpreter that fails: it comes as far as its environment."""
    variables = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
    return subprocess.run(
        ["bash", "scripts/quickstart.sh"],
        env=variables | {"PYTHON": "/bin/false", "OUTPUT_DIR": str(output)},
        cwd=clone,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def clone(tmp_path):
    """The scripts and the demo in a folder of their own."""
    for name in ("scripts", "demo"):
        shutil.copytree(REPO / name, tmp_path / "clone" / name)
    return tmp_path / "clone"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("output", [".", "home", "home/data"])
def test_the_quickstart_leaves_a_folder_of_others_as_it_was(clone, output):
    for name in ("data/thesis.txt", "report/r.txt", "done/data", "logs/data.log"):
        file = clone / "home" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("precious")
    before = contents(clone)
    done = quickstart(clone, output)
    assert done.returncode == 1
    assert re.search(rf"error: OUTPUT_DIR={output} holds what .* not made", done.stderr)
    assert contents(clone) == before


def test_the_quickstart_removes_its_own_stale_results_and_no_others(clone, tmp_path):
    output = tmp_path / "out"
    quickstart(clone, output)
    for name in ("data", "stage1"):
        (output / name).mkdir()
        (output / name / ".quickstart").touch()
        (output / "done" / name).touch()
    (output / "made_from").write_text("other sources")
    (output / "self_qa").mkdir()
    quickstart(clone, output)
    assert {path.name for path in output.iterdir()} == {
        ".quickstart", "done", "logs", "made_from", "self_qa"
    }  # fmt: skip
    assert not list((output / "done").iterdir())
    # A folder of mine where its own would come later.
    (output / "demo").mkdir()
    (output / "demo" / "notes.txt").write_text("precious")
    (output / "made_from").write_text("other sources")
    done = quickstart(clone, output)
    assert done.returncode == 1 and f"{output}/demo is not what this script has made" in done.stderr
    assert (output / "demo" / "notes.txt").read_text() == "precious"


def test_an_environment_of_another_making_is_not_cleared(clone):
    conda = clone / ".venv" / "conda-meta" / "history"
    conda.parent.mkdir(parents=True)
    conda.write_text("precious")
    done = quickstart(clone, clone / "out")
    assert done.returncode != 0 and ".venv is no virtual environment" in done.stderr
    assert conda.read_text() == "precious"


# --- how a run ends


def ending(launchers, *lines):
    """How stage 1's script ends when its launcher does this."""
    gpus(launchers, 1)
    (launchers / "bin" / "deepspeed").write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    done, _ = run_script(launchers, "pretrain_clu.sh")
    return done


def test_the_first_process_to_die_has_the_last_word(launchers):
    done = ending(
        launchers,
        'echo "RuntimeError: Connection closed by peer" >"$SQLLAVA_LAST_WORDS/20-0.word"',
        'echo "error: captions.json, record 7: no image" >"$SQLLAVA_LAST_WORDS/10-1.word"',
        'echo "launcher: exits with return code = 1" >&2',
        "exit 1",
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "error: captions.json, record 7: no image (process 1)"


def test_a_launcher_that_was_killed_is_no_success(launchers):
    done = ending(launchers, 'touch "$SQLLAVA_LAST_WORDS/0.begun"', "exit 0")
    assert done.returncode == 1 and "ended before their end" in done.stderr
    done = ending(launchers, 'touch "$SQLLAVA_LAST_WORDS/0.begun" "$SQLLAVA_LAST_WORDS/0.done"')
    assert done.returncode == 0


def test_a_process_that_the_kernel_killed_is_named(launchers):
    done = ending(launchers, "exit 247")
    assert done.returncode == 247 and "killed by signal 9" in done.stderr.splitlines()[-1]
