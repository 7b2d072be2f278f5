"""`sqllava serve`: a page to drop an image on, see what the model asks about it, and talk about it.

A front to `SelfQuestioner` in one process. Texts are shown as they are written; what was
said about an image is remembered, so that each turn reads only what is new. Every limit holds on
the server: a browser is not the only thing that asks.
"""

import argparse
import contextlib
import html
import logging
import math
import os
import queue
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from PIL import Image

import sqllava
from sqllava.ask.data_engine import SUFFIXES
from sqllava.ask.questioner import SelfQuestioner, describing
from sqllava.conversation import Turn
from sqllava.data.images import load_image
from sqllava.generation.decoding import Decoding
from sqllava.generation.writer import EncodedImage, Stream
from sqllava.pixels import ImageError
from sqllava.serve import REQUEST_SECONDS

MOST_QUESTIONS = 8
MOST_PIXELS = 25_000_000
MOST_SIDE = 10_000  # of an image: it is padded to a square
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO")  # the last: cameras' JPEG
MOST_BYTES = 10 * 2**20  # of an upload
MOST_REQUEST_BYTES = 1_000_000  # of any other request
MOST_CHARACTERS = 1000
WAITING = 16
# What "How it asks" may be set to.
N_RANGE = (1, MOST_QUESTIONS)
TEMPERATURE_RANGE = (0.1, 2.0)
TOP_K_RANGE = (1, 1000)
TOP_P_RANGE = (0.05, 1.0)
# Each holds an image's keys and values: half a gigabyte of them at 7B.
SESSIONS = 8
SESSION_SECONDS = 1800
EXAMPLES = 6

logger = logging.getLogger(__name__)


@dataclass
class Talk:
    """What has been said about one image.

    Attributes:
        image: remembers what the model has read of it.
        turns: the description and all exchanges since.
    """

    image: EncodedImage
    turns: list[Turn]

    def chat(self) -> list[dict[str, str]]:
        """The exchanges after the description as the chat takes them, which is as HTML."""
        return [
            {
                "role": "assistant" if turn.role == "assistant" else "user",
                "content": as_html(turn.text or ""),
            }
            for turn in self.turns[2:]
        ]


def as_html(text: str) -> str:
    """HTML that shows a text as it is written, marks, tags, links and line breaks among it."""
    return html.escape(text).replace("\n", "<br>")


class StoppedError(RuntimeError):
    """A request that took too long, or that nobody waits for any more."""


