"""Weight files on disk: safetensors and .bin, one file or shards, read tensor by tensor and written
shard by shard, so that no checkpoint ever has to fit into memory."""

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# Of several forms the first that is there is read, as transformers does.
_FORMS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)

_LFS_POINTER = b"version https://git-lfs"


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a whole model."""
    return any((folder / name).is_file() for form in _FORMS for name in form)


def weight_files(folder: Path) -> list[Path]:
    """The files with a model's weights, in the order of their names.

    Raises:
        FileNotFoundError: there are none, or a shard that the index names is missing.
    """
    for index, single in _FORMS:
        if (folder / index).is_file():
            shards = sorted(set(_weight_map(folder / index).values()))
            missing = [name for name in shards if not (folder / name).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{folder}: {index} names shards that are missing: {missing}"
                )
            return [folder / name for name in shards]
        if (folder / single).is_file():
            return [folder / single]
    expected = ", ".join(single for _, single in _FORMS)
    raise FileNotFoundError(f"{folder}: no weights ({expected}, or shards with an index)")


def weight_names(folder: Path) -> dict[str, Path]:
    """The name of every tensor of a model, and the file that holds it.

    Raises:
        ValueError: the index names a tensor that its shard does not hold.
    """
    names = {name: file for file in weight_files(folder) for name in tensor_names(file)}
    for index, _ in _FORMS:
        if (folder / index).is_file():
            lost = sorted(_weight_map(folder / index).keys() - names.keys())
            if lost:
                raise ValueError(f"{folder / index} names tensors that no shard holds: {lost}")
            break
    return names


def _weight_map(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(file) for tensor, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: no object 'weight_map' in it") from error


def tensor_names(file: Path) -> list[str]:
    """The names of a file's tensors, without reading their values."""
    with open_tensors(file) as tensors:
        return list(tensors)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a (small) file."""
    with open_tensors(file) as tensors:
        return {name: tensors[name] for name in tensors}


@contextmanager
def open_tensors(file: Path) -> Iterator[Mapping[str, torch.Tensor]]:
    """A file's tensors by name, each read when it is asked for.

    Raises:
        ValueError: the file is damaged, or holds anything but tensors. Code in a pickle never runs.
    """
    with file.open("rb") as start:
        if start.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{file} is a Git LFS pointer, not the file itself: git lfs pull")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as tensors:
                yield _SafeTensors(tensors)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a safetensors file: {error}") from error
    else:
        yield _load_bin(file)


class _SafeTensors(Mapping[str, torch.Tensor]):
    def __init__(self, file: Any) -> None:
        self.file = file
        self.names = list(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    try:
        with file.open("rb") as start:
            # Files of torch before 1.6 are no zip archives, and cannot be mapped into memory.
            mapped = start.read(2) == b"PK"
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} was refused: not a plain file of tensors ({reason})") from error
    strange = not isinstance(tensors, dict) or [
        name for name, value in tensors.items() if not isinstance(value, torch.Tensor)
    ]
    if strange:
        raise ValueError(f"{file} was refused: not a dict of tensors")
    return tensors


def stream(file: Path, mapped_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A file's tensors one after the other.

    The file is mapped into memory anew after every `mapped_bytes`, so that what has been read
    leaves memory again.
    """
    names = tensor_names(file)
    while names:
        mapped = 0
        with open_tensors(file) as tensors:
            while names and mapped < mapped_bytes:
                name = names.pop(0)
                tensor = tensors[name]
                mapped += tensor.nbytes
                yield name, tensor
        del tensor, tensors


class ShardWriter:
    """Writes tensors into safetensors shards with their index, a shard at a time.

    Args:
        folder: where to write; nothing is there under a final name before `finish`.
        shard_bytes: largest size of a shard, except where one tensor alone is larger.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.waiting: dict[str, torch.Tensor] = {}
        self.waiting_bytes = 0
        self.total_bytes = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Adds a tensor, and writes a shard first if it no longer fits."""
        if self.waiting and self.waiting_bytes + tensor.nbytes > self.shard_bytes:
            self._write()
        self.waiting[name] = tensor.contiguous()
        self.waiting_bytes += tensor.nbytes

    def finish(self) -> None:
        """Writes the last shard, gives all of them their names, and writes the index."""
        if self.waiting:
            self._write()
        count = len(self.shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            final = final if count > 1 else "model.safetensors"
            self._part(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / "model.safetensors.index.json").write_text(text)

    def _write(self) -> None:
        save_file(self.waiting, self._part(len(self.shards)), metadata={"format": "pt"})
        self.shards.append(list(self.waiting))
        self.total_bytes += self.waiting_bytes
        self.waiting, self.waiting_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"
