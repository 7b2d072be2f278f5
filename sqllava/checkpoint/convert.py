"""A checkpoint in one layout -> the same in another: what `sqllava convert` does.

Weights stream from file to file, a piece of a shard at a time, so that a model never has to fit
into memory. The result is made beside its place and renamed when it is whole.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import GenerationConfig

from sqllava.checkpoint import SHARD_BYTES, dtype_name
from sqllava.checkpoint.hub import local_folder
from sqllava.checkpoint.load import (
    Layout,
    Parts,
    adapter_processor,
    assemble,
    describe,
    layout_of,
    load,
    open_adapter,
    parts_of,
    sane_generation_config,
)
from sqllava.checkpoint.parts import (
    files_of,
    is_ours,
    language_model_names,
    load_processor,
    projector_names,
    tower_names,
    vision_config_of,
)
from sqllava.checkpoint.published import (
    VIT_LORA,
    published_config,
    published_name,
    read_json,
    write_json,
    write_published_adapter,
)
from sqllava.checkpoint.weights import ShardWriter, open_tensors, stream
from sqllava.errors import raise_faults
from sqllava.model.adapters import (
    ADAPTER_WEIGHTS,
    PEFT_PREFIX,
    Adapter,
    load_adapter_state,
    lora_config,
    part_of,
    prepare_training,
    skeleton,
)
from sqllava.model.card import RUN_FILE, model_card, training_facts
from sqllava.model.config import SQLlavaConfig
from sqllava.model.model import SQLlavaForConditionalGeneration
from sqllava.model.processor import SQLlavaProcessor

logger = logging.getLogger(__name__)

Target = Literal["ours", "published", "merged"]
RECORD_FILE = "sqllava_convert.json"
SMALL_BYTES = 64 * 10**6
CHECK_PROMPT = "USER: <image>\nWhat is shown? ASSISTANT:"


@dataclass(frozen=True)
class Options:
    """How a checkpoint is converted; see `sqllava convert --help`."""

    base: str | None = None
    vision_tower: str | None = None
    vit_lora: str | None = None
    dtype: str = "auto"
    shard_bytes: int = SHARD_BYTES
    check: bool = True
    image: str | None = None
    figures: str | None = None


def convert(
    source: str | Path, target: str | Path, to: Target, options: Options = Options()
) -> float | None:
    """Converts a checkpoint.

    A second run with the same arguments does nothing.

    Returns:
        The largest difference of logits between the merged and the unmerged model, where that
        was looked at.

    Raises:
        FileExistsError: something else is at the target.
        ValueError, FileNotFoundError: as `sqllava.load`.
    """
    source, target = local_folder(source), Path(target)
    dtype_name(options.dtype)
    layout = layout_of(source)
    record = {
        "source": str(source),
        "to": to,
        "options": _settings(options),
        "files": _stamps(source),
    }
    if target.exists():
        done = target / RECORD_FILE
        if done.is_file() and json.loads(done.read_text())["made"] == record:
            logger.info("%s is there already, made from the same files", target)
            return None
        raise FileExistsError(f"{target} exists; choose another place, or remove it")
    merging = to == "merged" and layout not in ("model", "published model")
    with _in_place_when_whole(target) as folder:
        _WRITERS[to](source, layout, folder, options)
        packages = {name: version(name) for name in ("sqllava", "torch", "transformers", "peft")}
        written = {"made": record, "packages": packages}
        (folder / RECORD_FILE).write_text(json.dumps(written, indent=1) + "\n")
        difference = None
        if merging and options.check:
            difference = merging_difference(source, folder, options)
    return difference


def _settings(options: Options) -> dict[str, Any]:
    kept = ("base", "vision_tower", "vit_lora", "dtype", "shard_bytes", "figures")
    return {name: getattr(options, name) for name in kept}


def _stamps(folder: Path) -> dict[str, list[int]]:
    """The size and the time of each file that a conversion may read."""
    files = [path for path in [*folder.glob("*"), *folder.glob(f"{VIT_LORA}/*")] if path.is_file()]
    stats = {str(path.relative_to(folder)): path.stat() for path in sorted(files)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


@contextlib.contextmanager
def _in_place_when_whole(target: Path) -> Iterator[Path]:
    """A folder beside the target, which takes its name when the block has ended well."""
    folder = target.parent / f".{target.name}.unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_ours(source: Path, layout: Layout, folder: Path, options: Options) -> None:
    if layout in ("model", "published model"):
        _write_merged(source, layout, folder, options)
        return
    _, config, processor, adapter = _open(source, options)
    peft_config = lora_config(skeleton(config), adapter.training)
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(folder))
    save_file(
        {key: value.contiguous() for key, value in adapter.state.items()},
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )
    config.architectures = [SQLlavaForConditionalGeneration.__name__]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    _copy_run(source, folder)


def _open(source: Path, options: Options) -> tuple[Parts, SQLlavaConfig, SQLlavaProcessor, Adapter]:
    parts = parts_of(source, options.base, options.vision_tower)
    config, processor = describe(parts)
    adapter = open_adapter(source, config, parts.vision_tower, options.vit_lora)
    if layout_of(source) == "adapter":
        processor = adapter_processor(source, processor)
    return parts, config, processor, adapter


def _copy_run(source: Path, folder: Path) -> None:
    if (source / RUN_FILE).is_file():
        shutil.copy(source / RUN_FILE, folder)


def _write_published(source: Path, layout: Layout, folder: Path, options: Options) -> None:
    if layout in ("model", "published model"):
        _write_published_model(source, layout, folder, options)
        return
    parts, config, _, adapter = _open(source, options)
    for part in (parts.language_model, parts.vision_tower):
        if is_ours(part):
            raise ValueError(
                f"{source} is trained on {part}, which the published code cannot load: merge the "
                "adapter first (--to merged), then convert the result"
            )
    layers = vision_config_of(parts.vision_tower).num_hidden_layers
    write_published_adapter(folder, adapter, config, layers)


@dataclass(frozen=True)
class _Stream:
    """Tensors of one folder: which to take, and our names for them."""

    path: str
    names: dict[str, str]

    def tensors(self, mapped_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
        for file in sorted(set(files_of(self.path).values())):
            for name, tensor in stream(file, mapped_bytes):
                if name in self.names:
                    yield self.names[name], tensor


@dataclass(frozen=True)
class _Whole:
    """A whole model before it is written: where its pieces lie, and what is merged into them."""

    config: SQLlavaConfig
    processor: SQLlavaProcessor
    streams: list[_Stream]
    adapter: Adapter | None
    generation: GenerationConfig

    def piece_bytes(self, options: Options) -> int:
        """How much is read and written at once: of large files a quarter of the largest, so that
        memory stays small beside it."""
        files = {file for one in self.streams for file in files_of(one.path).values()}
        largest = max(file.stat().st_size for file in files)
        return min(options.shard_bytes, max(largest // 4, SMALL_BYTES))

    def tensors(self, piece_bytes: int, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the model once, under our names, the adapter merged in.

        Raises:
            ValueError: tensors are missing, unexpected or of another shape.
        """
        expected = _shapes(self.config)
        adapter = self.adapter or Adapter({}, None, None, "")
        faults = []
        for one in self.streams:
            for name, tensor in one.tensors(piece_bytes):
                shape = expected.pop(name, None)
                if shape == tensor.shape:
                    yield name, adapter.merged(name, tensor, dtype)
                else:
                    wanted = tuple(shape) if shape is not None else "no such tensor"
                    found = f"{tuple(tensor.shape)} in {one.path}"
                    faults.append(f"unexpected: {name}: {found}, {wanted} in the model")
        for name in sorted(expected.keys() & {k.removeprefix(PEFT_PREFIX) for k in adapter.state}):
            del expected[name]
            yield name, adapter.state[PEFT_PREFIX + name].to(dtype)
        faults += [f"missing: {name}" for name in sorted(expected)]
        raise_faults(faults, "the weights do not make a whole model")


