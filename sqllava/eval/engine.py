"""The model under evaluation: questions and pictures -> a batch -> texts.

Our models answer through the writer, which reads each picture once; transformers' own image-text
models take a left-padded batch that holds a picture for each question.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from sqllava.checkpoint import dtype_name
from sqllava.checkpoint.load import load
from sqllava.checkpoint.parts import config_dict
from sqllava.checkpoint.place import choose_device
from sqllava.conversation import IMAGE, Turn, form, get_template
from sqllava.encoding import encode_prompt
from sqllava.errors import refused_code
from sqllava.eval.plan import Costs
from sqllava.eval.records import read_record
from sqllava.generation.decoding import Decoding
from sqllava.generation.writer import Writer
from sqllava.model.processor import SQLlavaProcessor
from sqllava.pixels import ImagePreparer

logger = logging.getLogger(__name__)

ImagePreparation = Literal["pad", "crop"]
Batch = dict[str, torch.Tensor]

# Published spellings of the template's name.
TEMPLATE_NAMES = {"vicuna_v1": "v1"}
EOS_MARK = "</s>"
# Of the decoding, in every header.
RECORDED = ("max_new_tokens", "do_sample", "temperature", "top_p")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?", re.ASCII)
_PACKAGE = re.compile(r"requires the (\w+) library")  # how transformers names one
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
_WHOLE_FILE = 2 << 30
_SAMPLE = 8 << 20


@dataclass
class Prompts:
    """A batch for the writer.

    Attributes:
        ids: of each prompt.
        pixels: [P, 3, H, W], each picture once; None without any.
        pictures: each prompt's picture, a number from 0 to P - 1, or None.
    """

    ids: list[list[int]]
    pixels: torch.Tensor | None
    pictures: list[int | None]


class Prompter(Protocol):
    """Makes batches; it goes to worker processes, so it holds no weights."""

    def batch(self, texts: Sequence[str], images: Sequence[Image.Image | None]) -> Any:
        """Makes what `Engine.answer` takes of questions with their pictures; a picture that stands
        there several times, the same object, is prepared once where that can be shared."""

    def describe(self) -> dict[str, Any]:
        """What decides the inputs, for the answers' header."""


@dataclass
class OurPrompter:
    """Prompts in a template of ours, with the token ids of training."""

    processor: SQLlavaProcessor
    template: str
    image_preparation: ImagePreparation

    def batch(self, texts: Sequence[str], images: Sequence[Image.Image | None]) -> Prompts:
        ids = [self.ids(text, image is not None) for text, image in zip(texts, images, strict=True)]
        pictures = {id(image): image for image in images if image is not None}
        numbers = {key: number for number, key in enumerate(pictures)}
        pixels = None
        if pictures:
            prepare = ImagePreparer(
                self.processor.image_processor, pad=self.image_preparation == "pad"
            )
            pixels = torch.stack([prepare(one) for one in pictures.values()])  # [P, 3, H, W]
        return Prompts(ids, pixels, [numbers.get(id(image)) for image in images])

    def ids(self, text: str, with_image: bool) -> list[int]:
        """A question's ids, up to where its answer begins."""
        turns = [Turn("user", text, images=int(with_image)), Turn("assistant", None)]
        return encode_prompt(
            turns, self.template, self.processor.tokenizer, self.processor.image_tokens
        )

    def describe(self) -> dict[str, Any]:
        return {"template": self.template, "image_preparation": self.image_preparation}


