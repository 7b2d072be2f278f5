"""Generation: batches equal single questions, runs resume, shards merge, other models run too."""

import multiprocessing
import os
import random
import re
import shutil
import signal
import time

import pytest
import torch
from eval_data import GOLDEN, copy_tiny_model, lines, picture, read, write_all
from transformers import AutoTokenizer, GenerationConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as HubLlava

from sqllava.eval import cli
from sqllava.eval.answers import PreparedBatches, Shard
from sqllava.eval.engine import decoding_settings, model_id, open_engine
from sqllava.eval.plan import plan
from sqllava.eval.records import read_json
from sqllava.eval.score import headline
from sqllava.eval.tasks import TASKS
from sqllava.generation.decoding import Decoding

REPO = GOLDEN.parent.parent.parent
TOKENS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return copy_tiny_model(tmp_path_factory.mktemp("models") / "tiny-sqllava")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """transformers' own Llava, tiny and random, with settings that would sample."""
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "vicuna-tiny", trust_remote_code=False)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.pad_token = tokenizer.unk_token
    config = LlavaConfig(
        vision_config=read_json(GOLDEN / "clip-tiny/config.json")
        | {"model_type": "clip_vision_model"},
        text_config=read_json(GOLDEN / "vicuna-tiny/config.json"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = HubLlava(config)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 2:
                weights.mul_(8.0)
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=2, bos_token_id=1
    )
    model.save_pretrained(folder)
    images = LlavaImageProcessorPil.from_pretrained(GOLDEN / "clip-tiny")
    LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1).save_pretrained(folder)  # fmt: skip
    return folder


def words(task, root, model, answers, *more):
    folder = root / task.layout.folder
    return [
        *("run", task.name, "--model", str(model)),
        *("--questions", str(folder / task.layout.questions)),
        *("--images", str(folder / task.layout.images), "--answers", str(answers)),
        *("--max-new-tokens", str(TOKENS), "--workers", "0", *map(str, more)),
    ]


def answers_to(engine, questions, images, batch_size, tokens=TOKENS):
    """Each question's answer, in batches of the given size, without files."""
    decoding = Decoding(tokens)
    batches = plan(questions, range(len(questions)), batch_size, engine.costs(decoding))
    dataset = PreparedBatches(batches, questions, images, engine.prompter)
    found = {}
    for prepared in map(dataset.__getitem__, range(len(batches))):
        assert not prepared.errors
        numbers = [at for _, at in prepared.numbers()]
        rounds = engine.answers(prepared.inputs, numbers, decoding)
        for items, texts in zip(prepared.rounds, rounds, strict=True):
            found.update(zip(items, texts, strict=True))
    return [found[item] for item in range(len(questions))]


def answers_of(engine, task, root, batch_size):
    folder = root / task.layout.folder
    questions = task.read_questions(folder / task.layout.questions)
    asker = engine.for_task(task.template, task.image_preparation)
    return answers_to(asker, questions, folder / task.layout.images, batch_size)


@pytest.mark.parametrize("kind", ["ours", "hub"])
def test_batched_answers_equal_single_ones_for_every_task(kind, root, request):
    engine = open_engine(str(request.getfixturevalue(kind)))
    said = set()
    for task in TASKS.values():
        single = answers_of(engine, task, root, 1)
        assert answers_of(engine, task, root, 5) == single, task.name
        said |= set(single)
    assert len(said) > 20  # the model does not say the same whatever is asked


