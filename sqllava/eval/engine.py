"""The model under evaluation: questions and pictures -> one left-padded batch -> texts.

Ours and transformers' own image-text models answer alike; only how a prompt is made differs.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from sqllava.checkpoint.load import load
from sqllava.conversation import IMAGE, Turn, get_template
from sqllava.encoding import encode_prompt
from sqllava.model.processor import SQLlavaProcessor

logger = logging.getLogger(__name__)

ImagePreparation = Literal["pad", "crop"]
Batch = dict[str, torch.Tensor]

# Published spellings of the template's name.
TEMPLATE_NAMES = {"vicuna_v1": "v1"}
EOS_MARK = "</s>"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
_WHOLE_FILE = 2 << 30
_SAMPLE = 8 << 20


@dataclass(frozen=True)
class Decoding:
    """How answers are written: greedily, unless sampling is asked for by name.

    Attributes:
        temperature: of the sampling.
    """

    max_new_tokens: int
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if not self.do_sample and (self.temperature or self.top_p is not None):
            raise ValueError(
                f"temperature {self.temperature} and top_p {self.top_p} need --do-sample: "
                "benchmarks are decoded greedily"
            )
        if self.do_sample and not self.temperature:
            raise ValueError("sampling needs a temperature above 0")

    def options(self) -> dict[str, Any]:
        """The keyword arguments of transformers' `generate`."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.do_sample,
            "num_beams": 1,
        }
        if self.do_sample:
            options |= {"temperature": self.temperature, "top_p": self.top_p or 1.0, "top_k": 0}
        return options


class Prompter(Protocol):
    """Makes batches; it goes to worker processes, so it holds no weights."""

    def batch(self, texts: Sequence[str], images: Sequence[Image.Image | None]) -> Batch:
        """Makes input_ids and attention_mask [B, S], left-padded, and what the pictures become."""

    def describe(self) -> dict[str, Any]:
        """What decides the inputs, for the answers' header."""


@dataclass
class OurPrompter:
    """Prompts in a template of ours, with the token ids of training."""

    processor: SQLlavaProcessor
    template: str
    image_preparation: ImagePreparation

    def batch(self, texts: Sequence[str], images: Sequence[Image.Image | None]) -> Batch:
        prompts = [
            encode_prompt(
                [Turn("user", text, images=int(image is not None)), Turn("assistant", None)],
                self.template,
                self.processor.tokenizer,
                self.processor.image_tokens,
            )
            for text, image in zip(texts, images, strict=True)
        ]
        batch = self.processor.pad(prompts)
        pictures = [image for image in images if image is not None]
        if pictures:
            prepared = self.processor.image_processor(
                pictures, do_pad=self.image_preparation == "pad", return_tensors="pt"
            )
            batch["pixel_values"] = prepared["pixel_values"]  # [pictures, 3, H, W]
        return batch

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
        pictures = [image for image in images if image is not None]
        inputs = self.processor(
            text=prompts,
            images=pictures or None,
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
    """A model that answers batches.

    Attributes:
        prompter: as a task wants it, by `for_task`.
        model_id: what the answers call it.
        fingerprint: of its weights.
    """

    model: Any
    processor: Any
    model_id: str
    fingerprint: Mapping[str, str]
    prompter: Prompter

    def for_task(self, template: str, image_preparation: ImagePreparation) -> "Engine":
        """The same model with prompts in a template; transformers' own models keep theirs."""
        if not isinstance(self.processor, SQLlavaProcessor):
            return self
        if self.model.config.image_aspect_ratio != "pad":
            image_preparation = "crop"
        template = TEMPLATE_NAMES.get(template, template)
        get_template(template)
        return replace(self, prompter=OurPrompter(self.processor, template, image_preparation))

    @torch.inference_mode()
    def answer(self, batch: Batch, decoding: Decoding) -> list[str]:
        """Writes a text for each row of a batch."""
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        ids = self.model.generate(**batch, **decoding.options())  # [B, S + new]
        written = ids[:, batch["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [text.strip().removesuffix(EOS_MARK).strip() for text in texts]

    def describe(self) -> dict[str, Any]:
        """What decides the answers, for their header."""
        return {
            "model_id": self.model_id,
            "weights": dict(self.fingerprint),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **self.prompter.describe(),
        }


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
    if is_transformers_model(path):
        model, processor = _open_hub_model(path, dtype, device)
        prompter: Prompter = HubPrompter(processor)
    else:
        model, processor = load(path, base, vision_tower, dtype=dtype, device=device)
        prompter = OurPrompter(processor, "v1", "pad")
    _decode_plainly(model, processor.tokenizer)
    return Engine(model, processor, model_id(path), fingerprint(Path(path)), prompter)


def is_transformers_model(path: str) -> bool:
    """Whether a model is transformers' own: its config has the parts of one, and is not ours."""
    config = Path(path, "config.json")
    if not Path(path).is_dir():
        return True  # a hub id
    if not config.is_file():
        return False
    values = json.loads(config.read_text(encoding="utf-8"))
    return values.get("model_type") != "sqllava" and "vision_config" in values


def _open_hub_model(path: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "auto" and place.type == "cpu":
        dtype = "float32"  # half precision is slow, or missing, on most CPUs
    AutoConfig.from_pretrained(path)  # says what is wrong with a path or id
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    processor = AutoProcessor.from_pretrained(path)
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
    """Decoding as the header records it."""
    return asdict(decoding)
