"""The page: what it does without a browser, and in a real one."""

import contextlib
import html
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from PIL import Image
from training import environment

from sqllava import SelfQuestioner, load
from sqllava.conversation import Turn
from sqllava.generation.decoding import Decoding
from sqllava.pixels import ImageError
from sqllava.serve.cli import main
from sqllava.serve.page import MOST_PIXELS, Page, StoppedError, Talk, as_html, build

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WAIT = 120_000  # milliseconds; machines are slow when all tests run at once


@pytest.fixture(scope="module")
def page(adapter):
    return Page(SelfQuestioner(*load(adapter)), answer_tokens=10, question_tokens=8)


@pytest.fixture
def image(golden):
    return str(golden / "images" / "0.png")


def last(values):
    *_, value = values
    return value


def test_a_description_grows_until_the_talk_can_begin(page, image):
    shown = list(page.describe(image))
    assert [talk is None for talk, _ in shown] == [True] * (len(shown) - 1) + [False]
    texts = [text for _, text in shown]
    assert len(texts) > 5
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:], strict=False))
    talk, text = shown[-1]
    assert talk.turns[1].text == text == page.questioner.describe(talk.image, 10)


def test_questions_and_answers_join_the_talk(page, image):
    talk, _ = last(page.describe(image))
    questions = page.ask(talk, 3, 1.2, 300, 0.95)
    assert len(set(questions)) == 3
    chats = list(page.answer(questions[0], talk, "vuser"))
    assert chats[-1] == talk.chat()
    assert [turn.role for turn in talk.turns] == ["user", "assistant", "vuser", "assistant"]
    last(page.answer(" Is it red? ", talk, "user"))
    assert [message["role"] for message in talk.chat()] == ["user", "assistant"] * 2
    assert talk.chat()[2]["content"] == "Is it red?"
    page.forget(talk)
    assert talk.chat() == []
    assert last(page.answer(questions[0], talk, "vuser")) == chats[-1]