class Page:
    """What the page does: each method takes the page's values and yields new ones.

    Args:
        answer_tokens: the longest description and answer.
        question_tokens: the longest question.
        seconds: how long a request may take.

    Raises:
        ValueError: one of these is below 1.
    """

    def __init__(
        self,
        questioner: SelfQuestioner,
        answer_tokens: int,
        question_tokens: int,
        seconds: float = REQUEST_SECONDS,
    ) -> None:
        if seconds <= 0:
            raise ValueError(f"a request needs more than 0 seconds, found {seconds}")
        self.questioner = questioner
        self.answering = Decoding(answer_tokens)
        self.question_tokens = Decoding(question_tokens).max_new_tokens
        self.seconds = seconds
        self._model = threading.Lock()  # one text at a time, whoever asks for it
        self._closed = threading.Event()
        self._deadline = math.inf
        self._abandoned = threading.Event()
        # Every token passes here, and every text that is read.
        questioner.model.model.language_model.register_forward_pre_hook(self._check_time)

    def close(self) -> None:
        """Stops what is being written, at its next token, and whatever is begun later."""
        self._closed.set()

    @contextlib.contextmanager
    def _at_work(self, abandoned: threading.Event | None = None) -> Iterator[None]:
        """The model, for one request, until its time is over or `abandoned` is set."""
        with self._model:
            self._abandoned = abandoned or threading.Event()
            self._deadline = time.monotonic() + self.seconds
            try:
                yield
            finally:
                self._deadline, self._abandoned = math.inf, threading.Event()

    def _check_time(self, *_: Any) -> None:
        if self._closed.is_set():
            raise StoppedError("the page is being closed")
        if self._abandoned.is_set():
            raise StoppedError("nobody waits for this any more")
        if time.monotonic() > self._deadline:
            raise StoppedError(f"this took more than {self.seconds:g} seconds and was stopped")

    def describe(self, path: str | None) -> Iterator[tuple[Talk | None, str]]:
        """Describes an image; yields the talk, once it can begin, and the description so far.

        Raises:
            ImageError: the file is no image, broken, or too large.
        """
        if path is None:
            yield None, ""
            return
        picture = open_upload(path)
        with self._at_work():
            image = self.questioner.encode([picture], remember=True)[0]
        text = ""
        for text in self._written(
            lambda stream: self.questioner.describe(image, self.answering.max_new_tokens, stream)
        ):
            yield None, text
        yield Talk(image, describing(text)), text

    def ask(
        self, talk: Talk | None, n: int, temperature: float, top_k: int, top_p: float
    ) -> list[str]:
        """Questions about the image, from all that has been said.

        Raises:
            ValueError: a setting is no number, or out of its bounds.
        """
        if talk is None:
            return []
        for name, (value, (low, high)) in {
            "questions": (n, N_RANGE),
            "temperature": (temperature, TEMPERATURE_RANGE),
            "top k": (top_k, TOP_K_RANGE),
            "top p": (top_p, TOP_P_RANGE),
        }.items():
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"{name} must be a number from {low} to {high}, found {value!r}")
        self._check_room(talk.turns, self.question_tokens)
        with self._at_work():
            return self.questioner.ask(
                talk.image, int(n), temperature, int(top_k), top_p, self.question_tokens,
                context=talk.turns,
            )  # fmt: skip

    def answer(
        self, question: str, talk: Talk | None, asker: Literal["user", "vuser"]
    ) -> Iterator[list[dict[str, str]]]:
        """Answers a question; yields the chat so far.

        Raises:
            ValueError: there is no image yet, no question, or no room for it.
        """
        question = str(question or "").strip()
        if talk is None:
            raise ValueError("give an image first")
        if not question:
            raise ValueError("write a question first")
        if len(question) > MOST_CHARACTERS:
            raise ValueError(
                f"a question may have {MOST_CHARACTERS} characters, and this one has "
                f"{len(question)}"
            )
        asked = [*talk.turns, Turn(asker, question)]
        self._check_room(asked, self.answering.max_new_tokens)
        text = ""
        for text in self._written(
            lambda stream: self.questioner.answer_batch(
                [talk.image], [question], [talk.turns], self.answering, asker, stream
            )[0]
        ):
            yield Talk(talk.image, [*asked, Turn("assistant", text)]).chat()
        talk.turns = [*asked, Turn("assistant", text)]
        yield talk.chat()

    def forget(self, talk: Talk | None) -> None:
        """Takes back all exchanges; the description stays."""
        if talk:
            talk.turns = talk.turns[:2]

    def _check_room(self, turns: Sequence[Turn], new: int) -> None:
        """Raises ValueError if a talk and what is to be written exceed what the model can read."""
        text: Any = self.questioner.model.config.get_text_config()
        most = getattr(text, "max_position_embeddings", None)
        prompt = self.questioner.processor.encode_turns([*turns, Turn("assistant", None)])
        if most is not None and len(prompt) + new > most:
            raise ValueError("this talk has grown too long for the model: clear its answers")

    def _written(self, write: Callable[[Stream], str]) -> Iterator[str]:
        """What `write` has written so far, whenever there is more of it."""
        pieces: queue.Queue[str | BaseException | None] = queue.Queue()
        abandoned = threading.Event()

        def work() -> None:
            try:
                with self._at_work(abandoned):
                    write(lambda row, text, last: pieces.put(text))
                pieces.put(None)
            except BaseException as error:  # raised again where it is waited for
                pieces.put(error)

        threading.Thread(target=work, daemon=True).start()
        text = ""
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                text += piece
                yield text.strip()
        finally:
            abandoned.set()


