"""What a file is that should have held records, by its first bytes.

Under `records.py` and `download.py` on the data's path.
"""

from pathlib import Path

# How many bytes `mistaken_for` wants to see.
LOOK_BYTES = 1024

_STARTS = {
    b"\x1f\x8b": "compressed by gzip; unpack it (gunzip)",
    b"PK\x03\x04": "a zip archive (or a sheet of a spreadsheet); unpack it, or save it as JSON",
    b"PK\x05\x06": "an empty zip archive",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it (unzstd)",
    b"BZh": "compressed by bzip2; unpack it (bunzip2)",
    b"\xfd7zXZ\x00": "compressed by xz; unpack it (unxz)",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; unpack it",
    b"ARROW1": "an Arrow file; save it as Parquet (datasets: to_parquet)",
    b"PARE": "an encrypted Parquet file; save it without encryption",
    b"SQLite format 3": "an SQLite database; export it as JSON",
    b"\x89HDF": "an HDF5 file; export it as JSON",
    b"\x80\x03": "a Python pickle, which is never opened; save it as JSON",
    b"\x80\x04": "a Python pickle, which is never opened; save it as JSON",
    b"\x80\x05": "a Python pickle, which is never opened; save it as JSON",
    b"%PDF": "a PDF file",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89PNG": "a PNG picture",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it (git lfs pull)",
    b"oid sha256:": "a Git LFS pointer, not the file itself; fetch it (git lfs pull)",
}


def mistaken_for(start: bytes) -> str:
    """What a file that begins so is, and what to do, if it cannot hold records; else "".

    Args:
        start: its first `LOOK_BYTES` bytes.
    """
    if start.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")) or _is_wide(start):
        return "text in UTF-16 or UTF-32; save it as UTF-8"
    for beginning, found in _STARTS.items():
        if start.startswith(beginning):
            return found
    if start and not start.strip(b"\0"):
        return "filled with zero bytes, as by a copy that did not finish; fetch it again"
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page, as a server sends in place of a file; fetch it again"
    return "an XML file; records are JSON or Parquet" if text.startswith(b"<?xml") else ""


def read_text(path: Path) -> str:
    """The text of a small file in UTF-8, with or without a mark; ValueError says what it is."""
    data = path.read_bytes()
    found = mistaken_for(data[:LOOK_BYTES])
    if found:
        raise ValueError(f"{path}: expected text; the file is {found}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line}: not text in UTF-8: {error}") from error


def _is_wide(start: bytes) -> bool:
    """Whether JSON's first character has zero bytes beside it: UTF-16 or UTF-32 without a mark."""
    return b"\0" in start[:4] and start[:4].replace(b"\0", b"")[:1] in (b"[", b"{")
