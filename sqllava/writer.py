"""Writer: open conversations about images -> texts, with everything that is shared computed once.

The engine under `ask.py`. Pictures are encoded once, what the prompts of an image share is read
once (`prefix.py`), and the rows of a batch are decoded together by transformers' `generate`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from PIL import Image
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sqllava.conversation import Turn
from sqllava.model.model import SQLlavaForConditionalGeneration
from sqllava.model.processor import SQLlavaProcessor
from sqllava.prefix import UNREAD, Prefix, pad_left, shared_length, stack, unstack

ANSWER_TOKENS = 1024

# Takes text as it is written: which of the texts, what comes next of it, whether that is its end.
Stream = Callable[[int, str, bool], None]


@dataclass(eq=False)
class EncodedImage:
    """An image as the language model sees it.

    Stands wherever an image may, so that several calls share one pass through the tower, and one
    through the language model if it remembers.

    Attributes:
        features: [image tokens, d_text].
        remembers: keeps the keys and values of what was last said about the image, so that the next
            call reads only what is new.
        prefix: what it remembers.
    """

    features: torch.Tensor
    remembers: bool = False
    prefix: Prefix = field(default=UNREAD, repr=False)


@dataclass(frozen=True)
class Written:
    """A text of the model's; `ended` tells whether it came to its end or was cut."""

    text: str
    ended: bool


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


