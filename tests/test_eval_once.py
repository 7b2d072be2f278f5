"""Evaluation reads each picture once, and says what one question at a time says."""

import base64
import random
import weakref
from dataclasses import replace

import pytest
import torch
from eval_data import copy_tiny_model, lines, picture, read
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sqllava import conversation
from sqllava.conversation import TEMPLATES, Template, Turn, form, get_template
from sqllava.encoding import encode_prompt
from sqllava.eval import cli
from sqllava.eval.answers import Job, PreparedBatches, Shard, generate, read_picture
from sqllava.eval.engine import choose_template, open_engine
from sqllava.eval.plan import Costs, picture_key, plan
from sqllava.eval.records import Question, read_json
from sqllava.generation.decoding import Decoding
from sqllava.generation.writer import ROW, Writer, _dealt

TOKENS = 5
# How many questions are asked about each picture; 0 stands for questions without one.
EACH = {"a.jpg": 1, "b.jpg": 2, "c.jpg": 18, "d.jpg": 31, None: 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(filter(None, EACH)):
        picture(folder / name, number)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)  # of the projector
    return copy_tiny_model(tmp_path_factory.mktemp("models") / "tiny-sqllava")


@pytest.fixture(scope="module")
def engine(model):
    return open_engine(str(model)).for_task("v1", "pad")


@pytest.fixture
def tower(engine):
    """How many pictures each pass through the tower encoded."""
    passes: list[int] = []
    hook = engine.model.model.vision_tower.register_forward_hook(
        lambda module, args, output: passes.append(len(args[0]))
    )
    yield passes
    hook.remove()


def mixed(folder):
    """POPE-, GQA- and caption-like questions, shuffled; some pictures are in the file itself."""
    content = base64.b64encode((folder / "b.jpg").read_bytes()).decode()
    asked = []
    for name, count in EACH.items():
        for n in range(count):
            text = (
                f"Is there a dog {n} in the image?\nAnswer the question with a single word.",
                f"What colour is it{' there' * (n % 5)}, {n}?",
                "Provide a one-sentence caption for the provided image.",
            )[n % 3]
            asked.append(Question(len(asked), text, name))
    for n in range(3):
        # Equal, but not the same object, as a reader makes them.
        asked.append(Question(len(asked), f"Which is it, {n}?", image_base64=(content + " ")[:-1]))
    random.Random(0).shuffle(asked)
    return [replace(question, question_id=n) for n, question in enumerate(asked)]


@pytest.fixture(scope="module")
def questions(folder):
    return mixed(folder)


@torch.no_grad()
def by_itself(engine, question, folder):
    """What the model says of a question alone, in one plain call of `generate`."""
    processor, image = engine.processor, read_picture(question, folder)
    turns = [Turn("user", question.text, images=int(image is not None)), Turn("assistant", None)]
    ids = encode_prompt(turns, "v1", processor.tokenizer, processor.image_tokens)
    pixels = {} if image is None else {"pixel_values": processor.prepare_image(image)[None]}
    written = engine.model.generate(**processor.pad([ids]), **pixels, **Decoding(TOKENS).options())[
        0, len(ids) :
    ]
    return processor.tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def alone(engine, questions, folder):
    return [by_itself(engine, question, folder) for question in questions]


def job(folder, questions, out, **more):
    """A job whose question file says what is asked, for the header."""
    rows = [{"question_id": q.question_id, "text": q.text} for q in questions]
    return Job("pope", lines(out.with_suffix(".questions"), rows), folder, out, Decoding(TOKENS))


def texts(path):
    return [row["text"] for row in read(path)]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answers_are_those_of_one_question_at_a_time(
    engine, questions, folder, alone, tower, tmp_path, batch_size
):
    assert len(set(alone)) > 10  # what is said depends on what is asked
    assert generate(
        engine, job(folder, questions, tmp_path / "a.jsonl"), questions, batch_size=batch_size,
        workers=0,
    )  # fmt: skip
    assert texts(tmp_path / "a.jsonl") == alone
    # Four pictures in the folder, and one of them again in the file itself.
    assert sum(tower) == 5
    assert max(tower) <= batch_size