def test_every_task_runs_and_scores_in_one_command(root, ours, tmp_path, capsys):
    tasks = [task for task in TASKS.values() if task.headline != ("cider",)]
    data = tmp_path / "data"
    for task in tasks:
        shutil.copytree(root / task.layout.folder, data / task.layout.folder, dirs_exist_ok=True)
    more = ["--max-new-tokens", "2", "--workers", "0", "--output", str(tmp_path / "out")]
    cli.main(["run", "all", "--model", str(ours), "--data", str(data), *more])
    for task in tasks:
        rows = read(tmp_path / f"out/{task.name}.jsonl")
        questions = task.read_questions(data / task.layout.folder / task.layout.questions)
        assert [row["question_id"] for row in rows] == [q.question_id for q in questions]
        assert list(rows[0])[:6] == [
            *("question_id", "prompt", "text", "answer_id", "model_id", "metadata"),
        ]
        assert len(rows[0]["answer_id"]) == 22 and rows[0]["model_id"] == "tiny-sqllava"
        header = read_json(tmp_path / f"out/{task.name}.header.json")
        assert header["template"] == task.template
        assert header["image_preparation"] == task.image_preparation
        assert header["decoding"]["do_sample"] is False
        assert list(header["weights"]) == ["model.safetensors"]
        if task.layout.annotations and task.name not in ("llavabench", "mmvet"):
            score = read_json(tmp_path / f"out/{task.name}.score.json")
            assert isinstance(headline(task, score["metrics"]), float)
            assert score["settings"]["run"] == header
    report = read_json(tmp_path / "out/report.json")
    assert {row["task"] for row in report["table"]} >= {"gqa", "pope", "mme", "seed", "mmbench"}
    page = (tmp_path / "out/report.html").read_text()
    assert 'src="data:image/jpeg;base64,' in page and "{{" not in page
    assert "picture not found" not in page
    assert "| POPE (COCO) | f1_mean % |" in (tmp_path / "out/report.md").read_text()


def test_a_hub_model_runs_through_the_command(root, hub, tmp_path):
    cli.main(words(TASKS["scienceqa"], root, hub, tmp_path / "a.jsonl", "--batch-size", 3))
    cli.main(words(TASKS["scienceqa"], root, hub, tmp_path / "b.jsonl", "--batch-size", 1))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert read_json(tmp_path / "a.header.json")["template"] == "USER/ASSISTANT"


def test_what_a_hub_model_does_not_take_is_told(root, hub, tmp_path, caplog):
    more = ["--conv-mode", "v1", "--image-preparation", "crop", "--limit", "1"]
    cli.main(words(TASKS["scienceqa"], root, hub, tmp_path / "a.jsonl", *more))
    assert "template 'v1' is not used" in caplog.text
    assert "image preparation 'crop' is not used" in caplog.text


def test_nothing_of_a_models_sampling_settings_is_left(hub):
    engine = open_engine(str(hub))
    assert engine.model.generation_config.repetition_penalty in (None, 1.0)
    batch = engine.prompter.batch(["What is it?"], [None])
    assert len({engine.answer(batch, Decoding(8))[0] for _ in range(3)}) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "0.2"], "need --do-sample"),
        (["--top-p", "0.9"], "need --do-sample"),
        (["--do-sample"], "a temperature above 0"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, found 0"),
    ],
)
def test_sampling_is_never_an_accident(root, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(words(TASKS["gqa"], root, "no-model", tmp_path / "a.jsonl", *flags))


def test_the_header_records_decoding_as_ever():
    """With these keys in this order: answers that were begun before go on."""
    greedy = {"max_new_tokens": 8, "do_sample": False, "temperature": None, "top_p": None}
    assert list(decoding_settings(Decoding(8)).items()) == list(greedy.items())
    sampled = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.2, "top_p": 0.9}
    assert decoding_settings(Decoding(8, temperature=0.2, top_p=0.9)) == sampled
    assert decoding_settings(Decoding(8, num_beams=2)) == greedy | {"num_beams": 2}


def test_sampling_is_recorded(root, ours, tmp_path):
    more = ["--do-sample", "--temperature", "0.2", "--top-p", "0.9"]
    cli.main(words(TASKS["gqa"], root, ours, tmp_path / "a.jsonl", *more))
    assert read_json(tmp_path / "a.header.json")["decoding"]["temperature"] == 0.2


# --- shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 8, 12])
def test_shards_cover_everything_once(count):
    shards = [list(Shard(index, count).items(10)) for index in range(count)]
    assert [item for items in shards for item in items] == list(range(10))
    if count == 8:
        assert [len(items) for items in shards] == [2, 2, 2, 2, 2, 0, 0, 0]