def open_upload(path: str) -> Image.Image:
    """Reads an image that somebody has sent.

    Raises:
        ImageError: it is no image of `FORMATS`, broken, or larger than the page takes.
    """
    width, height, kind = 0, 0, "JPEG"
    # `load_image` tells what is wrong with a file that cannot be opened.
    with contextlib.suppress(Exception), Image.open(path) as header:
        (width, height), kind = header.size, header.format or "nameless"
    if kind not in FORMATS:
        raise ImageError(f"{path}: a file of kind {kind}; these are read: {', '.join(FORMATS)}")
    if max(width, height) > MOST_SIDE:
        raise ImageError(f"{path}: {width}x{height} has a side of more than {MOST_SIDE} pixels")
    return load_image(path, MOST_PIXELS)


# --- the page -------------------------------------------------------------------------------------


def build(page: Page, examples: Sequence[Path] = ()) -> Any:
    """The page as gradio's Blocks."""
    import gradio as gr

    from sqllava.serve.gradio_parts import upload

    with gr.Blocks(title="SQ-LLaVA", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown("# SQ-LLaVA\nGive it an image: it describes it and asks about it. Click a "
                    "question to have it answered, or ask one yourself.")  # fmt: skip
        talk = gr.State(None, time_to_live=SESSION_SECONDS)
        with gr.Row():
            with gr.Column(scale=2):
                image = upload(label="Image", elem_id="image", height=320, buttons=[],
                               sources=["upload", "clipboard"])  # fmt: skip
                sampling = _sampling()
                if examples:
                    gr.Examples([str(path) for path in examples], image, cache_examples=False,
                                elem_id="examples")  # fmt: skip
            with gr.Column(scale=3):
                description = gr.Textbox(label="Description", lines=3, elem_id="description")
                questions = [
                    gr.Button(visible=False, elem_id=f"question-{number}")
                    for number in range(MOST_QUESTIONS)
                ]
                more = gr.Button("Ask other questions", visible=False, elem_id="more", size="sm")
                # Without buttons: they would copy HTML, and send the talk elsewhere.
                chat = gr.Chatbot(label="Answers", elem_id="chat", render_markdown=False,
                                  latex_delimiters=[], buttons=[])  # fmt: skip
                own = gr.Textbox(label="Your question", max_length=MOST_CHARACTERS, elem_id="own",
                                 submit_btn=True)  # fmt: skip

        def shown(texts: Sequence[str]) -> list[Any]:
            """The buttons with questions, and the one for more of them."""
            none_left = MOST_QUESTIONS - len(texts)
            buttons = [gr.Button(text, visible=True) for text in texts]
            buttons += [gr.Button(visible=False)] * none_left
            return [*buttons, gr.Button(visible=bool(texts))]

        def describe(path: str | None) -> Iterator[Any]:
            with _told(path):
                for begun, text in page.describe(path):
                    yield begun, text, [], *shown([])

        def ask(begun: Talk | None, *settings: Any) -> list[Any]:
            with _told():
                return shown(page.ask(begun, *settings))

        def answer(question: str, begun: Talk | None, asker: Any) -> Iterator[Any]:
            with _told():
                yield from page.answer(question, begun, asker)

        def answer_own(question: str, begun: Talk | None) -> Iterator[Any]:
            # The box is emptied once: what is typed into it during an answer stays.
            box: Any = ""
            for messages in answer(question, begun, "user"):
                yield messages, box
                box = gr.skip()

        one: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        buttons = [*questions, more]
        image.change(describe, image, [talk, description, chat, *buttons], **one).success(
            ask, [talk, *sampling], buttons, **one
        )
        more.click(ask, [talk, *sampling], buttons, **one)
        for button in questions:
            button.click(answer, [button, talk, gr.State("vuser")], chat, **one)
        chat.clear(page.forget, talk)
        own.submit(answer_own, [own, talk], [chat, own], **one)
    return blocks.queue(max_size=WAITING, api_open=False)


def _sampling() -> list[Any]:
    """The settings of the questions, as `Page.ask` takes them."""
    import gradio as gr

    with gr.Accordion("How it asks", open=False):
        return [
            gr.Slider(*N_RANGE, 4, step=1, label="Questions"),
            gr.Slider(*TEMPERATURE_RANGE, 1.2, step=0.1, label="Temperature"),
            gr.Slider(*TOP_K_RANGE, 300, step=1, label="Top k"),
            gr.Slider(*TOP_P_RANGE, 0.95, step=0.05, label="Top p"),
        ]


@contextlib.contextmanager
def _told(path: str | None = None) -> Iterator[None]:
    """Shows people what went wrong: in its own words, as text, and without the server's folders.

    Args:
        path: the file that a request is about.
    """
    import gradio as gr

    folder = f"{os.path.dirname(path or '')}/"
    try:
        yield
        return
    except ImageError as error:
        reason = str(error.__cause__ or error).replace(f"{path}: ", "").replace(folder, "")
        told = f"This image cannot be used: {reason}"
    except (ValueError, StoppedError) as error:
        told = str(error)
    except Exception as error:
        logger.exception("a request failed")
        told = f"This failed ({type(error).__name__}); the server's log says more."
    # The browser takes it as HTML.
    raise gr.Error(html.escape(told), print_exception=False)


# --- serving ----------------------------------------------------------------------------------


def serve(args: argparse.Namespace) -> None:
    """Loads the model and serves the page until a signal ends it.

    Raises:
        FileNotFoundError: there is no model, or no folder of examples.
        ValueError: the model's template has no role that asks; the folder or the address cannot
            be used.
        SystemExit: SIGINT or SIGTERM came; nothing of the page's is left on disk.
    """
    examples = _examples(args.examples) if args.examples else []
    _check_address(args.host, args.port)
    with _ended_by_signals(), _folder(args.folder) as folder:
        # Before gradio is imported, which reads them: all it writes goes to our folder, and
        # nothing is told to its makers.
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        os.environ["GRADIO_EXAMPLES_CACHE"] = str(folder / "examples")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise ValueError("the page needs gradio: pip install 'sqllava[serve]'") from error
        model, processor = sqllava.load(
            args.model, args.base, args.vision_tower, device=args.device
        )
        questioner = SelfQuestioner(model, processor)
        questioner.check_asks()
        page = Page(questioner, args.answer_tokens, args.question_tokens, args.seconds)
        blocks = _launch(page, examples, args.host, args.port)
        logger.info("serving on http://%s:%d", args.host, args.port)
        try:
            threading.Event().wait()
        finally:
            page.close()
            blocks.close(verbose=False)


def _launch(page: Page, examples: Sequence[Path], host: str, port: int) -> Any:
    """Starts the server in a thread of its own."""
    from starlette.middleware import Middleware

    from sqllava.serve.gradio_parts import Guard

    guard = Middleware(Guard, most_bytes=MOST_BYTES, most_request_bytes=MOST_REQUEST_BYTES)
    blocks = build(page, examples)
    blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        app_kwargs={"middleware": [guard]},
        share=False,
        show_error=False,  # but for gradio's Error, which is what people are told with
        quiet=True,
        max_file_size=MOST_BYTES,
        state_session_capacity=SESSIONS,
        ssr_mode=False,
        footer_links=[],
    )
    # Open pages hold connections, which would keep it for ever.
    blocks.server.config.timeout_graceful_shutdown = 1
    return blocks


def _check_address(host: str, port: int) -> None:
    """Raises ValueError if nothing can be served there: a model takes minutes to load first."""
    if not 1 <= port <= 65535:
        raise ValueError(f"--port must be from 1 to 65535, found {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ValueError(f"cannot serve on --host {host} --port {port}: {reason}") from error


@contextlib.contextmanager
def _folder(within: Path | None) -> Iterator[Path]:
    """A folder for uploads that is new, as gradio serves all that lies in it, and goes at the end.

    Args:
        within: where to make it; the system's place for temporary files by default.
    """
    try:
        if within is not None:
            within.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(
            prefix="sqllava-serve-", dir=within, ignore_cleanup_errors=True
        )
    except OSError as error:
        raise ValueError(f"--folder {within}: {error.strerror or error}") from error
    with made as name:
        yield Path(name).resolve()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Makes SystemExit of Ctrl-C and SIGTERM, so that what is open is closed on the way out."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # once is enough: closing takes a second or two
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _examples(folder: Path) -> list[Path]:
    """The first images of a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of examples: {folder}")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return images[:EXAMPLES]
