"""The writer under SelfQuestioner: what is read once, and that it changes no logit."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sqllava import SelfQuestioner
from sqllava.ask.questioner import describing
from sqllava.checkpoint.load import assemble
from sqllava.conversation import DESCRIBE_QUESTION, Turn, question_key
from sqllava.generation.decoding import Decoding
from sqllava.generation.prefix import UNREAD, Prefix, pad_left, shared_length, stack, unstack

GIVEN = describing("a dog")
SAMPLED = Decoding(6, samples=3, temperature=1.2, top_k=300, top_p=0.95)


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


class Steps:
    """Every text that a writer has decoded, with the logits behind each of its tokens."""

    def __init__(self, writer, monkeypatch):
        self.rows: list[tuple[list[int], list[int], torch.Tensor]] = []
        self._steps: list[torch.Tensor] = []
        self._decode = writer._decode_branches
        self._hook = writer.model.lm_head.register_forward_hook(
            lambda module, args, logits: self._steps.append(logits)
        )
        monkeypatch.setattr(writer, "_decode_branches", self._recorded)

    def _recorded(self, begun, numbers, decoding, stream):
        self._steps.clear()
        rows = self._decode(begun, numbers, decoding, stream)
        for number, written in enumerate(rows):
            logits = torch.stack([step[number] for step in self._steps])
            prompt = begun.prompts[numbers[number // decoding.samples]]
            self.rows.append((prompt, written, logits[: len(written)]))
        return rows

    def close(self):
        self._hook.remove()


@pytest.fixture
def steps(questioner, monkeypatch):
    recorded = Steps(questioner, monkeypatch)
    yield recorded
    recorded.close()


@pytest.fixture
def read(questioner):
    """How many tokens, over all rows, each pass through the language model read."""
    passes: list[int] = []
    hook = questioner.model.model.language_model.register_forward_hook(
        lambda module, args, kwargs, output: passes.append(
            kwargs["inputs_embeds"].shape[0] * kwargs["inputs_embeds"].shape[1]
        ),
        with_kwargs=True,
    )
    yield passes
    hook.remove()


@torch.no_grad()
def fresh_logits(questioner, image, prompt, written):
    """The logits behind each written token, from one plain pass over everything."""
    ids = torch.tensor([prompt + written])
    outputs = questioner.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=questioner.processor.prepare_image(image).unsqueeze(0),
        use_cache=False,
    )
    return outputs.logits[0, len(prompt) - 1 : -1]


def check_logits(questioner, image_of_row, steps):
    assert steps.rows
    for number, (prompt, written, logits) in enumerate(steps.rows):
        assert len(written) == len(logits)
        fresh = fresh_logits(questioner, image_of_row(number), prompt, written)
        torch.testing.assert_close(logits, fresh, atol=1e-4, rtol=0)


def test_sampled_questions_come_from_the_logits_of_a_fresh_pass(questioner, images, steps):
    contexts = [GIVEN, describing("two cats on a long red sofa"), GIVEN, describing("?")]
    questioner.ask_batch(images, SAMPLED, seed=0, contexts=contexts, redraws=0)
    assert len(steps.rows) == len(images) * SAMPLED.samples
    check_logits(questioner, lambda row: images[row // SAMPLED.samples], steps)


def test_redrawn_questions_come_from_the_logits_of_a_fresh_pass(questioner, images, steps):
    asked = questioner.ask(images[0], 4, 1e-4, max_new_tokens=4, seed=0, context=GIVEN)
    assert len(steps.rows) > 4 > len(asked)
    check_logits(questioner, lambda row: images[0], steps)


def test_a_long_conversation_has_the_logits_of_fresh_passes(questioner, images, steps):
    passes = []
    hook = questioner.model.model.vision_tower.register_forward_hook(
        lambda module, args, output: passes.append(len(args[0]))
    )
    exchanges = questioner.converse(images[1], 6, max_new_tokens=8, seed=0, answer_tokens=8)
    hook.remove()
    assert len(exchanges) == 6
    assert passes == [1]
    assert len(steps.rows) >= 13  # the description, and a question and an answer a round
    check_logits(questioner, lambda row: images[1], steps)


def test_conversations_of_a_batch_are_those_held_alone(questioner, images):
    greedy = Decoding(6)
    contexts = [GIVEN, describing("two cats on a long red sofa"), GIVEN, describing("?")]
    together = questioner.converse_batch(images, 3, greedy, contexts=contexts, answering=greedy)
    for image, context, exchanges in zip(images, contexts, together, strict=True):
        alone = questioner.converse_batch([image], 3, greedy, contexts=[context], answering=greedy)
        assert alone == [exchanges]


def test_what_prompts_share_is_read_once(questioner, images, read):
    prompt = len(questioner.processor.encode_turns([*GIVEN, Turn("vuser", None)]))
    questioner.ask_batch(images[:1], SAMPLED, contexts=[GIVEN], redraws=0)
    assert read[0] == prompt - 1
    assert all(tokens == SAMPLED.samples for tokens in read[1:])
    read.clear()
    questions = ["Why?", "Who is it?", "What is to be seen on the left?"]
    questioner.answer_batch(images[:1] * 3, questions, [GIVEN] * 3, Decoding(2))
    shared = len(questioner.processor.encode_turns([*GIVEN, Turn("user", None)]))
    assert shared <= read[0] <= shared + 2  # all of it, and what the questions begin with alike
    assert read[1] < shared  # three short endings, padded


def test_an_image_that_remembers_reads_only_what_is_new(questioner, images, read):
    image = questioner.encode(images[:1], remember=True)[0]
    description = questioner.describe(image, 6)
    first = read[0]
    read.clear()
    questioner.answer(image, "Why?", describing(description), 4)
    again = read[0]
    assert again < first / 4
    read.clear()
    forgetful = questioner.encode(images[:1])[0]
    questioner.answer(forgetful, "Why?", describing(description), 4)
    assert read[0] > first
    assert forgetful.prefix is UNREAD


@pytest.mark.parametrize("seed", range(5))
def test_what_is_remembered_never_changes_an_answer(questioner, images, seed):
    rng = random.Random(seed)
    remembering = questioner.encode(images, remember=True)
    said = [[] for _ in images]
    for _ in range(6):
        rows = [rng.randrange(len(images)) for _ in range(rng.randint(1, 4))]
        histories = []
        for row in rows:
            history = said[row]
            histories.append([] if rng.random() < 0.3 else history[: 2 * rng.randint(0, 9)])
        questions = [rng.choice(["Why?", "What is on the left of it?", "é…", ""]) for _ in rows]
        decoding = Decoding(rng.randint(1, 6))
        answers = questioner.answer_batch(
            [remembering[row] for row in rows], questions, histories, decoding
        )
        fresh = questioner.answer_batch(
            [images[row].copy() for row in rows], questions, histories, decoding
        )
        assert answers == fresh
        for row, question, history, answer in zip(rows, questions, histories, answers, strict=True):
            said[row] = [*history, Turn("user", question), Turn("assistant", answer)]


def test_questions_differ_from_each_other_and_from_the_context(questioner, images):
    almost_greedy = {"temperature": 1e-4, "max_new_tokens": 4, "context": GIVEN, "seed": 0}
    as_drawn = questioner.ask(images[0], 3, redraws=0, **almost_greedy)
    assert len(as_drawn) == 3 and len(set(as_drawn)) == 1
    asked = questioner.ask(images[0], 3, **almost_greedy)
    assert asked == as_drawn[:1]
    context = [*GIVEN, Turn("vuser", asked[0].upper() + " "), Turn("assistant", "yes")]
    questions = questioner.ask(images[0], 3, 1.2, max_new_tokens=4, context=context, seed=0)
    assert question_key(asked[0]) not in map(question_key, questions)
    many = questioner.ask(images[0], 6, 1.2, max_new_tokens=6, context=GIVEN, seed=0)
    assert len(set(map(question_key, many))) == len(many) == 6


def test_a_question_is_the_same_whatever_its_case_blanks_and_mark():
    assert question_key(" What  IS it ?") == question_key("what is it")
    assert question_key("What is it?") != question_key("What is that?")
    assert question_key(" ?!") == ""


def test_text_comes_as_it_is_written(questioner, images):
    pieces = [[] for _ in range(4)]
    ends = []

    def take(row, text, last):
        pieces[row].append(text)
        ends.extend([row] * last)

    questions = ["Why?", "Who?", "What is on the left of it?", "Is it blue?"]
    answers = questioner.answer_batch(images, questions, decoding=Decoding(10), stream=take)
    assert ["".join(texts).strip() for texts in pieces] == answers
    assert sorted(ends) == [0, 1, 2, 3]
    assert all(len(texts) > 2 for texts in pieces)
    pieces = [[] for _ in range(4)]
    description = questioner.describe(images[0], 10, stream=take)
    assert "".join(pieces[0]).strip() == description


def test_a_text_that_was_cut_is_told_from_one_that_ended(questioner, images, monkeypatch):
    asked = [Turn("user", DESCRIBE_QUESTION, 1), Turn("assistant", None)]
    cut = questioner.write([asked], images[:1], Decoding(5))[0][0]
    assert not cut.ended
    third = questioner.processor.tokenizer(cut.text, add_special_tokens=False).input_ids
    monkeypatch.setattr(questioner.model.generation_config, "eos_token_id", [third[-1], 2])
    assert questioner.write([asked], images[:1], Decoding(5))[0][0].ended


# --- prefixes -------------------------------------------------------------------------------------

ROWS = st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=5)


@given(ROWS)
def test_padding_on_the_left_keeps_every_row(rows):
    ids, mask = pad_left(rows, 0)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    assert [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)] == rows
    assert all(m.sort().values.equal(m) for m in mask)


@given(ROWS)
def test_a_shared_beginning_is_as_long_as_can_be(rows):
    length = shared_length(rows)
    assert len({tuple(row[:length]) for row in rows}) == 1
    at_end = length == min(map(len, rows))
    assert at_end or len({tuple(row[: length + 1]) for row in rows}) > 1


@given(ROWS)
def test_prefixes_come_back_from_a_batch_as_they_went_in(rows):
    prefixes = [Prefix(row, [torch.rand(2, len(row), 3) for _ in range(4)]) for row in rows]
    prefixes = [prefix if prefix.ids else UNREAD for prefix in prefixes]
    cache, (_, mask) = stack(prefixes), pad_left(rows, 0)
    assert cache.get_seq_length() == mask.shape[1]
    for number, prefix in enumerate(prefixes):
        back = unstack(cache, number, mask[number].nonzero().flatten(), prefix.ids)
        assert all(torch.equal(a, b) for a, b in zip(back.states, prefix.states, strict=False))


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(0, 6))
def test_a_prefix_is_cut_in_all_its_states(ids, length):
    prefix = Prefix(ids, [torch.rand(2, len(ids), 3)]).cut(min(length, len(ids)))
    assert prefix.ids == ids[:length]
    assert all(state.shape[1] == len(prefix.ids) for state in prefix.states)
