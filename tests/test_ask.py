"""SelfQuestioner on the tiny golden model: greedy texts, one encoding, seeds, growing context."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from sqllava import SelfQuestioner
from sqllava.ask.questioner import describing
from sqllava.checkpoint.load import assemble
from sqllava.conversation import DESCRIBE_QUESTION, Turn
from sqllava.generation.decoding import GREEDY, Decoding
from sqllava.generation.writer import EncodedImage, Writer

GIVEN = describing("a dog")


@pytest.fixture(scope="module")
def questioner(golden):
    torch.manual_seed(0)
    model, processor = assemble(
        str(golden / "vicuna-tiny"), str(golden / "clip-tiny"), conversation_template="v1_sq"
    )
    return SelfQuestioner(model.eval(), processor)


@pytest.fixture(scope="module")
def images(golden):
    return [Image.open(golden / "images" / f"{i}.png").convert("RGB") for i in range(4)]


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Cuts texts short: a random model does not end them by itself."""
    write = Writer.write

    def cut(writer, conversations, images, decoding=GREEDY, stream=None):
        tokens = min(decoding.max_new_tokens, 12)
        return write(
            writer, conversations, images, replace(decoding, max_new_tokens=tokens), stream
        )

    monkeypatch.setattr(Writer, "write", cut)


@pytest.fixture
def encodings(questioner):
    """How many images each pass through the tower had."""
    passes: list[int] = []
    tower = questioner.model.model.vision_tower
    hook = tower.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    yield passes
    hook.remove()


@pytest.fixture
def prompts(questioner, monkeypatch):
    """The turns of every prompt."""
    seen: list[list[Turn]] = []
    encode_turns = questioner.processor.encode_turns

    def recorded(turns):
        seen.append(list(turns))
        return encode_turns(turns)

    monkeypatch.setattr(questioner.processor, "encode_turns", recorded)
    return seen


def _plain_generate(questioner, image, turns, max_new_tokens):
    processor = questioner.processor
    ids = torch.tensor([processor.encode_turns(turns)])
    generated = questioner.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=processor.prepare_image(image).unsqueeze(0),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return processor.tokenizer.decode(
        generated[0, ids.shape[1] :], skip_special_tokens=True
    ).strip()


def test_greedy_texts_are_those_of_plain_generate(questioner, images):
    asked = [Turn("user", DESCRIBE_QUESTION, 1), Turn("assistant", None)]
    for image in images:
        assert questioner.describe(image, 12) == _plain_generate(questioner, image, asked, 12)
    history = [*GIVEN, Turn("user", "Is it big?"), Turn("assistant", None)]
    expected = _plain_generate(questioner, images[1], history, 9)
    assert questioner.answer(images[1], "Is it big?", GIVEN, max_new_tokens=9) == expected


def test_greedy_ids_are_those_of_plain_generate(questioner, images, monkeypatch):
    decode, written = questioner._decode_branches, []
    monkeypatch.setattr(
        questioner, "_decode_branches", lambda *args: written.extend(decode(*args)) or written
    )
    generate, plain = questioner.model.generate, []
    monkeypatch.setattr(
        questioner.model, "generate", lambda **kwargs: plain.append(generate(**kwargs)) or plain[-1]
    )
    questioner.describe(images[0], 12)
    turns = [Turn("user", DESCRIBE_QUESTION, 1), Turn("assistant", None)]
    _plain_generate(questioner, images[0], turns, 12)
    assert len(written[0]) == 12
    assert plain[0][0, -12:].tolist() == written[0]


def test_branches_give_what_rows_of_their_own_give(questioner, images, monkeypatch):
    pictures = [images[0], images[1], images[0], images[0], images[2]]
    questions = ["Why?", "What is to be seen on the left of this picture?", "Who?", "Blue?", "A b"]
    histories = [(), GIVEN, GIVEN, (), GIVEN]

    def answers():
        return questioner.answer_batch(pictures, questions, histories, Decoding(10))

    together = answers()
    monkeypatch.setattr(questioner, "_takes_branches", lambda *args: False)
    assert together == answers()


def test_what_else_shapes_texts_is_left_to_generate(questioner, images, monkeypatch):
    def answers():
        return questioner.answer_batch(images, ["Why?"] * 4, [GIVEN] * 4, Decoding(10))

    before = answers()
    monkeypatch.setattr(questioner.model.generation_config, "repetition_penalty", 50.0)
    turns = [*GIVEN, Turn("user", "Why?"), Turn("assistant", None)]
    penalised = answers()
    assert penalised != before
    assert penalised == [_plain_generate(questioner, image, turns, 10) for image in images]


def test_a_batch_gives_what_its_images_give_alone(questioner, images):
    decoding = Decoding(max_new_tokens=8)
    alone = [questioner.describe(image, 8) for image in images]
    assert questioner.describe_batch(images, decoding) == alone
    # Of different lengths, so that the shorter ones are padded.
    questions = ["Why?", "What is to be seen on the left of this picture?", "Who?", "Is it blue?"]
    histories = [(), GIVEN, (), GIVEN]
    alone = [
        questioner.answer(image, question, history, 8)
        for image, question, history in zip(images, questions, histories, strict=True)
    ]
    assert questioner.answer_batch(images, questions, histories, decoding) == alone


