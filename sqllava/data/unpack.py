"""Archives -> image files in their folder: nothing but images, nowhere but there.

Follows `fetch.py` on the data's path. A killed run is gone on with: files that are whole stay.
"""

import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")


class UnpackError(ValueError):
    """An archive that cannot be trusted or read; the message holds its path and the member."""


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    kind: str  # "file", "folder" or "link"
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, folder: Path, keep_folders: bool = False, quiet: bool = False) -> int:
    """Writes the images of a zip or tar archive into a folder.

    Args:
        keep_folders: keeps the archive's own folders; else every image lies flat in the folder,
            whatever folders it was packed in.

    Returns:
        How many images the archive holds.

    Raises:
        UnpackError: the archive is broken, or has a link, a name that leads out of the folder, or
            two images for the same place. Files written before that was seen are whole images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    try:
        for member in tqdm(_members(archive), archive.name, unit=" files", delay=2, disable=quiet):
            place = _place(archive, member, keep_folders)
            if place is None:
                continue
            if place in seen:
                raise UnpackError(f"{archive}: two members for {place!r}, one is {member.name!r}")
            seen.add(place)
            _write(member, folder / place)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, NotImplementedError) as error:
        raise UnpackError(f"{archive}: cannot be unpacked: {error}") from error
    return len(seen)


def _members(archive: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                mode = info.external_attr >> 16
                kind = "folder" if info.is_dir() else "link" if stat.S_ISLNK(mode) else "file"
                opener = partial(packed.open, info)
                yield _Member(info.filename, info.file_size, kind, opener)
        return
    with tarfile.open(archive) as packed_tar:
        for entry in packed_tar:
            kind = "folder" if entry.isdir() else "file" if entry.isreg() else "link"

            def opened(entry: tarfile.TarInfo = entry) -> IO[bytes]:
                handle = packed_tar.extractfile(entry)
                assert handle is not None  # only regular files are opened
                return handle

            yield _Member(entry.name, entry.size, kind, opened)


def _place(archive: Path, member: _Member, keep_folders: bool) -> str | None:
    """Where a member belongs, from the folder; None if it is not wanted."""
    name = PurePosixPath(member.name.replace("\\", "/"))
    drive = re.match("[A-Za-z]:", member.name)
    if name.is_absolute() or ".." in name.parts or drive:
        raise UnpackError(f"{archive}: member {member.name!r} leads out of the folder")
    if member.kind == "link":
        raise UnpackError(f"{archive}: member {member.name!r} is a link")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.parts)
    if member.kind == "folder" or hidden or name.suffix.lower() not in IMAGE_SUFFIXES:
        return None
    if not keep_folders:
        return name.name
    # Some archives are packed with the folder itself, some without.
    parts = name.parts[1:] if name.parts[0] == "images" else name.parts
    return str(PurePosixPath(*parts))


def _write(member: _Member, path: Path) -> None:
    if path.is_file() and path.stat().st_size == member.size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    # Opened here, read to the end: that is what checks a zip member's checksum.
    with member.open() as source, unfinished.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    if unfinished.stat().st_size != member.size:
        unfinished.unlink()
        raise OSError(f"member {member.name!r} is cut short")
    unfinished.replace(path)
