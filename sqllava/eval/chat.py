"""A chat model behind an OpenAI-compatible server: a request -> its text, or a sentence why not."""

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqllava.eval.records import Row

logger = logging.getLogger(__name__)

PUBLISHED = "published"
# What servers call the limit of a reply's length, the published name first.
LIMIT_NAMES = ("max_tokens", "max_completion_tokens")
LONGEST_COMPLAINT = 200
# Of a complaint about one request's length: servers name the parameter there, too.
_OF_LENGTH = ("context length", "context window", "context_length", "too large", "too long")


class JudgeError(RuntimeError):
    """The judge gave no reply, after all retries."""


@dataclass(frozen=True)
class Request:
    """One message to the judge."""

    messages: Sequence[Mapping[str, str]]
    max_tokens: int
    temperature: float


@dataclass(frozen=True)
class Reply:
    """What came back, and which model said it."""

    text: str
    model: str


@dataclass
class Parameters:
    """What goes with a request beside its messages: the published values, unless asked otherwise.

    Attributes:
        limit_name: what the server calls the limit of a reply's length; None sends no limit.
        limit: in place of the published one.
        temperature: in place of the published ones, PUBLISHED; None sends none.
    """

    limit_name: str | None = LIMIT_NAMES[0]
    limit: int | None = None
    temperature: float | str | None = PUBLISHED

    def of(self, request: Request) -> Row:
        """A request's parameters."""
        sent: Row = {}
        if self.limit_name:
            sent[self.limit_name] = self.limit or request.max_tokens
        if self.temperature is not None:
            published = self.temperature == PUBLISHED
            sent["temperature"] = request.temperature if published else self.temperature
        return sent

    def give_up(self, complaint: str) -> str | None:
        """Does without what a server's complaint names; says what it does, or None if nothing.

        A request that is too long has a complaint of its own, and takes nothing from the others.
        """
        if any(words in complaint.lower() for words in _OF_LENGTH):
            return None
        if "temperature" in complaint and self.temperature is not None:
            self.temperature = None
            return "the judge refuses the temperature: asking without one"
        if self.limit_name and any(name in complaint for name in LIMIT_NAMES):
            refused, *others = LIMIT_NAMES[LIMIT_NAMES.index(self.limit_name) :]
            self.limit_name = others[0] if others else None
            return f"the judge refuses {refused}: asking with {self.limit_name or 'no limit'}"
        return None

    @property
    def are_published(self) -> bool:
        return self.limit is None and self.temperature == PUBLISHED and bool(self.limit_name)