def test_what_cannot_be_done_is_told(page, image, tmp_path):
    assert list(page.describe(None)) == [(None, "")]
    assert page.ask(None, 3, 1.2, 300, 0.95) == []
    with pytest.raises(ValueError, match="give an image first"):
        last(page.answer("Who?", None, "user"))
    talk, _ = last(page.describe(image))
    with pytest.raises(ValueError, match="write a question first"):
        last(page.answer("  ", talk, "user"))
    for settings, told in (
        ((3, 0.0, 300, 0.95), "temperature must be a number from 0.1 to 2.0, found 0.0"),
        ((3, float("nan"), 300, 0.95), "temperature must be .* found nan"),
        ((10_000, 1.2, 300, 0.95), "questions must be a number from 1 to 8, found 10000"),
        ((3, 1.2, "all", 0.95), "top k must be .* found 'all'"),
        ((3, 1.2, 300, None), "top p must be .* found None"),
    ):
        with pytest.raises(ValueError, match=told):
            page.ask(talk, *settings)
    with pytest.raises(ValueError, match="may have 1000 characters, and this one has 60000"):
        last(page.answer("a" * 60_000, talk, "user"))
    large = tmp_path / "large.png"
    Image.new("1", (5000, MOST_PIXELS // 5000 + 1)).save(large)
    with pytest.raises(ImageError, match=f"is more than {MOST_PIXELS} pixels"):
        last(page.describe(str(large)))


def test_several_people_are_served_one_after_another(page, image, golden):
    alone = {name: last(page.describe(str(golden / "images" / name)))[1] for name in NAMES}
    together = {}

    def look(name):
        together[name] = last(page.describe(str(golden / "images" / name)))[1]

    threads = [threading.Thread(target=look, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


NAMES = ("0.png", "1.png", "2.png", "3.png")


@pytest.mark.parametrize(
    ("size", "kind", "told"),
    [
        ((20_000, 1250), "PNG", "20000x1250 has a side of more than 10000 pixels"),
        ((625, 40_000), "PNG", "625x40000 has a side of more than 10000 pixels"),
        ((9, 9), "EPS", "a file of kind EPS; these are read: JPEG, PNG"),
        ((9, 9), "PPM", "a file of kind PPM"),
    ],
)
def test_images_that_cost_too_much_are_refused_before_they_are_decoded(
    size, kind, told, page, tmp_path, monkeypatch
):
    file = tmp_path / "a.png"
    Image.new("L", size).save(file, kind)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match=told):
        last(page.describe(str(file)))


def test_a_request_has_its_time_and_the_next_one_its_own(adapter, image):
    short = Page(SelfQuestioner(*load(adapter)), answer_tokens=400, question_tokens=8, seconds=0.3)
    for _ in range(2):
        with pytest.raises(StoppedError, match=r"took more than 0.3 seconds and was stopped"):
            last(short.describe(image))
    short.seconds = 100
    short.answering = Decoding(5)
    talk, _ = last(short.describe(image))
    short.seconds, short.question_tokens = 0.01, 100
    with pytest.raises(StoppedError, match="was stopped"):
        short.ask(talk, 8, 1.2, 300, 0.95)
    assert not short._model.locked()
    with pytest.raises(ValueError, match="more than 0 seconds, found 0"):
        Page(short.questioner, 5, 5, seconds=0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        Page(short.questioner, 0, 5)


def test_what_nobody_waits_for_is_stopped(adapter, image):
    long = Page(SelfQuestioner(*load(adapter)), answer_tokens=1500, question_tokens=8)
    steps = []
    long.questioner.model.model.register_forward_pre_hook(lambda *_: steps.append(1))
    writing = long.describe(image)
    next(writing)
    writing.close()
    with long._model:  # free as soon as the text has stopped
        assert len(steps) < 1000
    writing = long.describe(image)
    next(writing)
    long.close()
    with pytest.raises(StoppedError, match="is being closed"):
        last(writing)


def test_a_talk_that_the_model_can_no_longer_read_is_refused(page, image):
    talk, _ = last(page.describe(image))
    talk.turns += [Turn("user", "Is it? " * 1000), Turn("assistant", "It is.")]
    with pytest.raises(ValueError, match="grown too long for the model: clear its answers"):
        last(page.answer("Is it?", talk, "user"))
    with pytest.raises(ValueError, match="grown too long"):
        page.ask(talk, 3, 1.2, 300, 0.95)


def test_texts_become_html_that_shows_them_as_they_are():
    text = '<b>3 < 5</b> & "a" &amp;\nb'
    shown = as_html(text)
    assert not set("<>") & set(shown.replace("<br>", ""))
    assert html.unescape(shown.replace("<br>", "\n")) == text


def test_errors_of_the_command_are_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^error: no folder of examples: "):
        main(["--model", "m", "--examples", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="^error: --port must be from 1 to 65535, found 99999"):
        main(["--model", "m", "--port", "99999"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=f"^error: cannot serve on .* --port {port}: "):
            main(["--model", "m", "--port", port])
    with pytest.raises(SystemExit, match="^error: cannot serve on --host no.such.host.invalid"):
        main(["--model", "m", "--host", "no.such.host.invalid"])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="^error: --folder .*file: "):
        main(["--model", "m", "--port", "17861", "--folder", str(tmp_path / "file")])
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'sqllava[serve]'")
    with pytest.raises(SystemExit, match="^error: nowhere: no config.json"):
        main(["--model", "nowhere", "--port", "17861", "--folder", str(tmp_path / "uploads")])


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(adapter, golden, tmp_path_factory):
    """The page's address, and the folders that its process may and may not write to."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'sqllava[serve]'")
    around = tmp_path_factory.mktemp("around")
    uploads = tmp_path_factory.mktemp("uploads")
    (uploads / "diary.txt").write_text("dear diary")
    with serving(adapter, around, uploads, "--examples", golden / "images") as (_, address):
        yield address, around, uploads


@contextlib.contextmanager
def serving(model, around, uploads, *words):
    """A process that serves the page, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--model", model, "--port", port, "--folder", uploads, *words]
    words += ["--answer-tokens", 12, "--question-tokens", 8]
    process = subprocess.Popen(
        [sys.executable, "-c", "from sqllava.cli import main; main()", *map(str, words)],
        cwd=around,
        env=environment(HOME=str(around), TMPDIR=str(around / "tmp")) | _made(around / "tmp"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(process, address)
        yield process, address
    finally:
        process.terminate()
        process.wait()


def _made(folder):
    folder.mkdir()
    return {}


def _wait_for(process, address):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.stdout.read())
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError("the page did not come up")


@pytest.fixture
def tab(site):
    """A tab of a real headless Chromium with the page in it; `tab.outside` is what it asked of
    other servers, and did not get."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 900})
        tab.set_default_timeout(WAIT)
        tab.outside = []

        def at_home(route):
            address = route.request.url
            if address.startswith((site[0], "data:", "blob:")):
                route.continue_()
            else:
                tab.outside.append(address)
                route.abort()

        tab.route("**/*", at_home)
        tab.goto(site[0])
        tab.wait_for_selector("#image input[type=file]", state="attached")
        yield tab
        browser.close()


def upload(tab, path):
    tab.set_input_files("#image input[type=file]", str(path))


def wait_for_chat(tab, messages):
    tab.wait_for_function(
        "n => document.querySelectorAll('#chat [data-testid=user], #chat [data-testid=bot]')"
        ".length >= n",
        arg=messages,
    )


def test_an_image_is_described_asked_about_and_talked_about(tab, site, image):
    upload(tab, image)
    tab.wait_for_selector("#question-0", state="visible")
    assert tab.input_value("#description textarea").strip()
    question = tab.inner_text("#question-0")
    tab.click("#question-0")
    tab.fill("#own textarea", "Is there a dog?")
    wait_for_chat(tab, 2)
    tab.wait_for_selector(".generating", state="detached")
    assert question in tab.inner_text("#chat")
    # What was typed while the answer was written is still there.
    assert tab.input_value("#own textarea") == "Is there a dog?"
    tab.press("#own textarea", "Enter")
    wait_for_chat(tab, 4)
    assert "Is there a dog?" in tab.inner_text("#chat")
    tab.wait_for_function("() => document.querySelector('#own textarea').value === ''")
    tab.click("#more")
    tab.wait_for_function(
        "before => document.querySelector('#question-0')?.innerText != before", arg=question
    )
    # Uploads lie in the folder given, and nothing lies elsewhere.
    assert any(path.is_file() for path in site[2].rglob("*"))
    left = [path for path in site[1].rglob("*") if path.is_file() and ".cache" not in path.parts]
    assert left == []


WRITTEN = (
    'What do <image>, <b>bold</b>, <img src="https://evil.example/p.png">, '
    "<script>document.title = 1</script>, ![a](https://evil.example/m.png), "
    "[l](https://evil.example), `code`, **stars**, $$x^2$$, $y$, &lt; and 3 < 5 mean?"
)


def test_texts_are_shown_as_they_are_written_and_nothing_is_fetched(tab, site, image):
    upload(tab, image)
    tab.wait_for_selector("#question-0", state="visible")
    tab.fill("#own textarea", WRITTEN)
    tab.press("#own textarea", "Enter")
    wait_for_chat(tab, 2)
    assert tab.inner_text("#chat [data-testid=user]").strip() == WRITTEN
    assert tab.query_selector("#chat b, #chat [data-testid=user] img, #chat a, #chat code") is None
    assert tab.outside == []


@pytest.mark.slow
def test_what_the_model_writes_is_shown_as_it_is_written_too(adapter, golden):
    """The description and the questions, of a model that writes tags."""
    gradio = pytest.importorskip("gradio")
    page = Page(SelfQuestioner(*load(adapter)), answer_tokens=5, question_tokens=5)
    page.describe = lambda path: iter([(Talk(None, []), WRITTEN)] if path else [(None, "")])
    page.ask = lambda *_: [WRITTEN]
    page.answer = lambda *_: (_ for _ in ()).throw(ValueError(WRITTEN))
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    blocks = build(page)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1200, "height": 900})
            tab.set_default_timeout(WAIT)
            tab.goto(address)
            tab.wait_for_selector("#image input[type=file]", state="attached")
            upload(tab, golden / "images" / "0.png")
            tab.wait_for_selector("#question-0", state="visible")
            assert tab.input_value("#description textarea") == WRITTEN
            assert tab.inner_text("#question-0").strip() == WRITTEN
            tab.click("#question-0")
            assert WRITTEN in tab.inner_text(".toast-body")
            assert tab.query_selector(".toast-body b, .toast-body img, .toast-body a") is None
            browser.close()
    finally:
        blocks.close(verbose=False)
    assert gradio


def test_an_example_is_an_image_too(tab):
    tab.click("#examples button >> nth=1")
    tab.wait_for_selector("#question-0", state="visible")


def test_files_that_cannot_be_used_are_told_and_the_page_goes_on(tab, image, tmp_path):
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_bytes(b"\x89PNG no image")
    upload(tab, corrupt)
    told = tab.inner_text(".toast-body")
    assert "This image cannot be used: cannot identify image file 'corrupt.png'" in told
    tab.click(".toast-close")

    (tmp_path / "empty.png").write_bytes(b"")
    tab.reload()
    tab.wait_for_selector("#image input[type=file]", state="attached")
    upload(tab, tmp_path / "empty.png")
    assert "cannot identify image file 'empty.png'" in tab.inner_text(".toast-body")
    tab.click(".toast-close")

    large = tmp_path / "large.png"
    Image.new("1", (5000, MOST_PIXELS // 5000 + 1)).save(large)
    tab.reload()
    tab.wait_for_selector("#image input[type=file]", state="attached")
    upload(tab, large)
    assert f"is more than {MOST_PIXELS} pixels" in tab.inner_text(".toast-body")

    heavy = tmp_path / "heavy.bmp"
    heavy.write_bytes(b"BM" + bytes(11_000_000))
    tab.reload()
    tab.wait_for_selector("#image input[type=file]", state="attached")
    upload(tab, heavy)
    assert "exceed the maximum allowed size of 10.0 Mb" in tab.inner_text(".toast-body")

    tab.reload()
    tab.wait_for_selector("#image input[type=file]", state="attached")
    upload(tab, image)
    tab.wait_for_selector("#question-0", state="visible")


def test_the_server_itself_refuses_what_is_too_large(site):
    edge = b"--edge"
    head = b'Content-Disposition: form-data; name="files"; filename="heavy.bmp"\r\n\r\n'
    body = edge + b"\r\n" + head + bytes(11_000_000) + b"\r\n" + edge + b"--\r\n"
    request = urllib.request.Request(
        f"{site[0]}/gradio_api/upload",
        body,
        {"Content-Type": "multipart/form-data; boundary=edge"},
    )
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(request, timeout=60)


def status(address, data=None):
    """How the server answers a request."""
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_server_gives_out_no_files_but_its_own(site, golden):
    files = f"{site[0]}/gradio_api/file="
    assert status(f"{files}{site[2]}/diary.txt") == 403
    assert status(f"{files}{golden}/conversations.json") == 403
    assert status(f"{files}{golden}/images/0.png") == 403  # its copy is the example
    assert status(f"{files}http://192.0.2.1/a.png") == 403
    assert status(f"{files}https%3A//192.0.2.1/a.png") == 403
    assert (site[2] / "diary.txt").is_file()


def test_the_server_bounds_every_request(site):
    join = f"{site[0]}/gradio_api/queue/join"
    assert status(join, b" " * 1_000_001) == 413
    # Around the queue, where everyone waits in turn, nothing is to be had.
    for fn in range(12):
        body = json.dumps({"data": [None] * 6, "fn_index": fn, "session_hash": "x"}).encode()
        assert status(f"{site[0]}/gradio_api/run/predict", body) >= 400


def test_limits_hold_without_a_browser(site, image):
    client = pytest.importorskip("gradio_client")
    asked = client.Client(site[0], verbose=False)
    asked.predict(client.handle_file(image), api_name="/describe")
    with pytest.raises(Exception, match="may have 1000 characters, and this one has 60000"):
        asked.predict("a" * 60_000, api_name="/answer_own")
    chat, _ = asked.predict("Is it red?", api_name="/answer_own")
    assert len(chat) == 2
    address = {"path": "http://192.0.2.1/a.png", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception, match="addresses are not fetched"):
        asked.predict(address, api_name="/describe")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_open_clients_and_takes_the_uploads_along(
    number, adapter, image, tmp_path
):
    around, uploads = tmp_path / "around", tmp_path / "uploads"
    around.mkdir()
    client = pytest.importorskip("gradio_client")
    with serving(adapter, around, uploads) as (process, address):
        asked = client.Client(address, verbose=False)
        asked.predict(client.handle_file(image), api_name="/describe")
        assert any(path.is_file() for path in uploads.rglob("*"))
        with urllib.request.urlopen(f"{address}/gradio_api/heartbeat/abc", timeout=60):
            process.send_signal(number)
            assert process.wait(timeout=15) == 128 + number
        assert list(uploads.iterdir()) == []
        assert "Traceback" not in process.stdout.read()


def test_the_page_is_for_this_machine_alone(site):
    port = int(site[0].rpartition(":")[2])
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; tells this machine's outward address
        own = probe.getsockname()[0]
        if own != "127.0.0.1":
            with pytest.raises(OSError):
                socket.create_connection((own, port), timeout=5)
            return
    pytest.skip("this machine has no address but its own")