def test_batches_shards_and_workers_give_equal_files(engine, questions, folder, tmp_path):
    outs = []
    for batch_size, count, workers in ((1, 1, 0), (4, 3, 0), (16, 2, 2), (100, 7, 0)):
        out = tmp_path / f"{batch_size}.jsonl"
        for index in range(count):
            generate(
                engine, job(folder, questions, out), questions, Shard(index, count), batch_size,
                workers,
            )  # fmt: skip
        outs.append(out.read_bytes())
    assert len(set(outs)) == 1


def test_a_run_killed_anywhere_goes_on_to_the_same_file(engine, questions, folder, tmp_path, tower):
    """Also within the rounds of a picture with too many questions for one."""
    out = tmp_path / "a.jsonl"

    def run():
        generate(engine, job(folder, questions, out), questions, batch_size=2, workers=0)

    run()
    part = tmp_path / "a.jsonl.parts/1_0.jsonl"
    whole, written = out.read_bytes(), part.read_bytes()
    rounds = plan(questions, range(len(questions)), 2, engine.costs(Decoding(TOKENS)))[0]
    assert len(rounds) > 2
    rng = random.Random(0)
    for kept in (0, len(written) - 1, *(rng.randrange(len(written)) for _ in range(3))):
        part.write_bytes(written[:kept])
        out.unlink()
        run()
        assert out.read_bytes() == whole
        assert part.read_bytes() == written
    # A round that was done is not asked again.
    asked = []
    lines_of_two = written.splitlines(keepends=True)[: len(rounds[0]) + len(rounds[1])]
    part.write_bytes(b"".join(lines_of_two))
    out.unlink()
    finish = Writer.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Writer,
            "finish",
            lambda self, begun, numbers, *args: (
                asked.append(len(numbers)) or finish(self, begun, numbers, *args)
            ),
        )
        run()
    assert asked[: len(rounds) - 2] == [len(items) for items in rounds[2:]]
    assert out.read_bytes() == whole


def test_a_bad_picture_is_marked_for_all_its_questions_and_read_once(
    engine, questions, folder, tmp_path, monkeypatch
):
    from sqllava.eval import answers

    reads = []
    monkeypatch.setattr(
        answers, "read_picture", lambda q, images: reads.append(q.image) or read_picture(q, images)
    )
    bad = [replace(q, image="missing.jpg") if q.image == "c.jpg" else q for q in questions]
    with pytest.raises(ValueError, match=r"record \d+ \(question \d+\): .*missing.jpg"):
        generate(engine, job(folder, bad, tmp_path / "a.jsonl"), bad, workers=0)
    marking = replace(job(folder, bad, tmp_path / "b.jsonl"), bad_images="mark")
    reads.clear()
    generate(engine, marking, bad, workers=0)
    rows = read(tmp_path / "b.jsonl")
    assert sum("missing.jpg" in row["metadata"].get("error", "") for row in rows) == EACH["c.jpg"]
    assert sorted(filter(None, reads)) == ["a.jpg", "b.jpg", "d.jpg", "missing.jpg"]


