"""SelfQuestioner: an image -> its description, questions about it, and answers to them.

The model's use after training. Turns become a conversation whose last turn is open, and the writer
beneath (`generation/writer.py`) writes it, computing once what several of them share.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch

from sqllava.conversation import DESCRIBE_QUESTION, Turn, get_template, question_key
from sqllava.generation.decoding import ANSWER_TOKENS, GREEDY, QUESTION_TOKENS, Decoding
from sqllava.generation.writer import EncodedImage, Picture, Stream, Writer

# How often questions that have been asked before are drawn anew.
REDRAWS = 3

ASKING = Decoding(QUESTION_TOKENS, samples=3, temperature=1.2, top_k=300, top_p=0.95)


def describing(description: str) -> list[Turn]:
    """The turns that a self-questioning conversation begins with."""
    return [Turn("user", DESCRIBE_QUESTION, images=1), Turn("assistant", description)]


class SelfQuestioner(Writer):
    """Describes images, asks about them, and answers; made of a model and its processor.

    Each method takes a picture or one that `encode` has encoded. The `_batch` forms decode many
    conversations together; how many fit is for the caller to know.
    """

    def describe(
        self,
        image: Picture,
        max_new_tokens: int = ANSWER_TOKENS,
        stream: Stream | None = None,
    ) -> str:
        """Describes an image in detail, greedily."""
        return self.describe_batch([image], Decoding(max_new_tokens), stream)[0]

    def describe_batch(
        self,
        images: Sequence[Picture],
        decoding: Decoding = GREEDY,
        stream: Stream | None = None,
    ) -> list[str]:
        """Describes each of many images."""
        questions = [DESCRIBE_QUESTION] * len(images)
        return self.answer_batch(images, questions, decoding=decoding, stream=stream)

    def answer(
        self,
        image: Picture,
        question: str,
        history: Sequence[Turn] = (),
        max_new_tokens: int = ANSWER_TOKENS,
        stream: Stream | None = None,
    ) -> str:
        """Answers a question about an image, greedily.

        Args:
            history: earlier turns about the same image, which belongs to the first of them.
        """
        decoding = Decoding(max_new_tokens)
        return self.answer_batch([image], [question], [history], decoding, stream=stream)[0]

    def answer_batch(
        self,
        images: Sequence[Picture],
        questions: Sequence[str],
        histories: Sequence[Sequence[Turn]] | None = None,
        decoding: Decoding = GREEDY,
        asker: Literal["user", "vuser"] = "user",
        stream: Stream | None = None,
    ) -> list[str]:
        """Answers one question about each of many images.

        Args:
            images: one for each question; an image may stand there several times.
            histories: the turns before each question; none by default.
            asker: who asks: "vuser" for questions that the model has asked itself.
        """
        histories = [()] * len(images) if histories is None else histories
        conversations = [
            [*history, Turn(asker, question), Turn("assistant", None)]
            for history, question in zip(histories, questions, strict=True)
        ]
        return [texts[0] for texts in self.complete(conversations, images, decoding, stream)]

    def ask(
        self,
        image: Picture,
        n: int = 3,
        temperature: float = 1.2,
        top_k: int | None = 300,
        top_p: float | None = 0.95,
        max_new_tokens: int = QUESTION_TOKENS,
        seed: int | None = None,
        context: Sequence[Turn] | None = None,
        redraws: int = REDRAWS,
    ) -> list[str]:
        """Samples different questions about an image.

        Args:
            n: how many; there are fewer if the model repeats itself in all redraws.
            seed: makes the draw reproducible, and leaves torch's own generator as it was.
            context: the turns before the question; by default a description, made first.
            redraws: how often questions that have been asked, here or in the context, are drawn
                anew. With 0 the questions stay as they were drawn, repeated ones among them.

        Raises:
            ValueError: the model's template has no role that asks, or the context is empty.
        """
        asking = Decoding(max_new_tokens, n, temperature, top_k, top_p)
        contexts = None if context is None else [context]
        return self.ask_batch([image], asking, seed, contexts, redraws)[0]

    def ask_batch(
        self,
        images: Sequence[Picture],
        decoding: Decoding = ASKING,
        seed: int | None = None,
        contexts: Sequence[Sequence[Turn]] | None = None,
        redraws: int = REDRAWS,
    ) -> list[list[str]]:
        """Samples `decoding.samples` questions about each of many images; see `ask`."""
        self.check_asks()
        encoded = self._remembering(images)
        if contexts is None:
            contexts = [describing(text) for text in self.describe_batch(encoded)]
        conversations = [[*context, Turn("vuser", None)] for context in contexts]
        with seeded(seed, self.model.device):
            drawn = self.complete(conversations, encoded, decoding)
            if redraws and decoding.temperature is not None:
                drawn = self._without_repeats(drawn, conversations, encoded, decoding, redraws)
        return drawn

    def converse(
        self,
        image: Picture,
        rounds: int = 3,
        temperature: float = 1.2,
        top_k: int | None = 300,
        top_p: float | None = 0.95,
        max_new_tokens: int = QUESTION_TOKENS,
        seed: int | None = None,
        context: Sequence[Turn] | None = None,
        answer_tokens: int = ANSWER_TOKENS,
    ) -> list[tuple[str, str]]:
        """Asks, answers, and asks on, each round with all earlier ones in its context.

        Arguments as for `ask`; `answer_tokens` bounds the length of an answer.

        Returns:
            The questions, sampled, with their answers, greedy. A round in which the model only
            repeats itself is left out.
        """
        asking = Decoding(max_new_tokens, 1, temperature, top_k, top_p)
        contexts = None if context is None else [context]
        answering = Decoding(answer_tokens)
        return self.converse_batch([image], rounds, asking, seed, contexts, answering)[0]

    def converse_batch(
        self,
        images: Sequence[Picture],
        rounds: int = 3,
        asking: Decoding = ASKING,
        seed: int | None = None,
        contexts: Sequence[Sequence[Turn]] | None = None,
        answering: Decoding = GREEDY,
    ) -> list[list[tuple[str, str]]]:
        """Converses about each of many images, all of them together; see `converse`."""
        self.check_asks()
        asking = replace(asking, samples=1)
        encoded = self._remembering(images)
        if contexts is None:
            contexts = [describing(text) for text in self.describe_batch(encoded, answering)]
        turns = [list(context) for context in contexts]
        exchanges: list[list[tuple[str, str]]] = [[] for _ in images]
        with seeded(seed, self.model.device):
            for _ in range(rounds):
                questions = self.ask_batch(encoded, asking, contexts=turns)
                going_on = [row for row, drawn in enumerate(questions) if drawn]
                answers = self.answer_batch(
                    [encoded[row] for row in going_on],
                    [questions[row][0] for row in going_on],
                    [turns[row] for row in going_on],
                    answering,
                    "vuser",
                )
                for row, answer in zip(going_on, answers, strict=True):
                    question = questions[row][0]
                    turns[row] += [Turn("vuser", question), Turn("assistant", answer)]
                    exchanges[row].append((question, answer))
        return exchanges

    def _remembering(self, images: Sequence[Picture]) -> list[EncodedImage]:
        """Encoded images that remember, for one call, where they do not by themselves."""
        encoded = self.encode(images)
        copies = {
            id(image): image if image.remembers else EncodedImage(image.features, remembers=True)
            for image in encoded
        }
        return [copies[id(image)] for image in encoded]

    def _without_repeats(
        self,
        drawn: list[list[str]],
        conversations: Sequence[Sequence[Turn]],
        images: Sequence[EncodedImage],
        decoding: Decoding,
        redraws: int,
    ) -> list[list[str]]:
        """Drops empty and repeated questions, and draws others in their place."""
        known = [{question_key(turn.text or "") for turn in turns} for turns in conversations]
        kept: list[list[str]] = [[] for _ in drawn]
        rows = [row for row, texts in enumerate(drawn) for _ in texts]
        texts = [text for several in drawn for text in several]
        for redraw in range(redraws + 1):
            for row, text in zip(rows, texts, strict=True):
                if question_key(text) not in known[row]:
                    known[row].add(question_key(text))
                    kept[row].append(text)
            rows = [
                row
                for row, questions in enumerate(kept)
                for _ in range(decoding.samples - len(questions))
            ]
            if redraw == redraws or not rows:
                break
            again = self.complete(
                [conversations[row] for row in rows],
                [images[row] for row in rows],
                replace(decoding, samples=1),
            )
            texts = [several[0] for several in again]
        return kept

    def check_asks(self) -> None:
        """Raises ValueError if the model's template has no role that asks."""
        template = get_template(self.processor.conversation_template)
        if "vuser" not in (template.tags or {}):
            raise ValueError(
                f"template {template.name!r} has no role that asks; models trained with 'v1_sq' do"
            )


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws from `seed` inside the block, then goes on where torch was; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