class Writer:
    """Writes what comes next in conversations about images.

    Args:
        model: in evaluation mode, as `sqllava.load` gives it.
        processor: the model's own; its `conversation_template` renders the turns.
    """

    def __init__(self, model: SQLlavaForConditionalGeneration, processor: SQLlavaProcessor) -> None:
        self.model = model
        self.processor = processor

    @torch.no_grad()
    def encode(self, images: Sequence[Picture], remember: bool = False) -> list[EncodedImage]:
        """Sends pictures through the tower and the projector, in one batch; encoded ones pass.

        Args:
            remember: whether the images keep what is said about them as keys and values; see
                `EncodedImage`. That is much memory for each: half a megabyte a token at 7B.
        """
        pictures = {id(image): image for image in images if isinstance(image, Image.Image)}
        encoded: dict[int, EncodedImage] = {}
        if pictures:
            pixels = torch.stack([self.processor.prepare_image(p) for p in pictures.values()])
            outputs = self.model.model.get_image_features(pixels.to(self.model.device))
            features: Any = outputs.pooler_output
            encoded = {
                key: EncodedImage(of_one, remember)
                for key, of_one in zip(pictures, features, strict=True)
            }
        return [encoded.get(id(image)) or cast(EncodedImage, image) for image in images]

    def complete(
        self,
        conversations: Sequence[Sequence[Turn]],
        images: Sequence[Picture],
        decoding: Decoding = GREEDY,
        stream: Stream | None = None,
    ) -> list[list[str]]:
        """The texts of `write`, each without blanks around it."""
        written = self.write(conversations, images, decoding, stream)
        return [[one.text for one in several] for several in written]

    @torch.no_grad()
    def write(
        self,
        conversations: Sequence[Sequence[Turn]],
        images: Sequence[Picture],
        decoding: Decoding = GREEDY,
        stream: Stream | None = None,
    ) -> list[list[Written]]:
        """Writes the open last turn of each conversation, all of them together.

        Args:
            conversations: each about one image, which belongs to its first turn.
            images: one for each conversation; an image may stand there several times, and what its
                conversations share at their beginning is read once.
            stream: takes the texts as they are written, numbered through all conversations; with
                beams, whole at the end.

        Returns:
            For each conversation `decoding.samples` texts.
        """
        if len(conversations) != len(images):
            raise ValueError(f"{len(conversations)} conversations, but {len(images)} images")
        if not conversations:
            return []
        prompts = [self.processor.encode_turns(_with_image(turns)) for turns in conversations]
        encoded = self.encode(images)
        prefixes = self._read(encoded, prompts)
        ids, mask, start = self._padded(prefixes, prompts)
        copies = max(decoding.samples, decoding.num_beams)
        cache = stack([prefix for prefix in prefixes for _ in range(copies)])
        streamer = None
        if stream and decoding.num_beams == 1:
            streamer = _Streamer(self, len(prompts) * decoding.samples, stream)
        # Cast, because transformers' own types do not fit together.
        generated = cast(Any, self.model).generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            mm_encoder_outputs=self._features(encoded, ids[:, start:]),
            streamer=streamer,
            **decoding.options(),
        )
        rows = [self._to_end(row) for row in generated[:, ids.shape[1] :].tolist()]
        if copies == 1:
            self._remember(encoded, prompts, rows, mask, cache)
        written = [Written(self._text(row), bool(row) and row[-1] in self.stops) for row in rows]
        if stream and not streamer:
            for row, one in enumerate(written):
                stream(row, one.text, True)
        n = decoding.samples
        return [written[i : i + n] for i in range(0, len(written), n)]

    @property
    def stops(self) -> frozenset[int]:
        """The tokens that end a text."""
        stops = cast(Any, self.model).generation_config.eos_token_id
        return frozenset(stops if isinstance(stops, list) else () if stops is None else (stops,))

    def _read(self, images: Sequence[EncodedImage], prompts: Sequence[list[int]]) -> list[Prefix]:
        """For each prompt, what it shares with the others about its image, read.

        The prompts' last tokens stay out, for `generate` to begin with.
        """
        groups: dict[int, list[list[int]]] = {}
        for image, prompt in zip(images, prompts, strict=True):
            groups.setdefault(id(image), []).append(prompt)
        targets = [
            several[0][: min(shared_length(several), *(len(prompt) - 1 for prompt in several))]
            for several in groups.values()
        ]
        distinct = {id(image): image for image in images}
        prefixes = self._extended(list(distinct.values()), targets)
        of_image = dict(zip(distinct, prefixes, strict=True))
        return [of_image[id(image)] for image in images]

    def _extended(
        self, images: Sequence[EncodedImage], targets: Sequence[list[int]]
    ) -> list[Prefix]:
        """Prefixes of images that hold exactly the target ids: kept, cut, and read on as needed."""
        prefixes = [
            image.prefix.cut(shared_length([image.prefix.ids, ids]))
            for image, ids in zip(images, targets, strict=True)
        ]
        open_ = [row for row, ids in enumerate(targets) if len(prefixes[row].ids) < len(ids)]
        if open_:
            held, wanted = [prefixes[row] for row in open_], [targets[row] for row in open_]
            ids, mask, start = self._padded(held, wanted)
            cache = stack(held)
            self.model.model(
                input_ids=cast(Any, ids[:, start:]),
                attention_mask=mask,
                position_ids=cast(Any, (mask.cumsum(1) - 1).clamp(min=0)[:, start:]),
                past_key_values=cache,
                mm_encoder_outputs=self._features([images[row] for row in open_], ids[:, start:]),
                use_cache=True,
            )
            for number, row in enumerate(open_):
                prefixes[row] = unstack(cache, number, mask[number].bool(), targets[row])
        for image, prefix in zip(images, prefixes, strict=True):
            if image.remembers:
                image.prefix = prefix
        return prefixes

    def _features(
        self, images: Sequence[EncodedImage], ids: torch.Tensor
    ) -> dict[str, BaseModelOutputWithPooling] | None:
        """The images whose rows of ids [B, S] hold placeholders, as the model takes them."""
        placed = (ids == self.model.config.image_token_id).any(1).tolist()
        features: Any = [image.features for image, here in zip(images, placed, strict=True) if here]
        if not features:
            return None
        return {"image": BaseModelOutputWithPooling(pooler_output=features)}

    def _padded(
        self, prefixes: Sequence[Prefix], prompts: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Prompts as a batch: what has been read and what comes after it are padded apart.

        Returns:
            ids and mask [B, S], and at which column the unread part begins.
        """
        pad = cast(int, self.processor.tokenizer.pad_token_id)
        read = pad_left([prefix.ids for prefix in prefixes], pad)
        rest = pad_left(
            [prompt[len(prefix.ids) :] for prefix, prompt in zip(prefixes, prompts, strict=True)],
            pad,
        )
        ids, mask = (
            torch.cat(pair, 1).to(self.model.device) for pair in zip(read, rest, strict=True)
        )
        return ids, mask, read[0].shape[1]

    def _remember(
        self,
        images: Sequence[EncodedImage],
        prompts: Sequence[list[int]],
        rows: Sequence[list[int]],
        mask: torch.Tensor,
        cache: Cache,
    ) -> None:
        """Keeps what was written about images that remember, where one text is all there was."""
        times = Counter(map(id, images))
        # The last token was written, but never read.
        read = cache.get_seq_length() - mask.shape[1]
        for row, image in enumerate(images):
            if image.remembers and times[id(image)] == 1:
                new = rows[row][:read]
                columns = torch.cat([mask[row].bool(), mask.new_ones(len(new)).bool()])
                image.prefix = unstack(cache, row, columns, [*prompts[row], *new])

    def _to_end(self, ids: list[int]) -> list[int]:
        """Written ids up to the first token that ends the text."""
        end = next((i for i, token in enumerate(ids) if token in self.stops), len(ids))
        return ids[: end + 1]

    def _text(self, ids: Sequence[int]) -> str:
        tokenizer = self.processor.tokenizer
        return cast(str, tokenizer.decode(ids, skip_special_tokens=True)).strip()


class _Streamer(BaseStreamer):
    """Takes the tokens of a batch step by step, and hands their text on as far as it is certain."""

    def __init__(self, writer: Writer, rows: int, stream: Stream) -> None:
        self._writer, self._stream = writer, stream
        self._ids: list[list[int]] = [[] for _ in range(rows)]
        self._sent = [""] * rows
        self._open = set(range(rows))
        self._at_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompts first, then a token for each row."""
        if self._at_prompt:
            self._at_prompt = False
            return
        for row, token in enumerate(value.tolist()):
            if row in self._open:
                self._ids[row].append(token)
                self._send(row, token in self._writer.stops)

    def end(self) -> None:
        """Ends the rows that were cut."""
        for row in sorted(self._open):
            self._send(row, True)

    def _send(self, row: int, last: bool) -> None:
        text = self._writer._text(self._ids[row])
        if not last:
            text = text.rstrip("\ufffd")  # a character whose bytes are not all there yet
        new = text[len(self._sent[row]) :]
        self._sent[row] += new
        if last:
            self._open.remove(row)
        if new or last:
            self._stream(row, new, last)


def _with_image(turns: Sequence[Turn]) -> list[Turn]:
    """Puts the image into the first turn, if no turn holds it yet."""
    if turns[0].text is None:
        raise ValueError("nothing stands before the open turn: give a context that is not empty")
    if any(turn.images for turn in turns):
        return list(turns)
    return [replace(turns[0], images=1), *turns[1:]]
