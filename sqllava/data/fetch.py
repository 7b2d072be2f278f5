"""One URL -> one verified file: resumed where it was cut, named when it fails, never wrong.

Under `download.py` on the data's path. What has its final name is whole; what is under way ends in
`.part`.
"""

import fcntl
import hashlib
import http.client
import logging
import re
import string
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

from tqdm import tqdm

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
# Sizes written with two digits, such as 1.2 GB, and what may be uploaded anew one day.
_ROUGHLY = 0.1
_LONGEST_PAUSE = 60.0
_WORTH_ANOTHER_TRY = (408, 425, 429)


class DownloadError(OSError):
    """A file that could not be fetched; the message holds its address and the reason."""


class WriteError(OSError):
    """A file that could not be written here, whatever its server says; the message names it."""


class _CutError(Exception):
    """A transfer that did not end; trying again may help."""


@dataclass(frozen=True)
class Expected:
    """What a file must be to get its final name.

    Attributes:
        size: bytes; 0 if unknown. A `rough` size holds to 10 %, and only where there is no
            checksum.
        checksum: "md5:..." or "sha256:...".
        check: a last look at the file, which raises ValueError if it is not what it should be.
        most: bytes after which a transfer is given up; 0 for no bound.
    """

    size: int = 0
    rough: bool = False
    checksum: str = ""
    check: Callable[[Path], None] | None = None
    most: int = 0


@dataclass(frozen=True)
class Patience:
    """How long to bear with a server.

    Attributes:
        timeout: seconds without a byte after which a transfer counts as cut.
        tries: attempts in a row that bring nothing new.
        pause: seconds before the second of them; doubled for each further one.
        longest: seconds that a file may take, however steadily it comes; None for no bound.
    """

    timeout: float = 60.0
    tries: int = 6
    pause: float = 1.0
    longest: float | None = None


def fetch(
    url: str,
    path: Path,
    expected: Expected = Expected(),
    patience: Patience = Patience(),
    quiet: bool = False,
) -> None:
    """Downloads a file, going on where an earlier attempt (or process) left off.

    Raises:
        DownloadError: the address is none, the server refuses, gives up, or sends something other
            than what is expected (that is deleted), or another process is at it.
        WriteError: the file cannot be written; what has come stays for the next time.
    """
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    with _open(part) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(f"{path}: another process is downloading it") from None
        if path.exists():  # finished by another process meanwhile; its .part is no more
            return
        transfer = _Transfer(url, handle, part, patience, expected.most, quiet)
        try:
            _persevere(transfer, patience)
            _verify(part, expected, transfer)
        except _WrongFileError as error:
            part.unlink()
            _validator_file(part).unlink(missing_ok=True)
            raise DownloadError(f"{url}: {error}; deleted") from None
        except (DownloadError, WriteError):
            if not transfer.size:
                part.unlink()
            raise
        part.rename(path)
    _validator_file(part).unlink(missing_ok=True)


