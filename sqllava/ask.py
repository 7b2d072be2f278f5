"""SelfQuestioner: an image -> its description, questions about it, and answers to them.

The model's use after training. Everything goes one way: pictures are encoded once, turns become a
prompt that ends in a role tag, and `complete` writes what that role says.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sqllava.conversation import DESCRIBE_QUESTION, Turn, get_template
from sqllava.model.model import SQLlavaForConditionalGeneration
from sqllava.model.processor import SQLlavaProcessor

ANSWER_TOKENS = 1024
QUESTION_TOKENS = 300


@dataclass(frozen=True)
class EncodedImage:
    """An image as the language model sees it: features [image tokens, d_text].

    Stands wherever an image may, so that several calls share one pass through the tower.
    """

    features: torch.Tensor


Picture = Image.Image | EncodedImage


@dataclass(frozen=True)
class Decoding:
    """How texts are written: greedily without a temperature, sampled with one.

    Attributes:
        samples: texts per conversation; more than one needs a temperature.
        temperature, top_k, top_p: of the sampling; None leaves the last two out.
        num_beams: beams of a search without sampling.
    """

    max_new_tokens: int = ANSWER_TOKENS
    samples: int = 1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"the temperature must be above 0, found {self.temperature}")
        if self.temperature is None and self.samples > 1:
            raise ValueError(f"{self.samples} samples need a temperature: they would all be equal")

    def options(self) -> dict[str, Any]:
        """The keyword arguments of transformers' `generate`."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_return_sequences": self.samples,
            "num_beams": self.num_beams,
            "do_sample": self.temperature is not None,
        }
        if self.temperature is not None:
            options |= {
                "temperature": self.temperature,
                "top_k": self.top_k or 0,
                "top_p": 1.0 if self.top_p is None else self.top_p,
            }
        return options


GREEDY = Decoding()
ASKING = Decoding(QUESTION_TOKENS, samples=3, temperature=1.2, top_k=300, top_p=0.95)


def describing(description: str) -> list[Turn]:
    """The turns that a self-questioning conversation begins with."""
    return [Turn("user", DESCRIBE_QUESTION, images=1), Turn("assistant", description)]