def test_what_is_read_of_an_image_is_kept_for_one_batch_alone(engine, questions, folder):
    """The language model reads each trunk once: its passes over many tokens are one a batch, and
    one for the text before all pictures."""
    passes: list[int] = []
    hook = engine.model.model.language_model.register_forward_hook(
        lambda module, args, kwargs, output: passes.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    about = [question for question in questions if question.image in ("c.jpg", "d.jpg")]
    batches = plan(about, range(len(about)), 1, engine.costs(Decoding(TOKENS)))
    dataset = PreparedBatches(batches, about, folder, engine.prompter)
    for prepared in map(dataset.__getitem__, range(len(batches))):
        numbers = [at for _, at in prepared.numbers()]
        assert len(numbers) > 5
        list(engine.answers(prepared.inputs, numbers, Decoding(TOKENS)))
    hook.remove()
    trunk = engine.processor.image_tokens + 30
    assert len(batches) == sum(tokens > trunk for tokens in passes) == 2


def test_keys_and_values_are_dropped_before_the_next_batch(
    engine, questions, folder, tmp_path, monkeypatch
):
    held, begin = [], Writer.begin

    def begun(self, prompts, about):
        assert all(cache() is None for cache in held)
        result = begin(self, prompts, about)
        held.append(weakref.ref(result.trunks.cache))
        return result

    monkeypatch.setattr(Writer, "begin", begun)
    generate(
        engine, job(folder, questions, tmp_path / "a.jsonl"), questions, batch_size=1, workers=0
    )
    assert len(held) == 4 + 1 + EACH[None]  # pictures by path and by content, and texts alone


def test_models_without_branches_answer_alike(engine, questions, folder, alone, tmp_path):
    """Beams, and attention that takes no mask of ours, are left to `generate`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "branches", lambda self, decoding: False)
        assert engine.costs(Decoding(TOKENS)) is None
        generate(engine, job(folder, questions, tmp_path / "a.jsonl"), questions, workers=0)
    assert texts(tmp_path / "a.jsonl") == alone
    assert engine.costs(Decoding(TOKENS, num_beams=2)) is None
    assert engine.costs(Decoding(TOKENS)).answer == TOKENS


# --- the plan -------------------------------------------------------------------------------------

QUESTIONS = st.lists(
    st.builds(
        Question,
        st.just(0),
        st.text(max_size=40) | st.integers(0, 900).map("w".__mul__),
        st.sampled_from([None, "a", "b", "c"]) | st.integers(0, 50).map(str),
        image_base64=st.sampled_from([None, None, None, "Zm9v"]),
    ),
    max_size=60,
)
COSTS = st.builds(Costs, st.integers(1, 700), st.integers(1, 60), st.integers(1, 200))


@given(QUESTIONS, st.integers(1, 20), COSTS, st.integers(1, 4), st.data())
def test_a_plan_asks_each_question_once_and_keeps_its_budget(asked, batch_size, costs, count, data):
    items = list(Shard(data.draw(st.integers(0, count - 1)), count).items(len(asked)))
    batches = plan(asked, items, batch_size, costs)
    assert sorted(item for rounds in batches for items in rounds for item in items) == items
    assert batches == plan(list(asked), list(items), batch_size, costs)
    budget = batch_size * max([costs.alone(asked[item]) for item in items], default=0)
    seen = set()
    for rounds in batches:
        assert rounds and all(rounds)
        members = [asked[item] for items in rounds for item in items]
        assert len({question.has_image for question in members}) == 1
        keys = {picture_key(question) for question in members} - {None}
        assert not keys & seen  # a picture is in one batch
        seen |= keys
        assert len(keys or members) <= batch_size
        assert len(rounds) == 1 or len(keys) == 1
        for items in rounds:
            together = [asked[item] for item in items]
            own = sum(map(costs.own, together))
            shared = len(keys or together) * costs.shared(together[0])
            assert shared + own <= budget


@given(QUESTIONS, st.integers(1, 20))
def test_questions_that_stand_alone_are_batched_by_length(asked, batch_size):
    batches = plan(asked, range(len(asked)), batch_size)
    assert all(len(rounds) == 1 and 1 <= len(rounds[0]) <= batch_size for rounds in batches)
    ordered = [item for (items,) in batches for item in items]
    assert sorted(ordered) == list(range(len(asked)))
    lengths = [(asked[item].has_image, len(asked[item].text)) for item in ordered]
    assert lengths == sorted(lengths, reverse=True)


def test_with_a_picture_for_each_question_a_batch_holds_as_many_as_before():
    costs = Costs(620, 40, 128)
    asked = [Question(n, "w" * (20 + n % 60), f"{n}.jpg") for n in range(100)]
    batches = plan(asked, range(100), 16, costs)
    assert [len(items) for (items,) in batches] == [16, 16, 16, 16, 16, 16, 4]
    same = [replace(question, image=f"{n // 18}.jpg") for n, question in enumerate(asked)]
    assert max(len(items) for (items,) in plan(same, range(100), 16, costs)) == 3 * 18


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2000)), max_size=40))
def test_rows_hold_texts_of_one_trunk_and_are_bounded(texts):
    trunk_of, lengths = [trunk for trunk, _ in texts], [length for _, length in texts]
    rows = _dealt(trunk_of, lengths)
    assert sorted(text for row in rows for text in row) == list(range(len(texts)))
    for row in rows:
        assert len({trunk_of[text] for text in row}) == 1
        assert sum(lengths[text] for text in row) <= ROW + max(lengths[text] for text in row)
    if sum(lengths) <= ROW:
        assert len(rows) == len(set(trunk_of))


# --- the writer -----------------------------------------------------------------------------------


@torch.no_grad()
def plainly(writer, turns, pictures):
    ids = torch.tensor([writer.processor.encode_turns(turns)])
    pixels = {}
    if pictures:
        stacked = torch.stack([writer.processor.prepare_image(picture) for picture in pictures])
        pixels = {"pixel_values": stacked}
    written = writer.model.generate(input_ids=ids, **pixels, **Decoding(TOKENS).options())
    text = writer.processor.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()


@pytest.mark.parametrize("branches", [True, False])
def test_conversations_are_about_no_image_or_one_or_several(engine, folder, monkeypatch, branches):
    writer = Writer(engine.model, engine.processor)
    if not branches:
        monkeypatch.setattr(Writer, "branches", lambda self, decoding: False)
    a, b, c = (Image.open(folder / f"{name}.jpg").convert("RGB") for name in "abc")
    later = [Turn("user", "Look.", 1), Turn("assistant", "Yes."), Turn("user", "And now?", 1)]
    cases = [
        ([Turn("user", "Who are you?")], ()),
        ([Turn("user", "What is a cat?")], ()),
        ([Turn("user", "What is it?")], (a,)),
        ([Turn("user", "Which is red?", 2)], (a, b)),
        ([Turn("user", "Which is blue?", 2)], (a, b)),
        ([Turn("user", "Which is blue?", 2)], (b, a)),
        (later, (a, b)),  # its second image comes after what it shares with the others
        ([Turn("user", "What are they?", 3)], (c, a, c)),
    ]
    conversations = [[*turns, Turn("assistant", None)] for turns, _ in cases]
    about = [pictures[0] if len(pictures) == 1 else pictures or None for _, pictures in cases]
    expected = []
    for turns, (_, pictures) in zip(conversations, cases, strict=True):
        held = sum(turn.images for turn in turns)
        first = [turns[0]] if held else [replace(turns[0], images=len(pictures))]
        expected.append(plainly(writer, [*first, *turns[1:]], pictures))
    assert len(set(expected)) > 3
    assert [said for (said,) in writer.complete(conversations, about, Decoding(TOKENS))] == expected
    with pytest.raises(ValueError, match="turns hold 2 images, but 1 were given"):
        writer.complete(conversations[3:4], [a], Decoding(TOKENS))


def test_more_branches_than_a_row_takes_go_to_several(engine, folder, monkeypatch):
    from sqllava.generation import writer as module

    writer = Writer(engine.model, engine.processor)
    image = writer.encode([Image.open(folder / "a.jpg").convert("RGB")])[0]
    asked = [
        [Turn("user", f"Is it {n}{' or' * (n % 4)}?"), Turn("assistant", None)] for n in range(12)
    ]
    whole = writer.complete(asked, [image] * 12, Decoding(TOKENS))
    monkeypatch.setattr(module, "ROW", 20)
    assert writer.complete(asked, [image] * 12, Decoding(TOKENS)) == whole


# --- the template ---------------------------------------------------------------------------------

CHAT = Template("chat", "You see.", {"user": "Human", "assistant": "Robot"})


@pytest.fixture
def chat(monkeypatch):
    monkeypatch.setitem(conversation.TEMPLATES, "chat", CHAT)


def test_templates_of_a_form_write_turns_alike(chat):
    assert form(get_template("v1")) == form(get_template("v1_sq")) == form(get_template("llava_v1"))
    assert form(get_template("plain")) is None
    assert form(CHAT) != form(TEMPLATES["v1"])
    assert form(replace(CHAT, tags=TEMPLATES["v1"].tags)) == form(TEMPLATES["v1"])


@pytest.mark.parametrize(
    ("model", "task", "chosen", "asked", "told"),
    [
        ("v1_sq", "v1", None, "v1", ""),
        ("v1", "v1", None, "v1", ""),
        ("plain", "v1", None, "v1", ""),
        ("v1_sq", "llava_v1", None, "llava_v1", ""),
        ("v1_sq", "v1", "v1_sq", "v1_sq", ""),
        ("chat", "v1", None, "chat", "asked in the model's own template, 'chat'"),
        ("chat", "v1", "chat", "chat", ""),
        ("chat", "v1", "v1", "v1", "ASKED IN ANOTHER FORM: template 'v1'"),
        ("v1_sq", "v1", "chat", "chat", "ASKED IN ANOTHER FORM: template 'chat'"),
    ],
)
def test_a_model_is_asked_in_a_form_that_it_knows(chat, caplog, model, task, chosen, asked, told):
    caplog.set_level("INFO")
    name, remarks = choose_template(model, task, chosen)
    assert name == asked
    assert told in caplog.text and bool(told) == bool(caplog.text)
    foreign = "chat" in (model, chosen)
    assert remarks == ({"model_template": model, "task_template": task} if foreign else {})


def test_a_template_for_captions_asks_nothing():
    with pytest.raises(ValueError, match="'plain' writes captions alone"):
        choose_template("v1_sq", "v1", "plain")


def test_the_header_tells_which_template_was_asked_in(chat, model, folder, tmp_path):
    other = tmp_path / "model"
    engine = open_engine(str(model))
    engine.processor.conversation_template = "chat"
    engine.model.config.conversation_template = "chat"
    engine.model.save_pretrained(other)
    engine.processor.save_pretrained(other)
    rows = [{"question_id": 1, "text": "What is it?", "image": "a.jpg"}]

    def header(path, *flags):
        out = tmp_path / f"{len(flags)}{path.name}.jsonl"
        cli.main(
            ["run", "pope", "--model", str(path), "--images", str(folder), "--answers", str(out)]
            + ["--questions", str(lines(tmp_path / "q.jsonl", rows)), "--workers", "0"]
            + ["--max-new-tokens", "2", *flags]
        )
        return read_json(out.with_name(f"{out.stem}.header.json"))

    def told(header):
        names = ("template", "model_template", "task_template")
        return [header[name] for name in names if name in header]

    assert told(header(model)) == ["v1"]
    assert told(header(other)) == ["chat", "chat", "v1"]
    assert told(header(other, "--conv-mode", "v1")) == ["v1", "chat", "v1"]


def test_answers_that_were_begun_before_go_on(engine, questions, folder, tmp_path):
    """Parts and header as the program wrote them when it read each question by itself."""
    out = tmp_path / "a.jsonl"
    generate(engine, job(folder, questions, out), questions, workers=0)
    whole, header = out.read_bytes(), read_json(tmp_path / "a.header.json")
    part = tmp_path / "a.jsonl.parts/1_0.jsonl"
    rows = sorted(part.read_text().splitlines(keepends=True), key=lambda row: len(row))
    part.write_text("".join(rows[:9]))
    out.unlink()
    assert list(header) == [
        *("task", "questions", "questions_sha256", "decoding", "bad_images", "model_id", "weights"),
        *("dtype", "template", "image_preparation", "questions_file", "images", "batch_size"),
        *("device", "versions"),
    ]  # fmt: skip
    generate(engine, job(folder, questions, out), questions, workers=0)
    assert out.read_bytes() == whole