def _open(part: Path) -> BinaryIO:
    with _writing(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        return part.open("ab")


@contextmanager
def _writing(path: Path | str) -> Iterator[None]:
    """Tells what goes wrong on this side of a transfer from what goes wrong on the other."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}") from error


def address(url: str) -> str:
    """An http(s) address as it is sent: what is not ASCII is encoded, as browsers do.

    Raises:
        ValueError: it is none; saying why.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not an http or https address")
    _ = parts.port  # ValueError where it is no number, or none that there is
    host = parts.netloc.encode("idna").decode()
    path, query = (quote(part, safe=string.punctuation) for part in (parts.path, parts.query))
    return f"{parts.scheme}://{host}{path or '/'}" + (f"?{query}" if query else "")


class _WrongFileError(Exception):
    """A file that came whole, but is not the one that is expected."""


def _persevere(transfer: "_Transfer", patience: Patience) -> None:
    most, tries = transfer.size, 0
    while True:
        try:
            transfer.run()
            return
        except (WriteError, DownloadError):
            raise
        except (ValueError, OverflowError, http.client.InvalidURL) as error:
            raise DownloadError(f"{transfer.url}: cannot be fetched: {error}") from None
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {' '.join(str(error.reason).split())}"
            if error.code < 500 and error.code not in _WORTH_ANOTHER_TRY:
                raise DownloadError(f"{transfer.url}: {reason}") from None
        except (_CutError, http.client.HTTPException, OSError) as error:
            reason = str(error) or type(error).__name__
        transfer.check_bounds()
        tries = 0 if transfer.size > most else tries + 1
        most = max(most, transfer.size)
        if tries >= patience.tries:
            raise DownloadError(f"{transfer.url}: gave up after {tries} tries: {reason}")
        level = logging.DEBUG if transfer.quiet else logging.INFO
        logger.log(level, "%s: %s; trying again", transfer.url, reason)
        time.sleep(min(patience.pause * 2 ** max(tries - 1, 0), _LONGEST_PAUSE))


class _Transfer:
    """The bytes of one URL, appended to an open file.

    Attributes:
        total: bytes that the server says there are, once it has said so.
        published: the SHA-256 that a hub publishes with the file, or "".
    """

    def __init__(
        self,
        url: str,
        handle: BinaryIO,
        part: Path,
        patience: Patience,
        most: int,
        quiet: bool,
    ) -> None:
        self.url, self._handle, self.quiet = url, handle, quiet
        self._patience, self._most = patience, most
        self._start = time.monotonic()
        self._validator = _validator_file(part)
        self.total: int | None = None
        self.published = ""

    @property
    def size(self) -> int:
        """Bytes that are here."""
        return self._handle.seek(0, 2)

    def run(self) -> None:
        """Gets what is missing.

        Raises:
            _CutError, OSError, HTTPException: it did not all come.
            ValueError, OverflowError: the address is none.
            DownloadError, WriteError: trying again will not help.
        """
        redirects = _Redirects()
        opener = urllib.request.build_opener(redirects)
        try:
            response = opener.open(self._request(), timeout=self._patience.timeout)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            self._after_416(error)
            return
        finally:
            self.published = redirects.checksum or self.published
        with response:
            self._place(response)
            self._read(response)

    def _request(self) -> urllib.request.Request:
        request = urllib.request.Request(address(self.url), headers={"User-Agent": "sqllava"})
        request.add_header("Accept-Encoding", "identity")
        have = self.size
        # Without a way to tell that the file is still the same one, it is fetched anew.
        if have and self._known():
            request.add_header("Range", f"bytes={have}-")
            request.add_header("If-Range", self._known())
        return request

    def _known(self) -> str:
        """By what the server told the file that is here; "" if that is not known."""
        found = self._validator.read_text(errors="replace") if self._validator.exists() else ""
        return found if found.isascii() and found.isprintable() else ""

    def _place(self, response: Any) -> None:
        """Finds where the answer's bytes belong: at the end, or, of a whole file, at the start."""
        headers = response.headers
        if response.status == 206:
            start, _, total = _content_range(headers.get("Content-Range", ""))
            if start != self.size:
                self._restart()
                raise _CutError(f"asked for byte {self.size}, got {start}")
            # Some servers do not know If-Range.
            now = _validator(headers)
            if now and now != self._known():
                self._restart()
                raise _CutError("the file on the server has changed")
            self.total = total
            return
        self._restart()
        length = headers.get("Content-Length", "")
        self.total = int(length) if re.fullmatch("[0-9]+", length) else None
        validator = _validator(headers)
        if validator:
            with _writing(self._validator):
                self._validator.write_text(validator)

    def _after_416(self, error: urllib.error.HTTPError) -> None:
        """No bytes beyond what is here: either it is whole, or the file is another one by now."""
        *_, self.total = _content_range(error.headers.get("Content-Range", ""))
        if self.total != self.size:
            self._restart()
            raise _CutError("the file on the server has changed")

    def _read(self, response: http.client.HTTPResponse) -> None:
        bar = tqdm(
            total=self.total,
            initial=self.size,
            desc=self.url.rsplit("/", 1)[-1][:40],
            unit="B",
            unit_scale=True,
            delay=2,
            disable=self.quiet,
        )
        with bar:
            # What is there, and not a full chunk: a kill loses nothing that has come.
            while chunk := response.read1(_CHUNK):
                self._write(chunk)
                bar.update(len(chunk))
                self.check_bounds()
        if self.total is not None and self.size < self.total:
            raise _CutError(f"the connection ended at {self.size} of {self.total} bytes")

    def _write(self, chunk: bytes) -> None:
        with _writing(self._handle.name):
            self._handle.write(chunk)
            self._handle.flush()

    def check_bounds(self) -> None:
        """Raises DownloadError if the file is too large, or takes too long."""
        if self._most and self.size > self._most:
            raise DownloadError(f"{self.url}: more than {self._most} bytes")
        longest = self._patience.longest
        if longest is not None and time.monotonic() - self._start > longest:
            raise DownloadError(f"{self.url}: not done after {longest:.0f} seconds")

    def _restart(self) -> None:
        self._handle.truncate(0)
        self._validator.unlink(missing_ok=True)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; notes the SHA-256 that the Hugging Face hub sends along with its own."""

    checksum = ""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str):  # type: ignore[no-untyped-def]
        linked = headers.get("X-Linked-ETag", "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", linked):
            self.checksum = f"sha256:{linked}"
        address(newurl)  # urllib would go on by FTP
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _validator(headers: Any) -> str:
    """What tells by If-Range that a file is still the same one, or "": it takes strong ETags."""
    etag = headers.get("ETag", "")
    found = etag if etag.startswith('"') else headers.get("Last-Modified", "")
    return found if found.isascii() and found.isprintable() else ""


def _validator_file(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _content_range(text: str) -> tuple[int | None, int | None, int | None]:
    """First byte, last byte and total of a Content-Range header; None for what it does not say."""
    match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(?:(\d+)|\*)", text.strip())
    first, last, total = match.groups() if match else (None, None, None)
    return tuple(None if part is None else int(part) for part in (first, last, total))  # type: ignore[return-value]


def _verify(part: Path, expected: Expected, transfer: _Transfer) -> None:
    size = part.stat().st_size
    if transfer.total is not None and size != transfer.total:
        raise _WrongFileError(f"has {size} bytes; the server said {transfer.total}")
    checksums = [c for c in (expected.checksum, transfer.published) if c]
    slack = _ROUGHLY * expected.size if expected.rough else 0
    told_by_size = expected.size and not (expected.rough and checksums)
    if told_by_size and abs(size - expected.size) > slack:
        about = "about " if expected.rough else ""
        raise _WrongFileError(f"has {size} bytes; expected {about}{expected.size}")
    for checksum in checksums:
        kind, digest = checksum.split(":")
        found = _digest(part, kind)
        if found != digest:
            raise _WrongFileError(f"its {kind} is {found}; expected {digest}")
    if expected.check is not None:
        try:
            expected.check(part)
        except ValueError as error:
            raise _WrongFileError(error) from None


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.new(kind)
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
