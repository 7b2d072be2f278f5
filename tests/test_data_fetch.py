"""Downloads from a server that misbehaves: whole and right, or a failure with its name."""

import errno
import hashlib
import multiprocessing
import re
import signal
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import FileServer

from sqllava.data import fetch as fetch_module
from sqllava.data.fetch import DownloadError, Expected, Patience, WriteError, address, fetch

CONTENT = bytes(range(256)) * 4000
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()
HURRIED = Patience(timeout=0.5, tries=4, pause=0.01)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = FileServer({"/a.bin": CONTENT, "/real/a.bin": CONTENT})
    yield server
    server.close()


def get(server, path, **expected):
    fetch(server.url("/a.bin"), path, Expected(**expected), HURRIED, quiet=True)


def left_behind(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["cut"],
        ["cut", "cut", "cut", "cut", "cut", "cut"],
        ["stall"],
        ["drop", "drop", "drop"],
        [500, 503, 429],
        ["cut", 500, "stall", "drop", "cut"],
        ["cut", "no-range"],
        ["cut", "wrong-range"],
        ["hub"],
        [408, "cut", 502],
    ],
    ids=str,
)
def test_it_ends_with_the_whole_file(server, tmp_path, faults):
    server.faults["/a.bin"] = list(faults)
    get(server, tmp_path / "a.bin", size=len(CONTENT), checksum=MD5)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert left_behind(tmp_path) == ["a.bin"]
    assert not server.faults["/a.bin"]


def test_a_cut_transfer_goes_on_where_it_was(server, tmp_path):
    server.faults["/a.bin"] = ["cut"]
    get(server, tmp_path / "a.bin")
    assert server.requests == [("/a.bin", None), ("/a.bin", f"bytes={len(CONTENT) // 2}-")]


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([404], "HTTP 404"),
        ([403], "HTTP 403"),
        (["cut", 404], "HTTP 404"),
        ([500] * 9, "gave up after 4 tries: HTTP 500"),
        (["drop"] * 9, "gave up after 4 tries"),
        (["no-range", *["drop"] * 9], None),
    ],
    ids=str,
)
def test_it_ends_with_a_named_failure(server, tmp_path, faults, message):
    server.faults["/a.bin"] = list(faults)
    if message is None:
        get(server, tmp_path / "a.bin")
        return
    with pytest.raises(DownloadError, match=rf"http://.*/a\.bin: {message}"):
        get(server, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"checksum": "md5:" + "0" * 32}, "its md5 is .*; expected 0{32}; deleted"),
        ({"checksum": "sha256:" + "0" * 64}, "its sha256 is"),
        ({"size": len(CONTENT) - 1}, "expected 1023999"),
        ({"size": len(CONTENT) * 2, "rough": True}, "expected about 2048000"),
    ],
)
def test_a_wrong_file_never_gets_its_name(server, tmp_path, expected, message):
    with pytest.raises(DownloadError, match=message):
        get(server, tmp_path / "a.bin", **expected)
    assert left_behind(tmp_path) == []


def test_a_last_look_may_refuse_the_file(server, tmp_path):
    def check(path):
        raise ValueError(f"{path.stat().st_size} bytes of nonsense")

    with pytest.raises(DownloadError, match="1024000 bytes of nonsense"):
        get(server, tmp_path / "a.bin", check=check)
    assert left_behind(tmp_path) == []


def test_a_rough_size_is_enough_within_a_tenth(server, tmp_path):
    get(server, tmp_path / "a.bin", size=int(len(CONTENT) * 1.08), rough=True)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_what_the_hub_publishes_is_held_against_the_file(server, tmp_path):
    server.faults["/a.bin"] = ["hub-lie"]
    with pytest.raises(DownloadError, match="its sha256 is .*; expected 0{64}"):
        get(server, tmp_path / "a.bin", size=len(CONTENT))
    assert left_behind(tmp_path) == []
    # A published checksum outdoes a size that is known to two digits only.
    server.faults["/a.bin"] = ["hub"]
    get(server, tmp_path / "a.bin", size=len(CONTENT) * 3, rough=True)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_file_that_changed_on_the_server_is_not_mixed_with_the_old_one(server, tmp_path):
    server.faults["/a.bin"] = ["cut", *[404]]
    with pytest.raises(DownloadError):
        get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin.part").stat().st_size == len(CONTENT) // 2
    server.files["/a.bin"] = CONTENT[::-1]
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT[::-1]