class SelfQuestioner:
    """Describes images, asks about them, and answers.

    Each method takes a picture or one that `encode` has encoded. The `_batch` forms decode many
    conversations together; how many fit is for the caller to know.

    Args:
        model: in evaluation mode, as `sqllava.load` gives it.
        processor: the model's own; its `conversation_template` renders the turns.
    """

    def __init__(self, model: SQLlavaForConditionalGeneration, processor: SQLlavaProcessor) -> None:
        self.model = model
        self.processor = processor

    def describe(self, image: Picture, max_new_tokens: int = ANSWER_TOKENS) -> str:
        """Describes an image in detail, greedily."""
        return self.describe_batch([image], Decoding(max_new_tokens))[0]

    def describe_batch(self, images: Sequence[Picture], decoding: Decoding = GREEDY) -> list[str]:
        """Describes each of many images."""
        return self.answer_batch(images, [DESCRIBE_QUESTION] * len(images), decoding=decoding)

    def answer(
        self,
        image: Picture,
        question: str,
        history: Sequence[Turn] = (),
        max_new_tokens: int = ANSWER_TOKENS,
    ) -> str:
        """Answers a question about an image, greedily.

        Args:
            history: earlier turns about the same image, which belongs to the first of them.
        """
        return self.answer_batch([image], [question], [history], Decoding(max_new_tokens))[0]

    def answer_batch(
        self,
        images: Sequence[Picture],
        questions: Sequence[str],
        histories: Sequence[Sequence[Turn]] | None = None,
        decoding: Decoding = GREEDY,
        asker: Literal["user", "vuser"] = "user",
    ) -> list[str]:
        """Answers one question about each of many images.

        Args:
            histories: the turns before each question; none by default.
            asker: who asks: "vuser" for questions that the model has asked itself.
        """
        histories = [()] * len(images) if histories is None else histories
        conversations = [
            [*history, Turn(asker, question), Turn("assistant", None)]
            for history, question in zip(histories, questions, strict=True)
        ]
        return [texts[0] for texts in self.complete(conversations, images, decoding)]

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
    ) -> list[str]:
        """Samples questions about an image.

        Args:
            n: how many; they may repeat each other.
            seed: makes the draw reproducible, and leaves torch's own generator as it was.
            context: the turns before the question; by default a description, made first.

        Raises:
            ValueError: the model's template has no role that asks, or the context is empty.
        """
        asking = Decoding(max_new_tokens, n, temperature, top_k, top_p)
        contexts = None if context is None else [context]
        return self.ask_batch([image], asking, seed, contexts)[0]

    def ask_batch(
        self,
        images: Sequence[Picture],
        decoding: Decoding = ASKING,
        seed: int | None = None,
        contexts: Sequence[Sequence[Turn]] | None = None,
    ) -> list[list[str]]:
        """Samples `decoding.samples` questions about each of many images; see `ask`."""
        self._check_asks()
        encoded = self.encode(images)
        if contexts is None:
            contexts = [describing(text) for text in self.describe_batch(encoded)]
        conversations = [[*context, Turn("vuser", None)] for context in contexts]
        with _seeded(seed, self.model.device):
            return self.complete(conversations, encoded, decoding)

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
            The questions, sampled, with their answers, greedy.
        """
        self._check_asks()
        asking = Decoding(max_new_tokens, 1, temperature, top_k, top_p)
        answering = Decoding(answer_tokens)
        images = self.encode([image])
        turns = list(describing(self.describe(images[0])) if context is None else context)
        exchanges = []
        with _seeded(seed, self.model.device):
            for _ in range(rounds):
                question = self.ask_batch(images, asking, contexts=[turns])[0][0]
                answer = self.answer_batch(images, [question], [turns], answering, "vuser")[0]
                turns += [Turn("vuser", question), Turn("assistant", answer)]
                exchanges.append((question, answer))
        return exchanges

    @torch.no_grad()
    def encode(self, images: Sequence[Picture]) -> list[EncodedImage]:
        """Sends pictures through the tower and the projector, in one batch; encoded ones pass."""
        pictures = [image for image in images if isinstance(image, Image.Image)]
        features: Iterator[torch.Tensor] = iter(())
        if pictures:
            pixels = torch.stack([self.processor.prepare_image(p) for p in pictures])
            outputs = self.model.model.get_image_features(pixels.to(self.model.device))
            features = iter(cast(Any, outputs.pooler_output))
        return [
            EncodedImage(next(features)) if isinstance(image, Image.Image) else image
            for image in images
        ]

    def complete(
        self,
        conversations: Sequence[Sequence[Turn]],
        images: Sequence[Picture],
        decoding: Decoding = GREEDY,
    ) -> list[list[str]]:
        """Writes the open last turn of each conversation, all of them together.

        Args:
            conversations: each about one image, which belongs to its first turn.
            images: one for each conversation.

        Returns:
            For each conversation `decoding.samples` texts.
        """
        if len(conversations) != len(images):
            raise ValueError(f"{len(conversations)} conversations, but {len(images)} images")
        if not conversations:
            return []
        prompts = [self.processor.encode_turns(_with_image(turns)) for turns in conversations]
        inputs = {k: v.to(self.model.device) for k, v in self.processor.pad(prompts).items()}
        features: Any = [image.features for image in self.encode(images)]
        # Cast, because transformers' own types do not fit together.
        ids = cast(Any, self.model).generate(
            **inputs,
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
            **decoding.options(),
        )  # [conversations * samples, S]
        written = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        texts = [text.strip() for text in texts]
        n = decoding.samples
        return [texts[i : i + n] for i in range(0, len(texts), n)]

    def _check_asks(self) -> None:
        template = get_template(self.processor.conversation_template)
        if "vuser" not in (template.tags or {}):
            raise ValueError(
                f"template {template.name!r} has no role that asks; models trained with 'v1_sq' do"
            )


def _with_image(turns: Sequence[Turn]) -> list[Turn]:
    """Puts the image into the first turn, if no turn holds it yet."""
    if turns[0].text is None:
        raise ValueError("nothing stands before the open turn: give a context that is not empty")
    if any(turn.images for turn in turns):
        return list(turns)
    return [replace(turns[0], images=1), *turns[1:]]


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws from `seed` inside the block, then goes on where torch was; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