@dataclass
class HubPrompter:
    """Prompts of a transformers model: its chat template, or LLaVA-1.5's form if it has none."""

    processor: Any

    def batch(self, texts: Sequence[str], images: Sequence[Image.Image | None]) -> Batch:
        prompts = [
            self.prompt(text, image is not None) for text, image in zip(texts, images, strict=True)
        ]
        # A list for each prompt: some processors (Gemma 3's) take a flat one for a single prompt's.
        pictures = [[] if image is None else [image] for image in images]
        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            text=prompts,
            images=pictures if any(pictures) else None,
            # Many templates write it themselves, and the tokenizer would put a second one before.
            add_special_tokens=not (bos and prompts[0].startswith(bos)),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return dict(inputs)

    def prompt(self, text: str, with_image: bool) -> str:
        """The prompt's text, up to where the answer begins."""
        if not getattr(self.processor, "chat_template", None):
            return f"USER: {(IMAGE + chr(10)) * with_image}{text} ASSISTANT:"
        content = [{"type": "image"}] * with_image + [{"type": "text", "text": text}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    def describe(self) -> dict[str, Any]:
        has_template = bool(getattr(self.processor, "chat_template", None))
        return {
            "template": "chat_template" if has_template else "USER/ASSISTANT",
            "image_preparation": type(self.processor.image_processor).__name__,
        }


@dataclass
class Engine:
    """A model that answers batches; this one a model of transformers, which reads each question by
    itself, and `OurEngine` one of ours.

    Attributes:
        prompter: as a task wants it, by `for_task`.
        model_id: what the answers call it.
        fingerprint: of its weights.
        remarks: what more the answers' header says.
    """

    model: Any
    processor: Any
    model_id: str
    fingerprint: Mapping[str, str]
    prompter: Prompter
    remarks: Mapping[str, str] = field(default_factory=dict)

    def for_task(
        self, template: str, image_preparation: ImagePreparation, chosen: str | None = None
    ) -> "Engine":
        """The same model with a task's prompts; transformers' own models keep theirs.

        Args:
            template: the task's; a model that was trained in another form is asked in its own.
            chosen: the user's, in place of both.
        """
        if chosen:
            logger.warning(
                "template %r is not used: a model of transformers has its own prompts", chosen
            )
        return self

    def costs(self, decoding: Decoding) -> Costs | None:
        """What questions take of a batch, where those about one picture share it; else None."""
        return None

    @property
    def context(self) -> int | None:
        """How many tokens the language model reads; None if its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def lengths(self, batch: Any) -> list[int]:
        """The tokens of each prompt of a batch, its picture's among them."""
        return batch["attention_mask"].sum(1).tolist()  # [B]

    @torch.inference_mode()
    def answer(self, batch: Any, decoding: Decoding) -> list[str]:
        """Writes a text for each question of a batch."""
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        ids = self.model.generate(**batch, **decoding.options())  # [B, S + new]
        written = ids[:, batch["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [_cleaned(text) for text in texts]

    def answers(
        self, batch: Any, rounds: Sequence[Sequence[int]], decoding: Decoding
    ) -> Iterator[list[str]]:
        """Writes texts round by round; here there is one round, the whole batch."""
        yield self.answer(batch, decoding)

    def describe(self) -> dict[str, Any]:
        """What decides the answers, for their header."""
        return {
            "model_id": self.model_id,
            "weights": dict(self.fingerprint),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **self.prompter.describe(),
        }


class OurEngine(Engine):
    """A model of ours: what questions about a picture share is read once."""

    def for_task(
        self, template: str, image_preparation: ImagePreparation, chosen: str | None = None
    ) -> Engine:
        if self.model.config.image_aspect_ratio != "pad":
            image_preparation = "crop"
        template, remarks = choose_template(
            self.processor.conversation_template,
            TEMPLATE_NAMES.get(template, template),
            TEMPLATE_NAMES.get(chosen, chosen) if chosen else None,
        )
        prompter = OurPrompter(self.processor, template, image_preparation)
        return replace(self, prompter=prompter, remarks=remarks)

    def costs(self, decoding: Decoding) -> Costs | None:
        prompter = cast(OurPrompter, self.prompter)
        if not Writer(self.model, self.processor).branches(decoding):
            return None
        image, text = (len(prompter.ids("", with_image)) for with_image in (True, False))
        return Costs(image, text, decoding.max_new_tokens)

    def lengths(self, batch: Prompts) -> list[int]:
        return [len(ids) for ids in batch.ids]

    def answer(self, batch: Prompts, decoding: Decoding) -> list[str]:
        return next(self.answers(batch, [range(len(batch.ids))], decoding))

    def answers(
        self, batch: Prompts, rounds: Sequence[Sequence[int]], decoding: Decoding
    ) -> Iterator[list[str]]:
        """Writes texts round by round; what the batch's questions share is read once for all.

        Args:
            rounds: numbers of the batch's prompts.
        """
        writer = Writer(self.model, self.processor)
        pictures = writer.encode([] if batch.pixels is None else list(batch.pixels))
        about = [[] if number is None else [pictures[number]] for number in batch.pictures]
        begun = writer.begin(batch.ids, about)
        for numbers in rounds:
            written = writer.finish(begun, numbers, decoding)
            yield [_cleaned(texts[0].text) for texts in written]


def _cleaned(text: str) -> str:
    return text.strip().removesuffix(EOS_MARK).strip()


def choose_template(model: str, task: str, chosen: str | None) -> tuple[str, dict[str, str]]:
    """The template to ask a model in, and what the header says of it.

    The published protocol asks a model trained in `v1_sq` in `v1`: only the system text differs. A
    model that was trained in another form of turns than the task's is asked in its own.

    Args:
        model, task: their templates; a model's that only writes captions is of no form.
        chosen: the user's, which is used whatever the model's.

    Raises:
        ValueError: there is no such template, or it takes no questions.
    """
    own, forms = form(get_template(model)), {}
    for name in filter(None, (task, chosen)):
        forms[name] = form(get_template(name))
    foreign = {name for name, other in forms.items() if own is not None and other != own}
    name = chosen or (model if task in foreign else task)
    if form(get_template(name)) is None:
        raise ValueError(f"template {name!r} writes captions alone: nothing can be asked in it")
    if name in foreign:
        logger.warning(
            "ASKED IN ANOTHER FORM: template %r, but the model was trained in %r, which writes "
            "turns otherwise; without --template it is asked in its own",
            name,
            model,
        )
    elif name != task and not chosen:
        logger.info(
            "asked in the model's own template, %r: the task's, %r, writes turns otherwise",
            model,
            task,
        )
    return name, {"model_template": model, "task_template": task} if foreign else {}


def open_engine(
    path: str,
    base: str | None = None,
    vision_tower: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> Engine:
    """Opens a model for evaluation: one of ours, or any image-text model of transformers.

    Args:
        path: a folder, or a hub id of a transformers model.
        base, vision_tower: of an adapter, where they have moved.
    """
    kind: type[Engine]
    prompter: Prompter
    if is_transformers_model(path):
        model, processor = _open_hub_model(path, dtype, device)
        kind, prompter = Engine, HubPrompter(processor)
    else:
        model, processor = load(path, base, vision_tower, dtype=dtype, device=device)
        kind, prompter = OurEngine, OurPrompter(processor, "v1", "pad")
    _decode_plainly(model, processor.tokenizer)
    return kind(model, processor, model_id(path), fingerprint(Path(path)), prompter)


def is_transformers_model(path: str) -> bool:
    """Whether a model is transformers' own: its config has the parts of one, and is not ours.

    Raises:
        FileNotFoundError: the path is neither a folder nor anything that the hub could hold.
    """
    config = Path(path, "config.json")
    if Path(path).is_dir():
        if not config.is_file():
            return False
        values = read_record(config).row
    elif Path(path).exists() or not _HUB_ID.fullmatch(path):
        raise FileNotFoundError(f"no model folder {path} (nor is it an id of the hub's)")
    else:
        try:
            values = config_dict(path)  # of a hub id
        except OSError:
            return True  # whose opening says what is wrong with it
    return values.get("model_type") != "sqllava" and "vision_config" in values


def _in_one_sentence(
    opening: Callable[[str, str, str | None], tuple[Any, Any]],
) -> Callable[[str, str, str | None], tuple[Any, Any]]:
    """Says with a model's name what transformers says in paragraphs, or as a missing import."""

    @wraps(opening)
    def opened(path: str, dtype: str, device: str | None) -> tuple[Any, Any]:
        try:
            return opening(path, dtype, device)
        except (ImportError, OSError, ValueError) as error:
            if isinstance(error, ValueError) and "\n" not in str(error):
                raise
            said = next((line for line in str(error).splitlines() if line.strip()), repr(error))
            package = _PACKAGE.search(said)
            more = f" (pip install {package.group(1).lower()})" if package else ""
            if not Path(path).is_dir():
                more = " (a model is a folder, or an id of the hub's that can be fetched)"
            raise ValueError(f"{path}: {said.strip().split('. ')[0]}{more}") from error

    return opened


@_in_one_sentence
def _open_hub_model(path: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    place = choose_device(device)
    dtype = dtype_name(dtype)
    if dtype == "auto" and place.type == "cpu":
        dtype = "float32"  # half precision is slow, or missing, on most CPUs
    with refused_code(path):
        # Says what is wrong with a path or id.
        AutoConfig.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, trust_remote_code=False
        )
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return cast(Any, model).to(place).eval(), processor


def _decode_plainly(model: Any, tokenizer: Any) -> None:
    """Keeps only the special tokens of a model's generation settings.

    Some ship with sampling or a repetition penalty, which would get into the scores unseen.
    """
    given = model.generation_config
    eos = given.eos_token_id if given.eos_token_id is not None else tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=given.bos_token_id, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
    )


def model_id(path: str) -> str:
    """The last part of a model's path; with the run's name in front for a checkpoint."""
    parts = Path(path.rstrip("/")).resolve().parts if Path(path).exists() else Path(path).parts
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of each weight file; of very large ones, of size, first and last 8 MiB."""
    if not folder.is_dir():
        return {}
    paths = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})
    return {path.name: _digest(path) for path in paths if path.name != "training_args.bin"}


def _digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= _WHOLE_FILE:
            while block := file.read(_SAMPLE):
                digest.update(block)
            return digest.hexdigest()
        digest.update(str(size).encode() + file.read(_SAMPLE))
        file.seek(-_SAMPLE, 2)
        digest.update(file.read())
    return f"ends:{digest.hexdigest()}"


def decoding_settings(decoding: Decoding) -> dict[str, Any]:
    """Decoding as the header records it; what is seldom set only where it is."""
    settings = {name: getattr(decoding, name) for name in RECORDED}
    plain = Decoding()
    rare = {name: getattr(decoding, name) for name in ("top_k", "num_beams")}
    return settings | {n: value for n, value in rare.items() if value != getattr(plain, n)}