def test_a_changed_file_is_found_where_the_server_knows_no_if_range(server, tmp_path):
    server.faults["/a.bin"] = ["cut", 404]
    with pytest.raises(DownloadError):
        get(server, tmp_path / "a.bin")
    server.files["/a.bin"] = CONTENT[::-1]
    server.faults["/a.bin"] = ["no-if-range"]
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("known", ["\ufffd", "a\nb: c", "é", ""])
def test_a_spoilt_note_of_what_is_here_means_a_fresh_start(server, tmp_path, known):
    (tmp_path / "a.bin.part").write_bytes(b"old")
    (tmp_path / "a.bin.part.etag").write_text(known)
    get(server, tmp_path / "a.bin", checksum=MD5)
    assert server.requests == [("/a.bin", None)]


@pytest.mark.parametrize("fault", ["bad-length", "no-length"])
def test_a_length_that_is_none_is_no_matter(server, tmp_path, fault):
    server.faults["/a.bin"] = [fault]
    get(server, tmp_path / "a.bin", size=len(CONTENT), checksum=MD5)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


ODD = [
    ("http://[::1", "Invalid IPv6"),
    ("http://" + "a" * 64 + ".org/a.jpg", "label"),
    ("http://127.0.0.1:99999/a.jpg", "[Pp]ort"),
    ("http://127.0.0.1:x/a.jpg", "[Pp]ort"),
    ("http:///a.jpg", "not an http or https address"),
    ("file:///etc/passwd", "not an http or https address"),
    ("ftp://127.0.0.1/a.jpg", "not an http or https address"),
    ("data:image/png;base64,AA", "not an http or https address"),
    ("a.jpg", "not an http or https address"),
    ("", "not an http or https address"),
    ("http://\ud800/", ""),
    ("http://a\0b/", ""),
]


@pytest.mark.parametrize(("url", "reason"), ODD)
def test_what_is_no_address_is_said_at_once(tmp_path, url, reason):
    with pytest.raises(DownloadError, match=re.escape(url) + ": .*" + reason):
        fetch(url, tmp_path / "a.bin", Expected(), Patience(0.5, 2, 0.0), quiet=True)
    assert left_behind(tmp_path) == []


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=20), st.sampled_from(["", "http://", "http://127.0.0.1:1/", "https://["]))
def test_any_text_in_place_of_an_address_fails_as_ours(tmp_path_factory, text, start):
    path = tmp_path_factory.mktemp("odd") / "a.bin"
    with pytest.MonkeyPatch.context() as patch:
        refused = ConnectionRefusedError("refused")
        patch.setattr("socket.create_connection", lambda *_, **__: _raise(refused))
        with pytest.raises(DownloadError):
            fetch(start + text, path, Expected(), Patience(0.5, 1, 0.0), quiet=True)


def _raise(error):
    raise error


def test_letters_of_any_script_are_sent_as_browsers_do(server, tmp_path):
    server.files |= {"/%C3%BC%20b.jpg?q=%C3%A9&x=%20~": CONTENT}
    url = server.url("/ü b.jpg?q=é&x=%20~")
    fetch(url, tmp_path / "a.bin", Expected(), HURRIED, quiet=True)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert address("https://x.org/a~b__c/%20?S=1&K=a/b+c") == "https://x.org/a~b__c/%20?S=1&K=a/b+c"
    assert address("https://bücher.example") == "https://xn--bcher-kva.example/"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("loop", "HTTP 302 .*infinite loop"),
        ("redirect:ftp://127.0.0.1/a.bin", "not an http or https address"),
        ("redirect:file:///etc/passwd", "."),
        ("redirect:http://[::1", "Invalid IPv6"),
    ],
)
def test_redirects_that_lead_nowhere_fail_at_once(server, tmp_path, fault, reason):
    server.faults["/a.bin"] = [fault] * 30
    with pytest.raises(DownloadError, match=reason) as caught:
        get(server, tmp_path / "a.bin")
    assert "\n" not in str(caught.value) and left_behind(tmp_path) == []