def test_ten_items_in_eight_chunks(ours, tmp_path):
    """As published, chunks 5 to 7 get nothing: their files are empty, and all goes well."""
    questions = lines(
        tmp_path / "q.jsonl", [{"question_id": 7, "text": f"What, {n}?"} for n in range(10)]
    )
    for index in (7, 5, 6, 0, 1, 2, 3, 4):
        assert not (tmp_path / "a.jsonl").exists()
        cli.main(
            ["run", "pope", "--model", str(ours), "--questions", str(questions)]
            + ["--answers", str(tmp_path / "a.jsonl"), "--max-new-tokens", "2", "--workers", "0"]
            + ["--num-chunks", "8", "--chunk-idx", str(index)]
        )
    parts = tmp_path / "a.jsonl.parts"
    assert sorted(path.name for path in parts.iterdir()) == [f"8_{n}.jsonl" for n in range(8)]
    assert (parts / "8_6.jsonl").read_bytes() == b""
    # The ids are all the same: answers go by the question's place.
    prompts = [row["prompt"] for row in read(tmp_path / "a.jsonl")]
    assert prompts == [f"What, {n}?" for n in range(10)]
    (tmp_path / "a.jsonl").unlink()
    merging = ["--questions", str(questions), "--answers", str(tmp_path / "a.jsonl")]
    cli.main(["merge", "pope", *merging])
    assert [row["prompt"] for row in read(tmp_path / "a.jsonl")] == prompts
    (parts / "8_2.jsonl").write_text("")
    with pytest.raises(SystemExit, match="not all answers are there"):
        cli.main(["merge", "pope", *merging])


# --- resuming -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """300 questions of several lengths, some about a picture."""
    folder = tmp_path_factory.mktemp("many")
    rng = random.Random(1)
    rows = []
    for n in range(300):
        text = "What is it" + " there" * rng.randrange(6) + f", {n}?"
        row = {"question_id": n % 100, "text": text}
        if n % 3:
            row["image"] = f"{n % 4}.jpg"
        rows.append(row)
    for n in range(4):
        picture(folder / f"{n}.jpg", n)
    return lines(folder / "q.jsonl", rows)


def command(many, model, answers):
    return [
        *("run", "pope", "--model", str(model), "--questions", str(many)),
        *("--images", str(many.parent), "--answers", str(answers)),
        *("--max-new-tokens", "6", "--batch-size", "4", "--workers", "0"),
    ]