def test_beam_search_runs_over_encoded_images(questioner, images):
    one = Decoding(max_new_tokens=5, num_beams=3)
    alone = [questioner.describe_batch([image], one)[0] for image in images[:2]]
    assert questioner.describe_batch(images[:2], one) == alone


def test_each_call_encodes_its_image_once(questioner, images, encodings):
    questioner.describe(images[0], 3)
    assert encodings == [1]
    questioner.ask(images[0], n=4, max_new_tokens=3)
    assert encodings == [1, 1]
    questioner.converse(images[0], rounds=3, max_new_tokens=3, answer_tokens=3)
    assert encodings == [1, 1, 1]
    questioner.ask_batch(images, Decoding(3, samples=2, temperature=1.0))
    assert encodings == [1, 1, 1, 4]


def test_an_encoded_image_is_not_encoded_again(questioner, images, encodings):
    mixed = questioner.encode([images[0], *questioner.encode([images[1]]), images[2]])
    assert encodings == [1, 2]
    assert all(isinstance(image, EncodedImage) for image in mixed)
    assert questioner.describe(mixed[1], 4) == questioner.describe(images[1], 4)
    assert encodings == [1, 2, 1]


def test_samples_differ_and_are_made_together(questioner, images, prompts):
    questions = questioner.ask(images[0], n=5, max_new_tokens=8, context=GIVEN)
    assert len(questions) == 5
    assert len(set(questions)) > 1
    assert prompts == [[*GIVEN, Turn("vuser", None)]]


def test_seeds_are_reproducible_and_leave_the_global_generator_alone(questioner, images):
    def ask(seed):
        return questioner.ask(images[0], n=3, max_new_tokens=8, seed=seed, context=GIVEN)

    state = torch.get_rng_state()
    assert ask(1) == ask(1) != ask(2)
    assert torch.equal(torch.get_rng_state(), state)
    ask(None)
    assert not torch.equal(torch.get_rng_state(), state)
    talk = [
        questioner.converse(images[0], 2, max_new_tokens=5, seed=3, context=GIVEN, answer_tokens=5)
        for _ in range(2)
    ]
    assert talk[0] == talk[1]
    assert talk[0][0][0] != talk[0][1][0]  # another draw each round


def test_asking_describes_first(questioner, images, prompts):
    description = questioner.describe(images[2], 5)
    prompts.clear()
    questioner.ask_batch(images[2:3], Decoding(3, samples=2, temperature=1.0))
    assert prompts[0] == [Turn("user", DESCRIBE_QUESTION, 1), Turn("assistant", None)]
    assert prompts[1][:1] == prompts[0][:1]
    assert prompts[1][1].text.startswith(description)
    assert prompts[1][2:] == [Turn("vuser", None)]


def test_the_context_of_a_conversation_grows(questioner, images, prompts):
    exchanges = questioner.converse(
        images[0], rounds=3, max_new_tokens=4, context=GIVEN, answer_tokens=4
    )
    context = list(GIVEN)
    expected = []
    for question, answer in exchanges:
        expected.append([*context, Turn("vuser", None)])
        expected.append([*context, Turn("vuser", question), Turn("assistant", None)])
        context += [Turn("vuser", question), Turn("assistant", answer)]
    assert prompts == expected


def test_the_image_goes_to_the_first_turn_of_a_history(questioner, images, prompts):
    without = [Turn("user", "Hi"), Turn("assistant", "Hello")]
    questioner.answer(images[0], "What is it?", without, max_new_tokens=2)
    assert [turn.images for turn in prompts[0]] == [1, 0, 0, 0]


def test_what_cannot_be_asked_is_told(questioner, images, monkeypatch):
    with pytest.raises(ValueError, match="context that is not empty"):
        questioner.ask(images[0], context=[])
    with pytest.raises(ValueError, match="temperature must be above 0, found 0"):
        questioner.ask(images[0], temperature=0)
    with pytest.raises(ValueError, match="samples must be at least 1, found 0"):
        questioner.ask(images[0], n=0)
    with pytest.raises(ValueError, match="2 samples need a temperature"):
        Decoding(samples=2)
    with pytest.raises(ValueError, match="1 conversations, but 2 images"):
        questioner.complete([GIVEN], images[:2])
    monkeypatch.setattr(questioner.processor, "conversation_template", "v1")
    with pytest.raises(ValueError, match="template 'v1' has no role that asks"):
        questioner.ask(images[0])
    with pytest.raises(ValueError, match="template 'v1' has no role that asks"):
        questioner.converse(images[0])


def test_no_images_give_no_texts(questioner):
    assert questioner.describe_batch([]) == []
    assert questioner.ask_batch([]) == []