def _shapes(config: SQLlavaConfig) -> dict[str, torch.Size]:
    shapes = {name: value.shape for name, value in skeleton(config).state_dict().items()}
    if config.text_config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def _open_whole(source: Path, layout: Layout, options: Options) -> _Whole:
    if layout == "model":
        config = SQLlavaConfig.from_pretrained(source)
        names = {name: name for name in files_of(str(source))}
        return _Whole(
            config,
            load_processor(source),
            [_Stream(str(source), names)],
            None,
            _generation(str(source), config),
        )
    adapter = None
    if layout == "published model":
        parts = parts_of(source, options.base, options.vision_tower)
        config, processor = describe(parts)
    else:
        parts, config, processor, adapter = _open(source, options)
    language, tower = parts.language_model, parts.vision_tower
    streams = [
        _Stream(language, language_model_names(language)),
        _Stream(tower, tower_names(tower, config.vision_config.num_hidden_layers)),
    ]
    if adapter is None:
        streams.append(_Stream(language, projector_names(language)))
    generation = sane_generation_config(_generation(language, config), processor.tokenizer)
    return _Whole(config, processor, streams, adapter, generation)


def _generation(path: str, config: SQLlavaConfig) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return GenerationConfig.from_model_config(config.get_text_config())


def _write_merged(source: Path, layout: Layout, folder: Path, options: Options) -> None:
    whole = _open_whole(source, layout, options)
    piece_bytes, dtype = whole.piece_bytes(options), _dtype(whole, options)
    writer = ShardWriter(folder, piece_bytes)
    for name, tensor in whole.tensors(piece_bytes, dtype):
        writer.add(name, tensor)
    writer.finish()
    config = whole.config
    config.architectures = [SQLlavaForConditionalGeneration.__name__]
    config.dtype = config.text_config.dtype = config.vision_config.dtype = dtype
    config.training_facts = config.training_facts or training_facts(source)
    config.figures = read_json(Path(options.figures)) if options.figures else config.figures
    config.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(config))
    whole.generation.save_pretrained(folder)
    whole.processor.save_pretrained(folder)
    _copy_run(source, folder)


