"""`sqllava serve`: a page to drop an image on, see what the model asks about it, and talk about it.

A front to `SelfQuestioner` in one process. Texts are shown as they are written; what was
said about an image is remembered, so that each turn reads only what is new.
"""

import argparse
import contextlib
import logging
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqllava
from sqllava.ask.data_engine import SUFFIXES
from sqllava.ask.questioner import SelfQuestioner, describing
from sqllava.conversation import Turn
from sqllava.data.images import ImageError, load_image
from sqllava.generation.decoding import Decoding
from sqllava.generation.writer import EncodedImage, Stream

MOST_QUESTIONS = 8
MOST_PIXELS = 25_000_000
MOST_BYTES = "10mb"
MOST_CHARACTERS = 1000
WAITING = 16
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
        """The exchanges after the description, as the chat shows them."""
        return [
            {
                "role": "assistant" if turn.role == "assistant" else "user",
                "content": turn.text or "",
            }
            for turn in self.turns[2:]
        ]


class Page:
    """What the page does: each method takes the page's values and yields new ones.

    Args:
        answer_tokens: the longest description and answer.
        question_tokens: the longest question.
    """

    def __init__(
        self, questioner: SelfQuestioner, answer_tokens: int, question_tokens: int
    ) -> None:
        self.questioner = questioner
        self.answer_tokens = answer_tokens
        self.question_tokens = question_tokens
        self._model = threading.Lock()  # one text at a time, whoever asks for it

    def describe(self, path: str | None) -> Iterator[tuple[Talk | None, str]]:
        """Describes an image; yields the talk, once it can begin, and the description so far.

        Raises:
            ImageError: the file is no image, broken, or too large.
        """
        if path is None:
            yield None, ""
            return
        picture = load_image(path, MOST_PIXELS)
        with self._model:
            image = self.questioner.encode([picture], remember=True)[0]
        text = ""
        for text in self._written(
            lambda stream: self.questioner.describe(image, self.answer_tokens, stream)
        ):
            yield None, text
        yield Talk(image, describing(text)), text

    def ask(
        self, talk: Talk | None, n: int, temperature: float, top_k: int, top_p: float
    ) -> list[str]:
        """Questions about the image, from all that has been said."""
        if talk is None:
            return []
        with self._model:
            return self.questioner.ask(
                talk.image, int(n), temperature, int(top_k), top_p, self.question_tokens,
                context=talk.turns,
            )  # fmt: skip

    def answer(
        self, question: str, talk: Talk | None, asker: Literal["user", "vuser"]
    ) -> Iterator[list[dict[str, str]]]:
        """Answers a question; yields the chat so far.

        Raises:
            ValueError: there is no image yet, or no question.
        """
        question = question.strip()
        if talk is None:
            raise ValueError("give an image first")
        if not question:
            raise ValueError("write a question first")
        asked = [*talk.turns, Turn(asker, question)]
        decoding = Decoding(self.answer_tokens)
        text = ""
        for text in self._written(
            lambda stream: self.questioner.answer_batch(
                [talk.image], [question], [talk.turns], decoding, asker, stream
            )[0]
        ):
            yield Talk(talk.image, [*asked, Turn("assistant", text)]).chat()
        talk.turns = [*asked, Turn("assistant", text)]
        yield talk.chat()

    def forget(self, talk: Talk | None) -> None:
        """Takes back all exchanges; the description stays."""
        if talk:
            talk.turns = talk.turns[:2]

    def _written(self, write: Callable[[Stream], str]) -> Iterator[str]:
        """What `write` has written so far, whenever there is more of it."""
        pieces: queue.Queue[str | BaseException | None] = queue.Queue()

        def work() -> None:
            try:
                with self._model:
                    write(lambda row, text, last: pieces.put(text))
                pieces.put(None)
            except BaseException as error:  # raised again where it is waited for
                pieces.put(error)

        threading.Thread(target=work, daemon=True).start()
        text = ""
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            text += piece
            yield text.strip()


# --- the page -------------------------------------------------------------------------------------


def build(page: Page, examples: Sequence[Path] = ()) -> Any:
    """The page as gradio's Blocks."""
    import gradio as gr

    with gr.Blocks(title="SQ-LLaVA", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown("# SQ-LLaVA\nGive it an image: it describes it and asks about it. Click a "
                    "question to have it answered, or ask one yourself.")  # fmt: skip
        talk = gr.State(None, time_to_live=SESSION_SECONDS)
        with gr.Row():
            with gr.Column(scale=2):
                # As a file's name: the file is opened by us, within our limits.
                image = gr.Image(type="filepath", image_mode=None, label="Image", elem_id="image",
                                 sources=["upload", "clipboard"], height=320)  # fmt: skip
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
                # Without its button to share, which would send the talk elsewhere.
                chat = gr.Chatbot(label="Answers", elem_id="chat", render_markdown=False,
                                  buttons=["copy"])  # fmt: skip
                own = gr.Textbox(label="Your question", max_length=MOST_CHARACTERS, elem_id="own",
                                 submit_btn=True)  # fmt: skip

        def shown(texts: Sequence[str]) -> list[Any]:
            """The buttons with questions, and the one for more of them."""
            none_left = MOST_QUESTIONS - len(texts)
            buttons = [gr.Button(text, visible=True) for text in texts]
            buttons += [gr.Button(visible=False)] * none_left
            return [*buttons, gr.Button(visible=bool(texts))]

        def describe(path: str | None) -> Iterator[Any]:
            with _told():
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
    return blocks.queue(max_size=WAITING)


def _sampling() -> list[Any]:
    """The settings of the questions, as `Page.ask` takes them."""
    import gradio as gr

    with gr.Accordion("How it asks", open=False):
        return [
            gr.Slider(1, MOST_QUESTIONS, 4, step=1, label="Questions"),
            gr.Slider(0.1, 2.0, 1.2, step=0.1, label="Temperature"),
            gr.Slider(1, 1000, 300, step=1, label="Top k"),
            gr.Slider(0.05, 1.0, 0.95, step=0.05, label="Top p"),
        ]


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Shows people what went wrong, in its own words."""
    import gradio as gr

    try:
        yield
    except ImageError as error:
        raise gr.Error(f"This image cannot be used: {error.__cause__ or error}") from error
    except Exception as error:
        logger.exception("a request failed")
        raise gr.Error(str(error) or type(error).__name__) from error


# --- serving ----------------------------------------------------------------------------------


def serve(args: argparse.Namespace) -> None:
    """Loads the model and serves the page.

    Raises:
        FileNotFoundError: there is no model, or no folder of examples.
        ValueError: the model's template has no role that asks.
    """
    examples = _examples(args.examples) if args.examples else []
    with tempfile.TemporaryDirectory(prefix="sqllava-serve-") as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
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
        page = Page(questioner, args.answer_tokens, args.question_tokens)
        logger.info("serving on http://%s:%d", args.host, args.port)
        build(page, examples).launch(
            server_name=args.host,
            server_port=args.port,
            share=False,
            show_error=True,
            quiet=True,
            max_file_size=MOST_BYTES,
            state_session_capacity=SESSIONS,
            ssr_mode=False,
            footer_links=[],
        )


def _examples(folder: Path) -> list[Path]:
    """The first images of a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of examples: {folder}")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return images[:EXAMPLES]