class Judge:
    """A chat model behind an OpenAI-compatible server.

    A parameter that the server refuses by name is given up for good: newer models know
    `max_completion_tokens` alone and no temperature.

    Args:
        model: its name there.
        base_url: the server; $OPENAI_BASE_URL, or OpenAI's own. The key is in $OPENAI_API_KEY.
        retries: of a request that the server refuses for now, drops or stalls on, with growing
            pauses, or the pause that the server asks for.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None,
        timeout: float,
        retries: int,
        concurrency: int,
        parameters: Parameters,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise RuntimeError("no openai: pip install 'sqllava[eval]'") from None
        key = os.environ.get("OPENAI_API_KEY", "")
        if not key.strip():
            raise ValueError("the judge's key is not in $OPENAI_API_KEY")
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                "$OPENAI_API_KEY holds characters that no key has: is it cut or pasted?"
            )
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise ValueError(f"--base-url begins with http:// or https://, found {base_url!r}")
        self.model = model
        self.parameters = parameters
        self._openai = openai
        self._timeout = timeout
        self._client = openai.AsyncOpenAI(base_url=base_url, timeout=timeout, max_retries=retries)
        self._slots = asyncio.Semaphore(concurrency)

    async def ask(self, request: Request) -> Reply:
        """Sends one request.

        Raises:
            JudgeError: it failed, or came back without a text; a sentence says why.
        """
        messages = [
            {name: _encodable(text) for name, text in message.items()}
            for message in request.messages
        ]
        async with self._slots:
            while True:
                sent = self.parameters.of(request)
                try:
                    done = await self._client.chat.completions.create(
                        model=self.model, messages=cast(Any, messages), **sent
                    )
                except self._openai.APIStatusError as error:
                    if not self._gives_up(error, sent, request):
                        raise JudgeError(_refusal(error)) from None
                except self._openai.OpenAIError as error:
                    raise JudgeError(self._no_answer(error)) from None
                # The client stumbles in many ways over an answer that is not what it should be.
                except (ValueError, TypeError, AttributeError, LookupError) as error:
                    raise JudgeError(f"the reply is no chat completion ({error})") from None
                else:
                    return Reply(_text_of(done), str(getattr(done, "model", None) or self.model))

    def _gives_up(self, error: Any, sent: Row, request: Request) -> bool:
        """Whether it makes sense to ask again at once, with other parameters."""
        if error.status_code not in (400, 422):
            return False
        if self.parameters.of(request) != sent:
            return True  # a request beside this one has given something up meanwhile
        said = self.parameters.give_up(f"{error.param} {error.message} {error.body}")
        if said:
            logger.warning("%s", said)
        return said is not None

    def _no_answer(self, error: Exception) -> str:
        if isinstance(error, self._openai.APITimeoutError):
            return f"no reply within {self._timeout:g} s (--timeout)"
        if isinstance(error, self._openai.APIConnectionError):
            return f"cannot reach {self._client.base_url}: {error.__cause__ or error}"
        return f"the reply is no chat completion ({error})"


def _encodable(text: str) -> str:
    """A text as it can be sent: half a character, as a "\\ud83d" in JSON, is a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


_ADVICE = {
    401: "the server refuses the key in $OPENAI_API_KEY",
    403: "the key in $OPENAI_API_KEY may not use this judge",
    404: "no such judge or address: look at --judge and --base-url",
    429: "the server's limit of requests is reached: try again later, or with less --concurrency",
}


def _refusal(error: Any) -> str:
    """A server's refusal as a sentence."""
    advice = _ADVICE.get(error.status_code, "the server refuses or fails")
    wait = error.response.headers.get("retry-after")
    later = f"; it asks to wait {wait} s" if error.status_code == 429 and wait else ""
    return f"{advice} ({error.status_code}: {_complaint(error)}){later}"


def _complaint(error: Any) -> str:
    """What the server said, in one line."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    text = " ".join(str(body or "nothing more").split())
    return "a web page" if text.startswith("<") else text[:LONGEST_COMPLAINT]


def _text_of(done: Any) -> str:
    """The text of a chat completion.

    Raises:
        JudgeError: there is none; a sentence says what is there.
    """
    if isinstance(done, str):
        said = " ".join(done.split())
        if said.startswith(("data:", "event:", ":")):
            raise JudgeError("the reply is a stream of events, where one JSON object was asked for")
        if said.startswith("<"):
            raise JudgeError("the reply is a web page: look at --base-url, which ends in /v1 often")
        raise JudgeError(f"the reply is no chat completion: {said[:LONGEST_COMPLAINT]!r}")
    failure = getattr(done, "error", None)
    if failure:
        message = failure.get("message", failure) if isinstance(failure, dict) else failure
        raise JudgeError(f"the server fails: {str(message)[:LONGEST_COMPLAINT]}")
    choices = getattr(done, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise JudgeError("the reply holds no choices: no chat completion, or an empty one")
    message = getattr(choices[0], "message", None)
    content, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
    if isinstance(content, list):  # parts, as some servers write it
        parts = (part.get("text") for part in content if isinstance(part, dict))
        content = "".join(part for part in parts if isinstance(part, str))
    cut = getattr(choices[0], "finish_reason", None) == "length"
    if isinstance(content, str) and (content.strip() or not cut):
        return content
    if refusal:
        raise JudgeError(f"the judge refuses: {str(refusal)[:LONGEST_COMPLAINT]}")
    if cut:
        raise JudgeError("the reply holds no text: its length was used up before (--max-tokens)")
    raise JudgeError("the reply holds no text")
