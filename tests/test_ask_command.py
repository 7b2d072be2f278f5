"""`sqllava ask`: what it reads, what it prints while it comes, and its errors."""

import io
import json
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from training import environment

from sqllava import SelfQuestioner, load
from sqllava.ask.cli import main, parse_arguments
from sqllava.ask.transcript import (
    Conversation,
    Transcript,
    _json_line,
    named_images,
    open_picture,
)
from sqllava.pixels import ImageError


@pytest.fixture
def short(adapter):
    return ["--model", str(adapter), "--max-new-tokens", "6", "--answer-tokens", "8"]


@pytest.fixture
def server(golden):
    """The golden images over HTTP."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(golden / "images"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_it_prints_what_the_model_says(short, golden, adapter, capsys):
    image = str(golden / "images" / "0.png")
    main([image, *short, "-n", "2", "--answer", "--seed", "0", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["image"] == image
    assert len(said["exchanges"]) == 2
    main([image, *short, "-n", "2", "--answer", "--seed", "0"])
    lines = [image, f"  {said['description']}"]
    for number, exchange in enumerate(said["exchanges"], 1):
        lines += [f"  VUSER {number}: {exchange['question']}", f"         {exchange['answer']}"]
    shown = capsys.readouterr().out
    assert [line.strip() for line in shown.splitlines()] == [line.strip() for line in lines]

    questioner = SelfQuestioner(*load(adapter))
    picture = open_picture(image)
    assert said["description"] == questioner.describe(picture, 8)
    main([image, *short, "-n", "1", "--seed", "0", "--json"])
    assert json.loads(capsys.readouterr().out)["exchanges"][0]["answer"] is None


def test_rounds_ask_on(short, golden, capsys):
    main([str(golden / "images" / "1.png"), *short, "--rounds", "3", "--seed", "1", "--json"])
    exchanges = json.loads(capsys.readouterr().out)["exchanges"]
    assert len({exchange["question"] for exchange in exchanges}) == len(exchanges) == 3
    assert all(exchange["answer"] is not None for exchange in exchanges)


def test_names_come_from_standard_input_too(golden):
    images = [str(golden / "images" / f"{number}.png") for number in range(3)]
    listed = io.StringIO(f"{images[1]}\n\n{images[2]}")
    assert named_images([images[0], "-"], listed, allow_url=False) == images


def test_urls_are_fetched_only_when_allowed(server, golden, tmp_path):
    url = f"{server}/2.png"
    with pytest.raises(ValueError, match="is a URL, and nothing is fetched unless --allow-url"):
        named_images([url], io.StringIO(), allow_url=False)
    assert named_images([url], io.StringIO(), allow_url=True) == [url]
    assert open_picture(url) == open_picture(str(golden / "images" / "2.png"))
    with pytest.raises(ValueError, match="only http and https"):
        named_images([f"file://{golden}/images/0.png"], io.StringIO(), allow_url=True)
    with pytest.raises(ImageError, match=f"{server}/nowhere.png: .*404"):
        open_picture(f"{server}/nowhere.png")
    with pytest.raises(ImageError, match=f"{server}/: cannot identify"):
        open_picture(f"{server}/")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://no.such.host.invalid/a.png", "a.png: .*(not known|resolution|No address)"),
        ("http://127.0.0.1:1/a.png", "refused"),
        ("http://127.0.0.1:port/a.png", "port"),
        ("http://[::1/a.png", "IPv6"),
        ("http://host with blanks/a.png", "a.png: "),
        (f"http://{'a' * 70}.example/a.png", "a.png: "),
        ("http:///a.png", "a.png: "),
    ],
)
def test_addresses_that_do_not_answer_are_told(url, told):
    assert named_images([url], io.StringIO(), allow_url=True) == [url]
    with pytest.raises(ImageError, match=told) as error:
        open_picture(url)
    assert str(error.value).startswith(f"{url}: ")


class Odd(BaseHTTPRequestHandler):
    """Answers that no picture comes of."""

    def do_GET(self):
        if self.path == "/file.png":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/etc/passwd")
            self.end_headers()
        elif self.path == "/short.png":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"abc")
        elif self.path == "/slow.png":
            self.send_response(200)
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b"a")
                time.sleep(0.1)
        else:
            self.wfile.write(b"SSH-2.0-OpenSSH\r\n")

    def log_message(self, *args):
        pass


def test_answers_that_are_no_pictures_are_told(monkeypatch):
    monkeypatch.setattr("sqllava.ask.transcript._DOWNLOAD_SECONDS", 1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        for name in ("file", "short", "slow", "ssh"):
            started = time.monotonic()
            with pytest.raises(ImageError, match=f"^{address}/{name}.png: [^\n]+$"):
                open_picture(f"{address}/{name}.png")
            assert time.monotonic() - started < 3
        server.shutdown()


def test_standard_input_that_names_nothing_is_told(short):
    with pytest.raises(ValueError, match="standard input names no images"):
        named_images(["-"], io.StringIO("\n \n"), allow_url=False)
    binary = io.TextIOWrapper(io.BytesIO(b"\x89PNG\r\n\xff"), encoding="utf-8")
    with pytest.raises(ValueError, match="standard input is no list of names"):
        named_images(["-"], binary, allow_url=False)


def test_what_is_fetched_is_bounded(server, monkeypatch):
    monkeypatch.setattr("sqllava.ask.transcript.MAX_DOWNLOAD", 100)
    with pytest.raises(ImageError, match="more than 100 bytes"):
        open_picture(f"{server}/2.png")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "name either images or a --dataset"),
        (["a.jpg", "--dataset", "d", "--out", "o"], "name either images or a --dataset"),
        (["--dataset", "d"], "--dataset and --out belong together"),
        (["a.jpg", "--rounds", "2", "-n", "3"], "stands in the place of -n"),
        (["a.jpg", "--rounds", "0"], "--rounds must be at least 1"),
        (["--dataset", "d", "--out", "o", "--describe-every", "-1"], "must be 0 or more"),
        (
            ["--dataset", "d", "--out", "o", "--device", "cpu"],
            "--device does not go with --dataset",
        ),
        (["--dataset", "d", "--out", "o", "--json"], "--json does not go with --dataset"),
        (["--dataset", "d", "--out", "o", "--rounds", "2"], "--rounds does not go with --dataset"),
        (["a.jpg", "--image-folder", "d"], "--image-folder goes with --dataset alone"),
        (["a.jpg", "--consistency", "2"], "--consistency goes with --dataset alone"),
    ],
)
def test_flags_that_do_not_go_together_are_told(words, told, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([*words, "--model", "m"])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere.jpg"], "error: no such image: nowhere.jpg"),
        (["https://a.b/c.jpg"], "error: https://a.b/c.jpg is a URL"),
        (["{image}", "-n", "0"], "error: samples must be at least 1, found 0"),
        (["{image}", "--temperature", "0"], "error: the temperature must be above 0"),
        (["{image}", "--temperature", "nan"], "error: the temperature must be above 0"),
        (["{image}", "--temperature", "inf"], "error: the temperature must be above 0"),
        (["{image}", "--top-p", "2"], "error: top p must be above 0 and at most 1"),
        (["{image}", "--top-k", "-3"], "error: top k must be 0 (all) or more"),
        (["{image}", "--device", "cuda:99"], "error: there is no device 'cuda:99' here"),
        (["{folder}"], "is a folder: name its files, or make data of it (--dataset)"),
        (["no\0name.jpg"], "error: no such image"),
        (["a" * 5000], "error: no such image"),
        (["{image}", "--model", "nowhere"], "error: nowhere: no config.json"),
    ],
)
def test_errors_are_one_clear_line(short, golden, words, told):
    folder = golden / "images"
    words = [word.format(image=folder / "0.png", folder=folder) for word in words]
    with pytest.raises(SystemExit, match="^error: [^\n]*$") as error:
        main([*short, *words])
    assert told in str(error.value)


def test_a_bad_image_does_not_stop_the_others(short, golden, tmp_path, capsys, caplog):
    bad = tmp_path / "bad.png"
    bad.write_bytes((golden / "images" / "0.png").read_bytes()[:90])
    with pytest.raises(SystemExit) as error:
        main([str(bad), str(golden / "images" / "0.png"), *short, "-n", "1", "--json"])
    assert error.value.code == 1
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert str(bad) in caplog.text


def test_it_runs_as_a_command(short, golden):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from sqllava.cli import main; main()",
            "ask",
            "-",
            *short,
            "-n",
            "1",
        ],
        input=str(golden / "images" / "0.png"),
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert "VUSER 1: " in done.stdout


def test_texts_written_at_once_are_shown_in_order():
    out = io.StringIO()
    stream = Transcript(out).in_order(["1: ", "2: ", "3: "])
    shown = []
    for piece in [(1, "b", False), (0, "a", False), (2, "c", True), (0, "A", True), (1, "B", True)]:
        stream(*piece)
        shown.append(out.getvalue())
    assert shown[:2] == ["1: ", "1: a"]
    assert shown[3] == "1: aA\n2: b"
    assert shown[4] == "1: aA\n2: bB\n3: c\n"


def test_lists_of_windows_and_names_that_are_not_utf8_are_taken(golden):
    images = [str(golden / "images" / f"{number}.png") for number in range(2)]
    listed = io.StringIO(f"\ufeff{images[0]}\r\n\r\n{images[1]}\r\n")
    assert named_images(["-"], listed, allow_url=False) == images
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # strict, as in most places
    Transcript(out).show("caf\udce9.jpg\n")
    out.seek(0)
    assert out.read() == "caf\\udce9.jpg\n"
    line = _json_line(Conversation("caf\udce9.jpg", "a ü", []))
    assert json.loads(line.encode())["image"] == "caf\udce9.jpg"
