"""Writer: open conversations about images -> texts, with everything that is shared computed once.

The engine under asking and evaluation. Pictures are encoded once, what the prompts of an image
share is read once (`prefix.py`), and the rows of a batch are decoded together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sqllava.conversation import Turn
from sqllava.generation.decoding import GREEDY, Decoding
from sqllava.generation.prefix import UNREAD, Prefix, pad_left, shared_length, stack, unstack
from sqllava.generation.tree import Tree
from sqllava.model.model import SQLlavaForConditionalGeneration
from sqllava.model.processor import SQLlavaProcessor

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


# What `Decoding` sets, and what does not shape a text, in a GenerationConfig.
_SHAPED_HERE = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"),
    *("do_sample", "temperature", "top_k", "top_p", "num_beams", "num_return_sequences"),
    *("max_length", "max_new_tokens", "use_cache"),
}


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
        together = self._takes_branches(prefixes, prompts) and decoding.num_beams == 1
        decode = self._decode_branches if together else self._generate
        rows = decode(encoded, prefixes, prompts, decoding, stream)
        written = [Written(self._text(row), bool(row) and row[-1] in self.stops) for row in rows]
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
        fresh = [row for row, prefix in enumerate(prefixes) if not prefix.ids]
        if len(fresh) > 1:
            # The text before the image is the same for all.
            before = targets[fresh[0]][: shared_length([targets[row] for row in fresh])]
            placeholder = self.model.config.image_token_id
            before = before[: before.index(placeholder)] if placeholder in before else before
            system = self._read_on([UNREAD], [before], [])[0] if before else UNREAD
            prefixes = [prefix if prefix.ids else system for prefix in prefixes]
        behind = [row for row, ids in enumerate(targets) if len(prefixes[row].ids) < len(ids)]
        read = self._read_on(
            [prefixes[row] for row in behind],
            [targets[row] for row in behind],
            [images[row] for row in behind],
        )
        for row, prefix in zip(behind, read, strict=True):
            prefixes[row] = prefix
        for image, prefix in zip(images, prefixes, strict=True):
            if image.remembers:
                image.prefix = prefix
        return prefixes

    def _read_on(
        self,
        prefixes: Sequence[Prefix],
        targets: Sequence[list[int]],
        images: Sequence[EncodedImage],
    ) -> list[Prefix]:
        """Reads from the prefixes' ends to the targets', all rows together."""
        if not targets:
            return []
        ids, mask, start = self._padded(prefixes, targets)
        cache = stack(prefixes)
        self.model.model(
            input_ids=cast(Any, ids[:, start:]),
            attention_mask=mask,
            position_ids=cast(Any, (mask.cumsum(1) - 1).clamp(min=0)[:, start:]),
            past_key_values=cache,
            mm_encoder_outputs=self._features(images, ids[:, start:]),
            use_cache=True,
        )
        return [
            unstack(cache, row, mask[row].nonzero().flatten(), target)
            for row, target in enumerate(targets)
        ]

    def _features(
        self, images: Sequence[EncodedImage], ids: torch.Tensor
    ) -> dict[str, BaseModelOutputWithPooling] | None:
        """The images whose rows of ids [B, S] hold placeholders, as the model takes them."""
        placed = (ids == self.model.config.image_token_id).any(1).nonzero().flatten().tolist()
        features: Any = [images[row].features for row in placed]
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

    def _takes_branches(self, prefixes: Sequence[Prefix], prompts: Sequence[Sequence[int]]) -> bool:
        """Whether branches give what `generate` would: nothing but `Decoding` shapes the texts, the
        attention takes a mask of ours, and all images are read."""
        config: Any = self.model.config.get_text_config()
        shaped = set(cast(Any, self.model).generation_config.to_diff_dict()) - _SHAPED_HERE
        placeholder = self.model.config.image_token_id
        unread = any(placeholder in p[len(q.ids) :] for q, p in zip(prefixes, prompts, strict=True))
        masks = config._attn_implementation in ("sdpa", "eager")
        return masks and not (getattr(config, "sliding_window", None) or shaped or unread)

    def _decode_branches(
        self,
        images: Sequence[EncodedImage],
        prefixes: Sequence[Prefix],
        prompts: Sequence[list[int]],
        decoding: Decoding,
        stream: Stream | None,
    ) -> list[list[int]]:
        """Decodes all texts about an image as branches of what their prompts share."""
        trunks = {id(image): prefix for image, prefix in zip(images, prefixes, strict=True)}
        numbers = {image: number for number, image in enumerate(trunks)}
        branches: list[list[list[int]]] = [[] for _ in trunks]
        places = []  # of each text: its trunk and its branch
        for image, prefix, prompt in zip(images, prefixes, prompts, strict=True):
            number = numbers[id(image)]
            for _ in range(decoding.samples):
                places.append((number, len(branches[number])))
                branches[number].append(prompt[len(prefix.ids) :])
        tree = Tree(self.model.model, list(trunks.values()))
        steps = self._grow(tree, branches, places, decoding, stream)
        rows = [self._to_end(row) for row in torch.stack(steps, 1).tolist()]
        for number, image in enumerate({id(image): image for image in images}.values()):
            if image.remembers and len(branches[number]) == 1:
                row = places.index((number, 0))
                # The last token of the batch was written, but never read.
                ids = [*prompts[row], *rows[row][: len(steps) - 1]]
                columns = tree.columns(number, 0).nonzero().flatten()[: len(ids)]
                image.prefix = unstack(tree.cache, number, columns, ids)
        return rows

    def _grow(
        self,
        tree: Tree,
        branches: Sequence[Sequence[Sequence[int]]],
        places: Sequence[tuple[int, int]],
        decoding: Decoding,
        stream: Stream | None,
    ) -> list[torch.Tensor]:
        """Draws a token a step for each text, until all have ended; ids [texts] for each step."""
        streamer = _Streamer(self, len(places), stream) if stream else None
        warp = decoding.warpers()
        device = self.model.device
        stops = torch.tensor(sorted(self.stops), device=device, dtype=torch.long)
        pad = cast(int, self.processor.tokenizer.pad_token_id)
        rows, columns = torch.tensor(places, device=device).unbind(1)
        states = tree.start(branches)  # [G, N, d]
        running = torch.zeros(states.shape[:2], dtype=torch.bool, device=device)
        running[rows, columns] = True
        steps: list[torch.Tensor] = []
        while True:
            logits = self.model.lm_head(states).flatten(0, 1).float()  # [G * N, V]
            if decoding.temperature is None:
                drawn = logits.argmax(-1)
            else:
                scores = warp(cast(Any, None), cast(Any, logits))
                drawn = scores.softmax(-1).multinomial(1).squeeze(1)
            ids = drawn.view(running.shape).masked_fill(~running, pad)
            steps.append(ids[rows, columns])
            if streamer:
                streamer.put(steps[-1])
            running &= ~torch.isin(ids, stops)
            if len(steps) == decoding.max_new_tokens or not running.any():
                break
            states = tree.grow(ids)
        if streamer:
            streamer.end()
        return steps

    def _generate(
        self,
        images: Sequence[EncodedImage],
        prefixes: Sequence[Prefix],
        prompts: Sequence[list[int]],
        decoding: Decoding,
        stream: Stream | None,
    ) -> list[list[int]]:
        """Decodes with transformers' `generate`, each text in a row of its own."""
        ids, mask, start = self._padded(prefixes, prompts)
        copies = max(decoding.samples, decoding.num_beams)
        # Cast, because transformers' own types do not fit together.
        generated = cast(Any, self.model).generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=stack([prefix for prefix in prefixes for _ in range(copies)]),
            mm_encoder_outputs=self._features(images, ids[:, start:]),
            **decoding.options(),
        )
        rows = [self._to_end(row) for row in generated[:, ids.shape[1] :].tolist()]
        for number, row in enumerate(rows if stream else ()):
            cast(Stream, stream)(number, self._text(row), True)
        return rows

    def _to_end(self, ids: list[int]) -> list[int]:
        """Written ids up to the first token that ends the text."""
        end = next((i for i, token in enumerate(ids) if token in self.stops), len(ids))
        return ids[: end + 1]

    def _text(self, ids: Sequence[int]) -> str:
        tokenizer = self.processor.tokenizer
        return cast(str, tokenizer.decode(ids, skip_special_tokens=True)).strip()


class _Streamer:
    """Takes the tokens of a batch step by step, and hands their text on as far as it is certain."""

    def __init__(self, writer: Writer, rows: int, stream: Stream) -> None:
        self._writer, self._stream = writer, stream
        self._ids: list[list[int]] = [[] for _ in range(rows)]
        self._sent = [""] * rows
        self._open = set(range(rows))

    def put(self, value: torch.Tensor) -> None:
        """Takes a token for each row."""
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
