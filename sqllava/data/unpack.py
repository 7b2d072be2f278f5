"""Archives -> image files in their folder: nothing but images, nowhere but there.

Follows `fetch.py` on the data's path. A killed run is gone on with: files that are whole stay.
"""

import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from sqllava.data.formats import LOOK_BYTES, mistaken_for

_CHUNK = 1 << 20
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")


class UnpackError(ValueError):
    """An archive that cannot be trusted or read; the message holds its path and the member."""


class DamagedError(UnpackError):
    """An archive that is not as it was made: cut short, or with bytes of which some are wrong."""


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
        DamagedError: the archive is broken, does not end where its members do, or holds no image.
        UnpackError: it has a link, a name that leads out of the folder, or two images for the same
            place, or an image cannot be written. Files written before that are whole images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    without_case: dict[str, str] = {}  # places, as some file systems see them
    for member in tqdm(_members(archive), archive.name, unit=" files", delay=2, disable=quiet):
        place = _place(archive, member, keep_folders)
        if place is None:
            continue
        twin = without_case.setdefault(place.casefold(), place)
        if place in seen or (twin != place and _same(folder / twin, folder / place)):
            raise UnpackError(f"{archive}: two members for {twin!r}, one is {member.name!r}")
        seen.add(place)
        _write(archive, member, folder / place)
    if not seen:  # as in a file of zeros, which is a tar without members
        raise DamagedError(f"{archive}: cannot be unpacked: it holds no images")
    return len(seen)


def _same(one: Path, other: Path) -> bool:
    return other.exists() and os.path.samefile(one, other)


def _members(archive: Path) -> Iterator[_Member]:
    """The members of an archive; DamagedError if it breaks off among them, or is none."""
    with archive.open("rb") as handle:
        start = handle.read(LOOK_BYTES)
    reading = _zip_members(archive) if start.startswith(b"PK") else _tar_members(archive, start)
    last = ""
    while True:
        try:
            member = next(reading, None)
        except UnpackError:
            raise
        except Exception as error:  # decoders raise whatever they like on broken files
            after = f" after member {last!r}" if last else ""
            raise DamagedError(f"{archive}: cannot be unpacked{after}: {_reason(error)}") from error
        if member is None:
            return
        yield member
        last = member.name


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as packed:
        for info in packed.infolist():
            mode = info.external_attr >> 16
            kind = "folder" if info.is_dir() else "link" if stat.S_ISLNK(mode) else "file"
            yield _Member(info.filename, info.file_size, kind, partial(packed.open, info))


def _tar_members(archive: Path, start: bytes) -> Iterator[_Member]:
    with _open_tar(archive, start) as packed:
        for entry in packed:
            kind = "folder" if entry.isdir() else "file" if entry.isreg() else "link"

            def opened(entry: tarfile.TarInfo = entry) -> IO[bytes]:
                handle = packed.extractfile(entry)
                assert handle is not None  # only regular files are opened
                return handle

            yield _Member(entry.name, entry.size, kind, opened)
        _must_be_at_the_end(packed, archive)


def _open_tar(archive: Path, start: bytes) -> tarfile.TarFile:
    try:
        return tarfile.open(archive)
    except tarfile.ReadError as error:
        found = mistaken_for(start) or "neither a zip nor a tar archive"
        raise DamagedError(f"{archive}: cannot be unpacked: it is {found}") from error


def _must_be_at_the_end(packed: tarfile.TarFile, archive: Path) -> None:
    """`tarfile` takes a block that is no member's header for the archive's end. The true end is a
    block of zeros, and nothing but zeros after it."""
    source = packed.fileobj
    assert source is not None
    at, ended = packed.offset, False
    source.seek(at)
    while block := source.read(_CHUNK):
        if block.strip(b"\0"):
            raise DamagedError(
                f"{archive}: cannot be unpacked: what stands at byte {at} is neither a member nor "
                f"the archive's end (after {len(packed.getmembers())} members)"
            )
        ended = ended or len(block) >= tarfile.BLOCKSIZE
    if not ended:
        raise DamagedError(f"{archive}: cannot be unpacked: cut short at byte {at}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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


def _write(archive: Path, member: _Member, path: Path) -> None:
    if path.is_file() and path.stat().st_size == member.size:
        return
    unfinished = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as target:
            for chunk in _chunks(archive, member):
                target.write(chunk)
        unfinished.replace(path)
    except OSError as error:
        reason = f"{path} cannot be written: {error.strerror or error}"
        raise UnpackError(f"{archive}: member {member.name!r}: {reason}") from error
    finally:
        if unfinished.is_file():
            unfinished.unlink()


def _chunks(archive: Path, member: _Member) -> Iterator[bytes]:
    """A member's bytes: as many as it says it has; a zip's are held against its checksum."""
    size = 0
    try:
        with member.open() as source:
            while chunk := source.read(_CHUNK):
                size += len(chunk)
                yield chunk
    except Exception as error:  # decoders raise whatever they like on broken files
        raise DamagedError(
            f"{archive}: member {member.name!r} cannot be unpacked: {_reason(error)}"
        ) from error
    if size != member.size:
        raise DamagedError(
            f"{archive}: member {member.name!r} cannot be unpacked: it is cut short, at {size} of "
            f"{member.size} bytes"
        )
