"""What a record names besides its `image`: media that training would leave unseen.

Under `records.py` on the data's path. A record whose video is never seen would still teach its
answer; so keys and marks of media that are not read here are faults.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sqllava.conversation import IMAGE

# Words of a key that speak of media; plurals are read as singulars.
_PICTURES = {
    "image",
    "img",
    "picture",
    "pic",
    "photo",
    "screenshot",
    "pixel",
    "visual",
    "thumbnail",
}
_OTHERS = {
    *("video", "audio", "speech", "sound", "media", "frame", "movie", "gif"),
    *("mp3", "mp4", "wav", "pointcloud"),
}
# Last words of keys that tell about media, and name none.
_ABOUT = {
    *("id", "idx", "index", "count", "num", "number", "size", "width", "height", "w", "h"),
    *("shape", "resolution", "aspect", "ratio", "mode", "format", "type", "token", "license"),
    *("caption", "description", "text", "title", "label", "tag", "category", "class", "source"),
    *("set", "dataset", "split", "date", "hash", "md5", "sha256", "score", "quality"),
    *("duration", "length", "fps", "start", "end", "question", "answer", "box", "bbox", "crop"),
}
# Where `image` is there, these say once more where it lies or came from.
_WHERE = {"path", "file", "filename", "name", "url", "uri", "link", "folder", "dir", "root"}
_WORD = re.compile("[A-Z]?[a-z]+[0-9]*|[A-Z]+(?![a-z])|[a-z]+|[0-9]+")

# `<image_1>`, `<|image_pad|>`, `<VIDEO>`, `<ImageHere>`: placeholders of other toolkits.
_MARK = re.compile(
    r"<\|?\s*(?P<kind>image|img|picture|video|audio|speech|sound)"
    r"[ _-]?(?:\d+|pad|here|placeholder|token|start|end|soft[ _]token)?\s*\|?>",
    re.IGNORECASE,
)
# Which of them are HTML too, and no mark in the midst of a text.
_HTML = {"<img>", "<picture>", "<video>", "<audio>"}


def unread_media(record: Mapping[str, Any], turns: Sequence[Any]) -> str:
    """What a record names that training would not see, and what would be right; "" if nothing.

    A key is one if a word of it speaks of media ("video", "image_path"), its last word does not
    merely tell about some ("image_id", "video_duration"), and its value could name a file. In a
    record with an `image`, other keys may say where it lies ("image_url").

    Marks of pictures count in records without one, those of videos and sounds in all. Tags that
    HTML has too (`<video>`) count where marks stand: at the start of a human turn, or alone on its
    last line, unless the turn closes them.
    """
    has_image = bool(record.get("image"))
    for place, holder in [("", record), *((f"turn {i}: ", turn) for i, turn in enumerate(turns))]:
        for key, value in holder.items() if isinstance(holder, Mapping) else ():
            allowed = key in ("image", "conversations") if not place else key in ("from", "value")
            if not allowed and _names_media(str(key), value, has_image and not place):
                return (
                    f"{place}found {str(key)!r:.40}, which is not read; pictures are named in the "
                    f"record's 'image', each with its {IMAGE} mark, and other media have no place"
                )
    for number, turn in enumerate(turns):
        text = turn.get("value") if isinstance(turn, Mapping) else None
        mark = _mark(text, has_image) if number % 2 == 0 and isinstance(text, str) else ""
        if mark:
            return (
                f"turn {number}: found the mark {mark!r}, which is not read; pictures are marked "
                f"by {IMAGE} and named in 'image', and other media have no place"
            )
    return ""


def _names_media(key: str, value: Any, has_image: bool) -> bool:
    if not value or not isinstance(value, (str, list, dict, bytes)):
        return False
    words = [_singular(word.lower()) for word in _WORD.findall(key)]
    if not words or words[-1] in _ABOUT or (words[-1].isdigit() and len(words) == 1):
        return False
    if _OTHERS.intersection(words):
        return True
    shows = any(word.rstrip("0123456789") in _PICTURES for word in words)
    return shows and not (has_image and words[-1] in _WHERE)


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 2 and word.endswith("s") else word


def _mark(text: str, has_image: bool) -> str:
    for match in _MARK.finditer(text):
        mark, kind = match.group(), match["kind"].lower()
        if mark == IMAGE or (has_image and kind in ("image", "img", "picture")):
            continue
        lines = text.strip().splitlines()
        leads = text.lstrip().startswith(mark) or lines[-1].strip() == mark
        if mark.lower() not in _HTML or (leads and f"</{kind}>" not in text.lower()):
            return mark
    return ""
