"""What the page has of gradio's, made safe: the upload, and the guard before every request.

Imports gradio, and so is imported by `page.build` alone.
"""

from collections.abc import Awaitable, Callable
from typing import Any, cast

import gradio as gr

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


def upload(**options: Any) -> Any:
    """Gradio's image, as the name of a file that is not opened here, and never fetched.

    Gradio opens it outside the page's own limits, and tells of the server's folders when it fails.
    """
    image: Any = gr.Image(type="filepath", image_mode=None, **options)
    move = image.async_move_resource_to_block_cache

    async def move_file(name: Any) -> str | None:
        if name is not None and "://" in str(name):
            raise gr.Error("An image is sent as a file: addresses are not fetched.")
        return cast("str | None", await move(name))

    # On the component itself: of a class, gradio would write an interface file beside this one.
    image.preprocess = lambda payload: None if payload is None else payload.path
    image.async_move_resource_to_block_cache = move_file
    return image


class Guard:
    """Refuses requests that are too large, or that ask the server to fetch something.

    Args:
        app: what comes after, an ASGI application.
        most_bytes: of an upload.
        most_request_bytes: of any other request.
    """

    def __init__(self, app: Any, most_bytes: int, most_request_bytes: int) -> None:
        self._app = app
        self._most = most_bytes + most_request_bytes  # the form around a file has bytes, too
        self._most_request = most_request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            status, reason = refusal
            while (await receive()).get("more_body"):
                pass  # a client that is still sending would not hear the answer
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": reason.encode()})
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        path = scope["path"]
        _, asked, address = path.partition("/file=")
        if (asked and ":/" in address) or "/proxy=" in path:
            return 403, "nothing is fetched from elsewhere"
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return 411, "say how long the request is"
        most = self._most if path.endswith("/upload") else self._most_request
        return (413, f"a request may have {most} bytes") if int(length) > most else None
