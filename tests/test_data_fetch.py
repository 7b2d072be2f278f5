"""Downloads from a server that misbehaves: whole and right, or a failure with its name."""

import hashlib
import multiprocessing
import signal
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import FileServer

from sqllava.data.fetch import DownloadError, Expected, Patience, fetch

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