def test_a_transfer_is_bounded_in_time_and_size_where_that_is_asked(server, tmp_path):
    server.faults["/a.bin"] = ["drip"]
    bounded = Patience(timeout=5, tries=2, pause=0.01, longest=0.2)
    with pytest.raises(DownloadError, match="not done after 0 seconds"):
        fetch(server.url("/a.bin"), tmp_path / "a.bin", Expected(), bounded, quiet=True)
    server.faults["/a.bin"] = ["drop"] * 900
    with pytest.raises(DownloadError, match="not done after 0 seconds"):
        patient = replace(bounded, tries=900)
        fetch(server.url("/a.bin"), tmp_path / "a.bin", Expected(), patient, quiet=True)
    server.faults.clear()
    with pytest.raises(DownloadError, match="more than 1000 bytes"):
        get(server, tmp_path / "b.bin", most=1000)


def test_a_full_disk_is_told_from_a_bad_server(server, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def write(self, chunk):
        with fetch_module._writing(self._handle.name):
            raise full

    monkeypatch.setattr(fetch_module._Transfer, "_write", write)
    with pytest.raises(WriteError, match=r"a\.bin\.part: cannot be written: No space left"):
        get(server, tmp_path / "a.bin")
    assert len(server.requests) == 1
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot be written"):
        get(server, tmp_path / "file" / "a.bin")


@pytest.mark.parametrize("extra", [0, 5])
def test_a_full_or_overfull_part_is_settled_by_416(server, tmp_path, extra):
    part = tmp_path / "a.bin.part"
    part.write_bytes(CONTENT + b"x" * extra)
    (tmp_path / "a.bin.part.etag").write_text(f'"{MD5.removeprefix("md5:")}"')
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert left_behind(tmp_path) == ["a.bin"]


def test_what_is_there_is_left_alone(server, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"mine")
    get(server, tmp_path / "a.bin", checksum=MD5)
    assert (tmp_path / "a.bin").read_bytes() == b"mine" and not server.requests


def test_two_at_once_do_not_write_into_each_other(server, tmp_path):
    server.speed = 2e6
    first = threading.Thread(target=get, args=(server, tmp_path / "a.bin"))
    first.start()
    while not (tmp_path / "a.bin.part").exists():
        time.sleep(0.005)
    with pytest.raises(DownloadError, match="another process is downloading it"):
        get(server, tmp_path / "a.bin")
    first.join()
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.sampled_from(["cut", "drop", "no-range", "wrong-range", 500, 416, 404, "hub"])))
def test_whatever_happens_it_is_right_or_absent(server, tmp_path_factory, faults):
    path = tmp_path_factory.mktemp("fetch") / "a.bin"
    server.faults["/a.bin"] = list(faults)
    try:
        get(server, path)
    except DownloadError:
        assert not path.exists()
    else:
        assert path.read_bytes() == CONTENT


def test_a_killed_download_is_gone_on_with(server, tmp_path):
    server.speed = 1e6
    path = tmp_path / "a.bin"
    child = multiprocessing.get_context("fork").Process(target=get, args=(server, path))
    child.start()
    part = tmp_path / "a.bin.part"
    while not (part.exists() and part.stat().st_size > 100_000):
        assert child.is_alive()
        time.sleep(0.005)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL and not path.exists()
    server.speed = None
    get(server, path, checksum=MD5)
    assert path.read_bytes() == CONTENT
    assert int(server.requests[-1][1].removeprefix("bytes=").removesuffix("-")) > 100_000
