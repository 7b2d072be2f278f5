"""Writer: open conversations about images -> texts, with everything that is shared computed once.

The engine under asking and evaluation. Pictures are encoded once, what the prompts of an image
share is read once (`prefix.py`), and the texts of a batch are decoded together (`tree.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sqllava.conversation import Turn
from sqllava.generation.decoding import GREEDY, Decoding
from sqllava.generation.prefix import (
    UNREAD,
    Prefix,
    Trunks,
    pad_left,
    shared_length,
    unstack,
)
from sqllava.generation.tree import Tree
from sqllava.model.model import SQLlavaForConditionalGeneration
from sqllava.model.processor import SQLlavaProcessor

# How many tokens the branches of a row may begin with together: each is compared with all, which
# costs little up to here; more of them go to more rows, each with its copy of the trunk.
ROW = 1024

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


# A picture, one as the processor prepares it (pixel values [3, H, W]), or one that is encoded.
Picture = Image.Image | torch.Tensor | EncodedImage
# What a conversation is about: a picture, several, or none.
Subject = Picture | Sequence[Picture] | None


@dataclass(frozen=True)
class Begun:
    """Prompts that have been read as far as those about the same images go together.

    Attributes:
        prompts: their ids, whole.
        images: of each trunk, what its prompts are about.
        trunk_of: the trunk's number, for each prompt.
    """

    prompts: Sequence[list[int]]
    images: Sequence[Sequence[EncodedImage]]
    trunk_of: Sequence[int]
    trunks: Trunks

    def rest(self, number: int) -> list[int]:
        """What has not been read of a prompt."""
        return self.prompts[number][len(self.trunks.ids[self.trunk_of[number]]) :]


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
        pictures = {id(image): image for image in images if not isinstance(image, EncodedImage)}
        encoded: dict[int, EncodedImage] = {}
        if pictures:
            pixels = torch.stack([self._pixels(picture) for picture in pictures.values()])
            outputs = self.model.model.get_image_features(pixels.to(self.model.device))
            features: Any = outputs.pooler_output
            encoded = {
                key: EncodedImage(of_one, remember)
                for key, of_one in zip(pictures, features, strict=True)
            }
        return [encoded.get(id(image)) or cast(EncodedImage, image) for image in images]

    def _pixels(self, picture: Image.Image | torch.Tensor) -> torch.Tensor:
        if isinstance(picture, torch.Tensor):
            return picture
        return self.processor.prepare_image(picture)

    def complete(
        self,
        conversations: Sequence[Sequence[Turn]],
        images: Sequence[Subject],
        decoding: Decoding = GREEDY,
        stream: Stream | None = None,
    ) -> list[list[str]]:
        """The texts of `write`, each without blanks around it."""
        written = self.write(conversations, images, decoding, stream)
        return [[one.text for one in several] for several in written]

    def write(
        self,
        conversations: Sequence[Sequence[Turn]],
        images: Sequence[Subject],
        decoding: Decoding = GREEDY,
        stream: Stream | None = None,
    ) -> list[list[Written]]:
        """Writes the open last turn of each conversation, all of them together.

        Args:
            conversations: about images that belong to its first turn, where no turn holds them.
            images: what each conversation is about: an image, several, or none. An image may stand
                there several times: what its conversations share at their beginning is read once.
            stream: takes the texts as they are written, numbered through all conversations; with
                beams, whole at the end.

        Returns:
            For each conversation `decoding.samples` texts.

        Raises:
            ValueError: a conversation's turns hold another number of images than it is about.
        """
        if len(conversations) != len(images):
            raise ValueError(f"{len(conversations)} conversations, but {len(images)} images")
        if not conversations:
            return []
        about = [_several(subject) for subject in images]
        prompts = [
            self.processor.encode_turns(_with_images(turns, len(several)))
            for turns, several in zip(conversations, about, strict=True)
        ]
        begun = self.begin(prompts, about)
        return self.finish(begun, range(len(prompts)), decoding, stream)

    @torch.no_grad()
    def begin(self, prompts: Sequence[list[int]], about: Sequence[Sequence[Picture]]) -> Begun:
        """Encodes images, and reads what the prompts about them share: the costly part, once.

        Args:
            prompts: ids, with placeholders of images.
            about: the images of each prompt, in the order of its placeholders.
        """
        encoded = iter(self.encode([picture for several in about for picture in several]))
        images = [[next(encoded) for _ in several] for several in about]
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, of_one in enumerate(images):
            groups.setdefault(tuple(map(id, of_one)), []).append(number)
        trunk_of = [0] * len(prompts)
        subjects, targets = [], []
        for trunk, members in enumerate(groups.values()):
            several = [prompts[number] for number in members]
            # A prompt's last token stays out, for the text to begin from.
            length = min(shared_length(several), *(len(prompt) - 1 for prompt in several))
            targets.append(several[0][:length])
            subjects.append(images[members[0]])
            for number in members:
                trunk_of[number] = trunk
        trunks = self._read(subjects, targets)
        return Begun(prompts, subjects, trunk_of, trunks)

    @torch.no_grad()
    def finish(
        self,
        begun: Begun,
        numbers: Sequence[int],
        decoding: Decoding = GREEDY,
        stream: Stream | None = None,
    ) -> list[list[Written]]:
        """Writes what comes next of some of the prompts that have been begun, all together.

        Prompts may be finished in several rounds, as memory allows; what they share stays read.

        Returns:
            For each number `decoding.samples` texts.
        """
        together = self._takes_branches(begun, numbers) and self.branches(decoding)
        decode = self._decode_branches if together else self._generate
        rows = decode(begun, numbers, decoding, stream)
        written = [Written(self._text(row), bool(row) and row[-1] in self.stops) for row in rows]
        n = decoding.samples
        return [written[i : i + n] for i in range(0, len(written), n)]

    @property
    def stops(self) -> frozenset[int]:
        """The tokens that end a text."""
        stops = cast(Any, self.model).generation_config.eos_token_id
        return frozenset(stops if isinstance(stops, list) else () if stops is None else (stops,))

    def branches(self, decoding: Decoding) -> bool:
        """Whether texts about an image are decoded behind one copy of what they share.

        They are where that gives what `generate` would: nothing but `Decoding` shapes the texts, no
        beams are searched, and the attention takes a mask of ours.
        """
        config: Any = self.model.config.get_text_config()
        shaped = set(cast(Any, self.model).generation_config.to_diff_dict())
        masks = config._attn_implementation in ("sdpa", "eager")
        plain = not (shaped - _SHAPED_HERE) and decoding.num_beams == 1
        return masks and plain and not getattr(config, "sliding_window", None)

    def _takes_branches(self, begun: Begun, numbers: Sequence[int]) -> bool:
        """Whether all images are in the trunks."""
        placeholder = self.model.config.image_token_id
        return not any(placeholder in begun.rest(number) for number in numbers)

    def _read(
        self, images: Sequence[Sequence[EncodedImage]], targets: Sequence[list[int]]
    ) -> Trunks:
        """Trunks that hold exactly the target ids: remembered, cut, and read on as needed."""
        memories = [_memory(several) for several in images]
        prefixes = [
            memory.prefix.cut(shared_length([memory.prefix.ids, ids])) if memory else UNREAD
            for memory, ids in zip(memories, targets, strict=True)
        ]
        fresh = [row for row, prefix in enumerate(prefixes) if not prefix.ids]
        if len(fresh) > 1:
            # The text before the image is the same for all.
            before = targets[fresh[0]][: shared_length([targets[row] for row in fresh])]
            placeholder = self.model.config.image_token_id
            before = before[: before.index(placeholder)] if placeholder in before else before
            system = self._read_on([UNREAD], [before], [[]]).prefix(0) if before else UNREAD
            prefixes = [prefix if prefix.ids else system for prefix in prefixes]
        behind = [row for row, ids in enumerate(targets) if len(prefixes[row].ids) < len(ids)]
        if behind:
            read = self._read_on(
                [prefixes[row] for row in behind],
                [targets[row] for row in behind],
                [images[row] for row in behind],
            )
        if len(behind) < len(targets):
            for place, row in enumerate(behind):
                prefixes[row] = read.prefix(place)
            read = Trunks.of(prefixes, self.model.device)
        for row, memory in enumerate(memories):
            if memory and memory.remembers:
                memory.prefix = read.prefix(row)
        return read

    def _read_on(
        self,
        prefixes: Sequence[Prefix],
        targets: Sequence[list[int]],
        images: Sequence[Sequence[EncodedImage]],
    ) -> Trunks:
        """Reads from the prefixes' ends to the targets', all rows together."""
        trunks = Trunks.of(prefixes, self.model.device)
        rests = [ids[len(held) :] for held, ids in zip(trunks.ids, targets, strict=True)]
        ids, mask = self._padded(rests)
        mask = torch.cat([trunks.mask, mask], 1)
        self.model.model(
            input_ids=cast(Any, ids),
            attention_mask=mask,
            position_ids=cast(Any, (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]),
            past_key_values=trunks.cache,
            mm_encoder_outputs=self._features(images, trunks.ids, targets),
            use_cache=True,
        )
        return Trunks(list(targets), mask, trunks.cache)

    def _features(
        self,
        images: Sequence[Sequence[EncodedImage]],
        read: Sequence[list[int]],
        targets: Sequence[list[int]],
    ) -> dict[str, BaseModelOutputWithPooling] | None:
        """The images whose placeholders stand between what is read and the targets' ends."""
        placeholder, size = self.model.config.image_token_id, self.processor.image_tokens
        features: Any = [
            image.features
            for several, before, ids in zip(images, read, targets, strict=True)
            for image in several[before.count(placeholder) // size : ids.count(placeholder) // size]
        ]
        if not features:
            return None
        return {"image": BaseModelOutputWithPooling(pooler_output=features)}

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask [B, S], on the model's device."""
        pad = cast(int, self.processor.tokenizer.pad_token_id)
        ids, mask = pad_left(rows, pad)
        return ids.to(self.model.device), mask.to(self.model.device)

    def _decode_branches(
        self,
        begun: Begun,
        numbers: Sequence[int],
        decoding: Decoding,
        stream: Stream | None,
    ) -> list[list[int]]:
        """Decodes all texts about an image as branches of what their prompts share."""
        texts = [number for number in numbers for _ in range(decoding.samples)]
        rests = [begun.rest(number) for number in texts]
        rows = _dealt([begun.trunk_of[number] for number in texts], list(map(len, rests)))
        trunk_numbers = [begun.trunk_of[texts[row[0]]] for row in rows]
        trunks = begun.trunks.rewound()
        if trunk_numbers != list(range(len(trunks.ids))):
            trunks = trunks.rows(trunk_numbers)
        places = {
            text: (row, column) for row, held in enumerate(rows) for column, text in enumerate(held)
        }
        branches = [[rests[text] for text in row] for row in rows]
        tree = Tree(self.model.model, trunks)
        steps = self._grow(tree, branches, [places[n] for n in range(len(texts))], decoding, stream)
        written = [self._to_end(ids) for ids in torch.stack(steps, 1).tolist()]
        for row, (number, held) in enumerate(zip(trunk_numbers, rows, strict=True)):
            memory = _memory(begun.images[number])
            if memory and memory.remembers and len(held) == trunk_numbers.count(number) == 1:
                # The last token of the batch was written, but never read.
                ids = [*begun.prompts[texts[held[0]]], *written[held[0]][: len(steps) - 1]]
                columns = tree.columns(row, 0).nonzero().flatten()[: len(ids)]
                memory.prefix = unstack(tree.cache, row, columns, ids)
        return written

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
        running = torch.ones(len(places), dtype=torch.bool, device=device)
        steps: list[torch.Tensor] = []
        while True:
            logits = self.model.lm_head(states[rows, columns]).float()  # [texts, V]
            if decoding.temperature is None:
                drawn = logits.argmax(-1)
            else:
                scores = warp(cast(Any, None), cast(Any, logits))
                drawn = scores.softmax(-1).multinomial(1).squeeze(1)
            drawn = drawn.masked_fill(~running, pad)
            steps.append(drawn)
            if streamer:
                streamer.put(steps[-1])
            running &= ~torch.isin(drawn, stops)
            if len(steps) == decoding.max_new_tokens or not running.any():
                break
            ids = torch.full(states.shape[:2], pad, device=device)
            ids[rows, columns] = drawn
            states = tree.grow(ids)
        if streamer:
            streamer.end()
        return steps

    def _generate(
        self,
        begun: Begun,
        numbers: Sequence[int],
        decoding: Decoding,
        stream: Stream | None,
    ) -> list[list[int]]:
        """Decodes with transformers' `generate`, each text in a row of its own."""
        trunk_of = [begun.trunk_of[number] for number in numbers]
        copies = max(decoding.samples, decoding.num_beams)
        begun.trunks.rewound()
        trunks = begun.trunks.rows([trunk for trunk in trunk_of for _ in range(copies)])
        read = begun.trunks.tokens(cast(int, self.processor.tokenizer.pad_token_id))[trunk_of]
        rest, mask = self._padded([begun.rest(number) for number in numbers])
        ids = torch.cat([read, rest], 1)
        # Cast, because transformers' own types do not fit together.
        generated = cast(Any, self.model).generate(
            input_ids=ids,
            attention_mask=torch.cat([begun.trunks.mask[trunk_of], mask], 1),
            past_key_values=trunks.cache,
            mm_encoder_outputs=self._features(
                [begun.images[trunk] for trunk in trunk_of],
                [begun.trunks.ids[trunk] for trunk in trunk_of],
                [begun.prompts[number] for number in numbers],
            ),
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


def _several(subject: Subject) -> Sequence[Picture]:
    """What a conversation is about, as a sequence."""
    if subject is None:
        return ()
    one = isinstance(subject, Image.Image | torch.Tensor | EncodedImage)
    return (cast(Picture, subject),) if one else cast(Sequence[Picture], subject)


def _memory(images: Sequence[EncodedImage]) -> EncodedImage | None:
    """The image that may remember what is said: the only one."""
    return images[0] if len(images) == 1 else None


def _with_images(turns: Sequence[Turn], count: int) -> list[Turn]:
    """Puts the images into the first turn, if no turn holds them yet."""
    held = sum(turn.images for turn in turns)
    if held not in (0, count):
        raise ValueError(f"the conversation's turns hold {held} images, but {count} were given")
    if held == count:
        return list(turns)
    if turns[0].text is None:
        raise ValueError("nothing stands before the open turn: give a context that is not empty")
    return [replace(turns[0], images=count), *turns[1:]]


def _dealt(trunk_of: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Deals texts to rows: those of a trunk to one row, or to several where they are long.

    Args:
        trunk_of, lengths: each text's trunk, and how much of it is to be read, at least a token.

    Returns:
        The numbers of each row's texts, in the order of the trunks; the rows of a trunk are of like
        length.
    """
    texts_of: dict[int, list[int]] = {}
    for text, trunk in enumerate(trunk_of):
        texts_of.setdefault(trunk, []).append(text)
    rows: list[list[int]] = []
    for _, texts in sorted(texts_of.items()):
        total = sum(lengths[text] for text in texts)
        count, start = math.ceil(total / ROW), 0
        of_trunk: list[list[int]] = [[] for _ in range(count)]
        for text in texts:
            middle = start + lengths[text] / 2
            of_trunk[int(middle * count / total)].append(text)
            start += lengths[text]
        rows += filter(None, of_trunk)
    return rows
