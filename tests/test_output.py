"""An output folder's rule: what goes on, what is refused, and that nothing of others is touched."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training import environment, flags, write_data

from sqllava.checkpoint.stamp import stamp_model
from sqllava.model.card import RUN_FILE, training_facts
from sqllava.train import output, run
from sqllava.train.arguments import parse_arguments
from sqllava.train.output import (
    COMPLETE,
    Checkpoint,
    Found,
    OutputError,
    begin_checkpoint,
    decide,
    differences,
    end_checkpoint,
    in_the_way,
    last_complete_checkpoint,
    locked,
    look,
    outdated,
    read_checkpoint,
    read_record,
    remove,
    resume_choice,
    sweep,
    write_record,
)


@pytest.fixture(scope="module", autouse=True)
def without_flushing():
    """Nothing here is pulled the plug on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record of a run of stage 2 that saves checkpoints."""
    folder = tmp_path_factory.mktemp("record")
    return make(folder)


def make(folder, **changes):
    data = folder / "mixed.json"
    if not data.exists():
        write_data(data, "mixed", count=8)
    words = flags(2, changes.pop("data_path", data), folder / "out", **changes)
    return run.make_record(parse_arguments(words))


def save(folder, step, record, resumable=True, complete=True):
    path = folder / f"checkpoint-{step}"
    begin_checkpoint(path, step, record, resumable)
    (path / "adapter_model.safetensors").write_text("weights")
    if complete:
        end_checkpoint(path)
    return path


def finish(folder, record, step=3):
    (folder / "adapter_model.safetensors").write_text("weights")
    (folder / "config.json").write_text("{}")
    write_record(replace(record, finished=step), folder)


# --- the recipe


@pytest.mark.parametrize(
    ("changes", "name", "then", "now"),
    [
        ({"learning_rate": 1e-5}, "--learning_rate", 0.001, 1e-5),
        ({"vision_tower_lr": 1e-5}, "--vision_tower_lr", 2e-4, 1e-5),
        ({"lora_alpha": 16}, "--lora_alpha", 8, 16),
        ({"lora_r": 8}, "--lora_r", 4, 8),
        ({"lora_dropout": 0.5}, "--lora_dropout", 0.05, 0.5),
        ({"seed": 1}, "--seed", 42, 1),
        ({"sq_r": 0.25}, "--sq_r", 0.5, 0.25),
        ({"model_max_length": 512}, "--model_max_length", 2048, 512),
        ({"per_device_train_batch_size": 2}, "global batch", 4, 2),
        ({"gradient_accumulation_steps": 2}, "global batch", 4, 8),
        ({"weight_decay": 0.1}, "--weight_decay", 0.0, 0.1),
        ({"lr_scheduler_type": "constant"}, "--lr_scheduler_type", "linear", "constant"),
        ({"group_by_modality_length": True}, "--group_by_modality_length", False, True),
        ({"version": "v1", "sq_r": None}, "--version", "v1_sq", "v1"),
        ({"image_aspect_ratio": "crop"}, "--image_aspect_ratio", "pad", "crop"),
        ({"num_latents": 4}, "--num_latents", 8, 4),
        ({"vit_lora_enable": False, "vision_tower_lr": None}, "--vit_lora_enable", True, False),
        ({"jpeg_draft": True}, "--jpeg_draft", False, True),
        ({"max_grad_norm": 0.5}, "--max_grad_norm", 1.0, 0.5),
        ({"max_steps": 2}, "--max_steps", 3, 2),
    ],
)
def test_what_changes_the_result_is_named_with_both_values(
    tmp_path, record, changes, name, then, now
):
    found = {d.name: d for d in differences(record, make(tmp_path, **changes))}
    assert (found[name].then, found[name].now) == (then, now)


@pytest.mark.parametrize(
    "changes",
    [
        {"logging_steps": 10, "report_to": "tensorboard", "disable_tqdm": False, "run_name": "x"},
        {"save_strategy": "steps", "save_steps": 7, "save_total_limit": 3},
        {"dataloader_num_workers": 2, "dataloader_pin_memory": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"attn_implementation": "sdpa"},
        {"bad_samples": "skip", "max_bad_samples": 5},
        {"num_train_epochs": 9},  # without a meaning beside --max_steps
        {"overwrite_output_dir": True},
    ],
)
def test_what_does_not_change_the_result_may_change_freely(tmp_path, record, changes):
    assert differences(record, make(tmp_path, **changes)) == []


def test_every_flag_that_is_free_is_one():
    known = {field for kind in _kinds() for field in kind.__dataclass_fields__}
    derived = {"train_batch_size", "eval_batch_size", "include_tokens_per_second"}
    assert output._FREE - derived <= known


def _kinds():
    from sqllava.train.arguments import TrainArguments
    from sqllava.train.flags import DataArguments, ModelArguments

    return ModelArguments, DataArguments, TrainArguments


def test_a_default_and_the_same_value_given_are_one(tmp_path):
    assert differences(make(tmp_path, sq_r=None), make(tmp_path, sq_r=0.3)) == []


def test_moved_data_are_the_same_and_changed_data_in_place_are_not(tmp_path):
    before = make(tmp_path)
    moved = tmp_path / "moved" / "other-name.json"
    moved.parent.mkdir()
    moved.write_bytes((tmp_path / "mixed.json").read_bytes())
    assert differences(before, make(tmp_path, data_path=moved)) == []
    content = (tmp_path / "mixed.json").read_text()
    stat = (tmp_path / "mixed.json").stat()
    (tmp_path / "mixed.json").write_text(content.replace("mixed-3", "mixed-9"))
    os.utime(tmp_path / "mixed.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (change,) = differences(before, make(tmp_path))
    assert change.name == "--data_path"


def test_another_base_under_the_same_name_is_told(tmp_path, golden):
    base = tmp_path / "base"
    base.mkdir()
    for file in (golden / "vicuna-tiny").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    before = make(tmp_path, model_name_or_path=base)
    assert differences(before, make(tmp_path)) == []  # the same model in another place
    weights = next(base.glob("*.bin"))
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    (change,) = differences(before, make(tmp_path, model_name_or_path=base))
    assert change.name == "--model_name_or_path"


def test_a_large_weight_file_is_told_from_another_training_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sqllava.checkpoint.stamp._READ_WHOLE", 1 << 16)
    monkeypatch.setattr("sqllava.checkpoint.stamp._SAMPLE", 64)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(os.urandom(1 << 20))
    first = stamp_model(str(tmp_path))
    assert stamp_model(str(tmp_path)) == first
    weights.write_bytes(os.urandom(1 << 20))
    assert stamp_model(str(tmp_path)) != first


def test_zero_stage_and_processes_are_part_of_the_recipe(record):
    two, three = ({"zero_optimization": {"stage": n}, "steps_per_print": n} for n in (2, 3))
    then, now = replace(record, deepspeed=two), replace(record, deepspeed=three, world_size=2)
    assert [str(change) for change in differences(then, now)] == [
        "global batch: 4 then, 8 now",
        "processes: 1 then, 2 now",
        "zero_optimization.stage in --deepspeed: 2 then, 3 now",
    ]


def test_a_record_is_read_back_as_it_was_and_serves_the_model_card(tmp_path, record):
    write_record(record, tmp_path)
    assert read_record(tmp_path) == record
    assert training_facts(tmp_path)["learning_rate"] == 0.001


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_a_run_file_of_any_other_shape_is_not_ours(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("shape")
    (folder / RUN_FILE).write_text(json.dumps(value))
    assert read_record(folder) is None


# --- what lies there


def test_only_what_bears_our_mark_under_its_own_name_is_ours(tmp_path, record):
    ours = save(tmp_path, 2, record)
    for name in ("checkpoint-best", "checkpoint-2-llava-lora", "checkpoint-7", "checkpoint-002"):
        copy = tmp_path / name
        copy.mkdir()
        for file in ours.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    (tmp_path / "checkpoint-5198").mkdir()
    (tmp_path / "checkpoint-5198" / COMPLETE).touch()
    (tmp_path / "checkpoint-backup").write_text("a file")
    (tmp_path / "checkpoint-3").symlink_to(ours)
    found = look(tmp_path)
    assert [c.path for c in found.checkpoints] == [ours]
    assert len(found.strangers) == 7
    assert last_complete_checkpoint(tmp_path) == ours


def test_an_unfinished_checkpoint_of_ours_goes_and_nothing_else(tmp_path, record):
    save(tmp_path, 2, record)
    half = save(tmp_path, 4, record, complete=False)
    (tmp_path / "checkpoint-6").mkdir()
    plan = decide(look(tmp_path), record, None, False)
    assert (plan.kind, plan.checkpoint) == ("resume", tmp_path / "checkpoint-2")
    assert plan.remove == (half,)
    remove(plan.remove)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]


_NAMES = st.from_regex(r"checkpoint-[0-9a-z-]{0,6}", fullmatch=True)


@settings(max_examples=30, deadline=None)
@given(names=st.sets(_NAMES, max_size=6), steps=st.sets(st.integers(0, 30), max_size=4))
def test_nothing_of_others_is_ever_removed(tmp_path_factory, record, names, steps):
    folder = tmp_path_factory.mktemp("life")
    for step in steps:
        save(folder, step, record, complete=step % 3 != 0)
    others = [folder / name for name in names if not (folder / name).exists()]
    for path in others:
        path.mkdir()
        (path / COMPLETE).touch()
        (path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        remove(decide(look(folder), record, None, overwrite).remove)
        remove(outdated(look(folder).complete, 1, None))
        assert all((path / "notes.txt").exists() for path in others)
    assert not look(folder).checkpoints


def test_a_folder_of_others_in_the_way_is_named_and_kept(tmp_path, record):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-400").mkdir()
    assert in_the_way(look(tmp_path).strangers, 10) == [tmp_path / "checkpoint-4"]
    with pytest.raises(OutputError, match="checkpoint-4: not of this program's making"):
        begin_checkpoint(tmp_path / "checkpoint-4", 4, record, True)


def test_the_limit_keeps_the_newest_and_the_best(tmp_path, record):
    paths = [save(tmp_path, step, record) for step in (2, 4, 6, 10)]
    complete = look(tmp_path).complete
    assert outdated(complete, None, None) == []
    assert outdated(complete, 2, None) == paths[:2]
    assert outdated(complete, 1, str(paths[0])) == paths[1:3]
    assert outdated([], 1, None) == []


# --- the rule


def test_an_empty_folder_starts(tmp_path, record):
    assert decide(look(tmp_path), record, None, False).kind == "start"
    assert decide(look(tmp_path / "none"), record, False, False).kind == "start"


def test_the_same_finished_run_has_nothing_to_do_and_says_so(tmp_path, record):
    finish(tmp_path, record)
    plan = decide(look(tmp_path), record, None, False)
    assert (
        plan.kind == "finished"
        and "finished, with the same recipe and data, at step 3" in plan.note
    )


def test_a_finished_run_of_other_data_and_rate_is_refused_with_both_values(tmp_path, record):
    finish(tmp_path, record)
    write_data(tmp_path / "other.json", "text", count=8)
    now = make(tmp_path, data_path=tmp_path / "other.json", learning_rate=1e-5)
    with pytest.raises(OutputError) as error:
        decide(look(tmp_path), now, None, False)
    told = str(error.value)
    assert "\n" not in told
    assert "--learning_rate: 0.001 then, 1e-05 now" in told
    assert "mixed.json" in told and "other.json" in told
    assert "--overwrite_output_dir True" in told and "another --output_dir" in told
    plan = decide(look(tmp_path), now, None, True)
    assert plan.kind == "start"
    assert {p.name for p in plan.remove} == {"sqllava_run.json", "adapter_model.safetensors"}


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path, record):
    save(tmp_path, 2, record)
    with pytest.raises(
        OutputError, match="checkpoint-2 of another making .--lora_alpha: 8 then, 16"
    ):
        decide(look(tmp_path), replace_flag(record, "lora_alpha", 16), None, False)


def replace_flag(record, name, value):
    return replace(record, training=record.training | {name: value})


def test_a_longer_run_goes_on_only_when_asked_to(tmp_path, record):
    save(tmp_path, 3, record)
    longer, shorter = (replace_flag(record, "max_steps", n) for n in (6, 2))
    with pytest.raises(
        OutputError, match="--resume_from_checkpoint True to go on from checkpoint-3"
    ):
        decide(look(tmp_path), longer, None, False)
    plan = decide(look(tmp_path), longer, True, False)
    assert plan.kind == "resume" and "learning rate is that of the longer schedule" in plan.note
    with pytest.raises(OutputError, match="--max_steps: 3 then, 2 now"):
        decide(look(tmp_path), shorter, True, False)
    finish(tmp_path, record)
    plan = decide(look(tmp_path), longer, True, False)
    assert plan.checkpoint == tmp_path / "checkpoint-3"
    assert tmp_path / RUN_FILE in plan.remove  # the old result is not that of the longer run


@pytest.mark.parametrize(
    ("given", "meant"),
    [(None, None), ("True", True), ("true", True), ("False", False), ("no", False)],
)
def test_words_of_resume_from_checkpoint(given, meant):
    assert resume_choice(given) is meant


def test_resume_from_checkpoint_true_false_and_a_path(tmp_path, record):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    with pytest.raises(OutputError, match="True, but .* holds no checkpoint"):
        decide(look(here), record, True, False)
    second, fourth = (save(there, step, record) for step in (2, 4))
    assert decide(look(there), record, True, False).checkpoint == fourth
    with pytest.raises(OutputError, match="False, but .* holds checkpoint-4"):
        decide(look(there), record, False, False)
    assert decide(look(here), record, resume_choice(str(second)), False).checkpoint == second
    with pytest.raises(OutputError, match="later checkpoints than .*checkpoint-2 .checkpoint-4."):
        decide(look(there), record, second, False)
    with pytest.raises(OutputError, match="no such folder"):
        decide(look(here), record, tmp_path / "none", False)
    with pytest.raises(
        OutputError, match="no checkpoint of this program's.*in it are .*checkpoint-2"
    ):
        decide(look(here), record, there, False)
    with pytest.raises(OutputError, match="exclude each other"):
        decide(look(there), record, True, True)


def test_weights_alone_are_not_resumed_from(tmp_path, record):
    save(tmp_path, 2, record, resumable=False)
    with pytest.raises(OutputError, match="checkpoint-2 was saved with --save_only_model True"):
        decide(look(tmp_path), record, None, False)
    assert decide(look(tmp_path), record, None, True).kind == "start"


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "model.safetensors"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_model_of_others_is_not_written_over(tmp_path, record, name, overwrite):
    (tmp_path / name).write_text("{}")
    with pytest.raises(OutputError, match=f"not of this run's making .{name}"):
        decide(look(tmp_path), record, None, overwrite)


def test_a_converted_model_is_no_result_of_a_run(tmp_path, record):
    finish(tmp_path, record)
    (tmp_path / "sqllava_convert.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not of this run's making"):
            decide(look(tmp_path), record, None, overwrite)


def test_a_record_of_an_older_form_counts_as_that_of_others(tmp_path, record):
    (tmp_path / "adapter_model.safetensors").write_text("weights")
    older = asdict(record)
    del older["inputs"]
    (tmp_path / RUN_FILE).write_text(json.dumps(older))
    with pytest.raises(OutputError, match="not of this run's making"):
        decide(look(tmp_path), record, None, False)


def test_a_checkpoint_that_is_saved_again_is_not_whole_in_between(tmp_path, record):
    path = save(tmp_path, 2, record)
    begin_checkpoint(path, 2, record, True)
    assert not (path / COMPLETE).exists() and not (path / "adapter_model.safetensors").exists()
    assert read_checkpoint(path) == Checkpoint(path, 2, read_record(path), False)


@pytest.mark.parametrize("saved_before", [False, True])
def test_a_kill_at_any_moment_of_beginning_or_removing_leaves_no_stranger(
    tmp_path, record, monkeypatch, saved_before
):
    """Each call of the system that changes the disk is the last one, in turn."""

    class Killed(BaseException):
        pass

    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = save(folder, 2, record) if saved_before else folder / "checkpoint-2"
        left = iter(range(number))

        def dying(work, left=left):
            def call(*given, **named):
                if next(left, None) is None:
                    raise Killed
                return work(*given, **named)

            return call

        with monkeypatch.context() as patch:
            for name in ("mkdir", "unlink", "rmdir", "rename", "replace"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                begin_checkpoint(path, 2, record, True)
                remove([path])
                done = True
            except Killed:
                done = False
        assert look(folder).strangers == ()
        sweep(folder)
        assert [entry.name for entry in folder.iterdir()] in ([], ["checkpoint-2"])
        if done:
            assert number > 4 and not path.exists()
            return
    pytest.fail("it never came to its end")


def test_found_knows_a_result_only_when_it_is_there(tmp_path, record):
    write_record(replace(record, finished=3), tmp_path)
    found = look(tmp_path)
    assert isinstance(found, Found) and found.finished is None  # the weights were taken away


# --- one at a time

_HOLD = """
import sys, time
from pathlib import Path
from sqllava.train.output import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_and_freed_when_that_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(OutputError, match=rf"in use by process {holder.pid} on \S+: wait"),
        locked(tmp_path),
    ):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path) as has_locks:
        assert has_locks