def _dtype(whole: _Whole, options: Options) -> torch.dtype:
    if dtype_name(options.dtype) != "auto":
        return getattr(torch, dtype_name(options.dtype))
    language = whole.streams[0]
    name = next(name for name, ours in language.names.items() if part_of(ours) == "language model")
    with open_tensors(files_of(language.path)[name]) as tensors:
        return tensors[name].dtype


def _write_published_model(source: Path, layout: Layout, folder: Path, options: Options) -> None:
    """A merged folder as published. The tower, which is tuned, goes into a folder of its own, and
    ends at the layer that is read."""
    whole = _open_whole(source, layout, options)
    piece_bytes, dtype = whole.piece_bytes(options), _dtype(whole, options)
    tower_folder = folder / "vision_tower"
    tower_folder.mkdir()
    model, tower = ShardWriter(folder, piece_bytes), ShardWriter(tower_folder, piece_bytes)
    for name, tensor in whole.tensors(piece_bytes, dtype):
        if part_of(name) == "vision tower":
            tower.add("vision_model." + name.removeprefix("model.vision_tower."), tensor)
        else:
            model.add(published_name(name), tensor)
    model.finish()
    tower.finish()
    config = whole.config
    config.dtype = config.vision_config.dtype = dtype
    config.vision_config.architectures = ["CLIPVisionModel"]
    config.vision_config.save_pretrained(tower_folder)
    write_json(
        tower_folder / "preprocessor_config.json",
        whole.processor.image_processor.to_dict() | {"image_processor_type": "CLIPImageProcessor"},
    )
    write_json(folder / "config.json", published_config(config, -1, tower_folder.name))
    whole.generation.save_pretrained(folder)
    whole.processor.tokenizer.save_pretrained(folder)
    _copy_run(source, folder)


_WRITERS = {"ours": _write_ours, "published": _write_published, "merged": _write_merged}


@torch.no_grad()
def merging_difference(source: Path, merged: Path, options: Options) -> float:
    """Compares a merged model with its base and the adapter beside it, as PEFT runs them.

    Returns:
        The largest difference of their logits about an image, in float32.

    Raises:
        ValueError: it is larger than rounding explains, for a model merged in float32.
    """
    processor = load_processor(merged)
    image = Image.open(options.image).convert("RGB") if options.image else _drawn_image()
    inputs = processor(images=image, text=CHECK_PROMPT)
    parts, _, _, adapter = _open(source, options)
    model = assemble(parts.language_model, parts.vision_tower, **parts.settings)[0]
    unmerged = prepare_training(model, adapter.training).eval()
    covered = {part_of(key) for key in adapter.state}
    load_adapter_state(cast(Any, unmerged), adapter.state, covered, str(source))
    expected = unmerged(**inputs).logits
    del model, unmerged
    whole, _ = load(merged, dtype=torch.float32, device="cpu")
    difference = (whole(**inputs).logits - expected).abs().max().item()
    limit = 1e-3 * max(1.0, expected.abs().max().item())
    if SQLlavaConfig.from_pretrained(merged).dtype == torch.float32 and difference > limit:
        raise ValueError(
            f"merging {source} changed its logits by {difference:.3g}: nothing is kept"
        )
    return difference


def _drawn_image() -> Image.Image:
    """A picture of all colors, so that the comparison does not depend on a file."""
    return Image.radial_gradient("L").convert("RGB").rotate(30)
