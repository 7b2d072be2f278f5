"""The page: what it does without a browser, and in a real one."""

import contextlib
import shutil
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
from sqllava.data.images import ImageError
from sqllava.serve.cli import main
from sqllava.serve.page import MOST_PIXELS, Page

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
    with pytest.raises(ValueError, match="temperature must be above 0"):
        page.ask(talk, 3, 0.0, 300, 0.95)
    large = tmp_path / "large.png"
    Image.new("1", (MOST_PIXELS // 1000, 1001)).save(large)
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


def test_errors_of_the_command_are_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^error: no folder of examples: "):
        main(["--model", "m", "--examples", str(tmp_path / "nowhere")])
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'sqllava[serve]'")
    with pytest.raises(SystemExit, match="^error: nowhere: no config.json"):
        main(["--model", "nowhere", "--folder", str(tmp_path / "uploads")])


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(adapter, golden, tmp_path_factory):
    """The page's address, and the folders that its process may and may not write to."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'sqllava[serve]'")
    around = tmp_path_factory.mktemp("around")
    uploads = tmp_path_factory.mktemp("uploads")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--model", adapter, "--port", port, "--folder", uploads]
    words += ["--examples", golden / "images", "--answer-tokens", 12, "--question-tokens", 8]
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
        yield address, around, uploads
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
    """A tab of a real headless Chromium with the page in it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 900})
        tab.set_default_timeout(WAIT)
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


def test_an_example_is_an_image_too(tab):
    tab.click("#examples button >> nth=1")
    tab.wait_for_selector("#question-0", state="visible")


def test_files_that_cannot_be_used_are_told_and_the_page_goes_on(tab, image, tmp_path):
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_bytes(b"\x89PNG no image")
    upload(tab, corrupt)
    assert "cannot identify image file" in tab.inner_text(".toast-body")
    tab.click(".toast-close")

    large = tmp_path / "large.png"
    Image.new("1", (MOST_PIXELS // 1000, 1001)).save(large)
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