def shard_process(words, rank):
    """One of two processes, as torchrun would start them; forked, as imports take seconds."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    cli.main(words)


@pytest.mark.slow
def test_killed_at_five_moments_two_shards_give_the_same_file(many, ours, tmp_path):
    cli.main(command(many, ours, tmp_path / "whole.jsonl"))
    answers, rng, kills = tmp_path / "killed.jsonl", random.Random(2), 0
    parts = tmp_path / "killed.jsonl.parts"

    def written():
        return sum(path.stat().st_size for path in parts.glob("*.jsonl")) if parts.exists() else 0

    while not answers.exists():
        shards = [
            multiprocessing.get_context("fork").Process(
                target=shard_process, args=(command(many, ours, answers), rank)
            )
            for rank in range(2)
        ]
        for shard in shards:
            shard.start()
        if kills < 5:
            before = written()
            while written() == before and any(shard.is_alive() for shard in shards):
                time.sleep(0.01)
            time.sleep(rng.random() * 0.1)
            for shard in shards:
                shard.kill()
            kills += 1
        for shard in shards:
            shard.join(timeout=300)
        assert all(shard.exitcode in (0, -signal.SIGKILL) for shard in shards)
        assert kills == 5 or not answers.exists()
    assert answers.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_torn_line_is_written_again_and_nothing_twice(root, ours, tmp_path):
    task, answers = TASKS["pope"], tmp_path / "a.jsonl"
    cli.main(words(task, root, ours, answers, "--batch-size", 4))
    whole = answers.read_bytes()
    part = tmp_path / "a.jsonl.parts/1_0.jsonl"
    content = part.read_bytes()
    for kept in (len(content) - 7, len(content) // 2, 0):
        part.write_bytes(content[:kept])
        answers.unlink()
        cli.main(words(task, root, ours, answers, "--batch-size", 4))
        assert answers.read_bytes() == whole
        assert len(part.read_bytes()) == len(content)


def test_a_run_goes_on_with_another_number_of_shards(root, ours, tmp_path):
    task, answers = TASKS["pope"], tmp_path / "a.jsonl"
    cli.main(words(task, root, ours, answers, "--num-chunks", 3, "--chunk-idx", 1))
    assert not answers.exists()
    cli.main(words(task, root, ours, answers))
    cli.main(words(task, root, ours, tmp_path / "b.jsonl"))
    assert answers.read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert len(read(tmp_path / "a.jsonl.parts/1_0.jsonl")) == 8


def test_other_settings_do_not_go_on_with_old_answers(root, ours, tmp_path):
    task, answers = TASKS["gqa"], tmp_path / "a.jsonl"
    cli.main(words(task, root, ours, answers))
    before = answers.read_bytes()
    with pytest.raises(
        SystemExit, match=r"begun with other settings \(template: 'v1' then, 'v1_sq'"
    ):
        cli.main(words(task, root, ours, answers, "--conv-mode", "v1_sq"))
    assert answers.read_bytes() == before
    cli.main(words(task, root, ours, answers, "--conv-mode", "vicuna_v1"))
    cli.main(words(task, root, ours, answers, "--conv-mode", "v1_sq", "--overwrite"))
    assert read_json(tmp_path / "a.header.json")["template"] == "v1_sq"


def test_two_processes_do_not_write_one_chunk(root, ours, tmp_path):
    import fcntl

    parts = tmp_path / "a.jsonl.parts"
    parts.mkdir()
    with open(parts / "1_0.jsonl", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for more in ([], ["--overwrite"]):
            with pytest.raises(SystemExit, match="another process is writing this chunk"):
                cli.main(words(TASKS["gqa"], root, ours, tmp_path / "a.jsonl", *more))
        assert (parts / "1_0.jsonl").exists()  # not taken away from under its writer


# --- pictures -------------------------------------------------------------------------------------


def test_a_bad_picture_is_an_error_or_marked(root, ours, tmp_path):
    task = TASKS["pope"]
    data = tmp_path / "data"
    shutil.copytree(root / "pope", data / "pope")
    (data / "pope/val2014/COCO_val2014_000000000002.jpg").write_bytes(b"not a picture")
    answers = tmp_path / "a.jsonl"
    with pytest.raises(SystemExit, match=r"record \d+ \(question \d+\): .*000002.jpg.*bad-images"):
        cli.main(words(task, data, ours, answers))
    # As the message says: what was answered stays, and the run goes on.
    more = ["--bad-images", "mark", "--annotations", data / "pope/coco"]
    cli.main(words(task, data, ours, answers, *more))
    marked = [row for row in read(answers) if row["metadata"]]
    assert len(read(answers)) == 12 and len(marked) == 3
    assert all(row["text"] == "" and "000002.jpg" in row["metadata"]["error"] for row in marked)
    assert read_json(tmp_path / "a.score.json")["counts"]["failed_images"] == 3


def test_questions_whose_file_holds_no_picture_are_marked(root, ours, tmp_path):
    rows = read(root / "pope/llava_pope_test.jsonl")[:3]
    rows[2]["image"] = [rows[0]["image"], rows[1]["image"]]
    rows[1]["image"] = [rows[1]["image"]]
    questions = lines(tmp_path / "q.jsonl", rows)
    answers = tmp_path / "a.jsonl"
    given = ["run", "gqa", "--model", ours, "--questions", questions, "--answers", answers]
    given = [str(word) for word in (*given, "--images", root / "pope/val2014", "--workers", 0)]
    with pytest.raises(SystemExit, match=r"record 3 \(question 3\): .*about 2 pictures; one can"):
        cli.main(given)
    cli.main([*given, "--bad-images", "mark"])
    assert ["error" in row["metadata"] for row in read(answers)] == [False, False, True]


@pytest.mark.parametrize("kind", ["ours", "hub"])
def test_questions_that_no_model_reads_are_told(kind, root, tmp_path, request, caplog):
    rows = read(root / "pope/llava_pope_test.jsonl")[:2]
    model, context = request.getfixturevalue(kind), 2048
    rows[1]["text"] = "What color? " * context
    questions, answers = lines(tmp_path / "q.jsonl", rows), tmp_path / "a.jsonl"
    given = ["run", "gqa", "--model", model, "--questions", questions, "--answers", answers]
    given += ["--images", root / "pope/val2014", "--workers", 0, "--max-new-tokens", 1]
    cli.main([str(word) for word in given])
    told = [record.getMessage() for record in caplog.records if "do not trust" in record.msg]
    assert len(told) == 1
    assert re.match(
        rf"question {rows[1]['question_id']}: .* \d{{4,5}} tokens, .* reads \d+", told[0]
    )

    rows[1]["text"] = "What \ud83d?"
    lines(tmp_path / "q.jsonl", rows)
    half = r"q\.jsonl, record 2 \(question \d+\): character 6 of its text is half a surrogate pair"
    with pytest.raises(SystemExit, match=half):
        cli.main([str(word) for word in (*given, "--overwrite")])


def test_parts_that_are_none_are_told(root, ours, tmp_path):
    task, answers = TASKS["gqa"], tmp_path / "a.jsonl"
    for text, message in (
        ("[1]", "1_0.jsonl: a JSON list where"),
        ('{"question_id": "00"}', "1_0.jsonl: no 'item'"),
        ('{"item": -1}', "item -1 answers another question"),
        ('{"item": 0}', "item 0 answers another question"),
        ("\xff", "1_0.jsonl: not JSON"),
    ):
        part = answers.with_name("a.jsonl.parts") / "1_0.jsonl"
        part.parent.mkdir(exist_ok=True)
        part.write_text(text + "\n", encoding="latin-1")
        questions = str(root / task.layout.folder / task.layout.questions)
        with pytest.raises(SystemExit) as left:
            cli.main(["merge", "gqa", "--questions", questions, "--answers", str(answers)])
        assert message in str(left.value)


def test_pictures_are_read_in_workers(root, ours, tmp_path):
    cli.main(words(TASKS["gqa"], root, ours, tmp_path / "a.jsonl", "--workers", 2))
    cli.main(words(TASKS["gqa"], root, ours, tmp_path / "b.jsonl"))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_pad_and_crop_differ_and_are_recorded(root, ours, tmp_path):
    engine = open_engine(str(ours))
    from PIL import Image

    wide = Image.new("RGB", (90, 30), (200, 10, 10))
    padded, cropped = (
        engine.for_task("v1", how).prompter.batch(["What?"], [wide]).pixels
        for how in ("pad", "crop")
    )
    assert padded.shape == cropped.shape and not torch.equal(padded, cropped)
    assert torch.equal(padded[0, :, 28], engine.processor.prepare_image(wide)[:, 28])


def test_model_ids():
    assert model_id("runs/sqllava-7b/") == "sqllava-7b"
    assert model_id("runs/sqllava-7b/checkpoint-200") == "sqllava-7b_checkpoint-200"


def test_errors_before_anything_is_loaded(root, tmp_path):
    with pytest.raises(SystemExit, match="go together"):
        cli.main(words(TASKS["gqa"], root, "m", tmp_path / "a", "--num-chunks", 2))
    with pytest.raises(SystemExit, match="chunk 2 is not one of 0 to 1"):
        cli.main(
            words(TASKS["gqa"], root, "m", tmp_path / "a", "--num-chunks", 2, "--chunk-idx", 2)
        )
    with pytest.raises(SystemExit, match="give --questions and --answers, or --data"):
        cli.main(["run", "gqa", "--model", "m"])
    with pytest.raises(SystemExit, match="no question file .*sqllava eval list gqa"):
        cli.main(["run", "gqa", "--model", "m", "--data", str(tmp_path)])
