"""Records of others' files: a field of the kind that it must be, or a sentence that says where it
stands, what was found and what would be right.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

KEYS = 12  # of a record that an error names


@dataclass(frozen=True, slots=True)
class Record:
    """An object of a benchmark's file.

    Every method raises ValueError, with the place in it, where a field is missing or of another
    kind.

    Attributes:
        where: the file, and the record's number or id in it.
    """

    row: Row
    where: str

    def fault(self, needs: str) -> ValueError:
        """The error to raise where the record lacks what it needs."""
        more = ", ..." if len(self.row) > KEYS else ""
        keys = ", ".join(plain(name) for name in list(self.row)[:KEYS])
        return ValueError(f"{self.where}: {needs}, found [{keys}{more}]")

    def wrong(self, name: str, wanted: str) -> ValueError:
        """The error to raise where a field is not what is wanted."""
        found = shown(self.row.get(name))
        return ValueError(f"{self.where}: {plain(name)} must be {wanted}, found {found}")

    def _value(self, name: str, wanted: str) -> Any:
        if name not in self.row:
            raise self.fault(f"no {name!r} ({wanted})")
        return self.row[name]

    def text(self, name: str) -> str:
        """A text; a number counts as its text."""
        text = as_text(self._value(name, "a text"))
        if text is None:
            raise self.wrong(name, "a text")
        return text

    def optional_text(self, name: str) -> str | None:
        """A text, or None where there is none: no such field, null or NaN."""
        value = self.row.get(name)
        if value is None or isinstance(value, float) and math.isnan(value):
            return None
        return self.text(name)

    def texts(self, name: str) -> list[str]:
        """A list of texts."""
        texts = [as_text(value) for value in self.values(name)]
        known = [text for text in texts if text is not None]
        if len(known) < len(texts):
            raise self.wrong(name, "a list of texts")
        return known

    def integer(self, name: str) -> int:
        """A whole number, also one that is written as a text or as 2.0."""
        value = self._value(name, "a whole number")
        if isinstance(value, str):
            digits = value.strip().removeprefix("-")
            if digits.isascii() and digits.isdecimal() and len(digits) < 20:
                return int(value)
        elif isinstance(value, float) and value.is_integer():
            return int(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            return value
        raise self.wrong(name, "a whole number")

    def id(self, name: str) -> int | str:
        """An id: a text as it is, or a whole number."""
        value = self._value(name, "an id")
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self.integer(name)
        raise self.wrong(name, "a text or a whole number")

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._value(name, "true or false")
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def values(self, name: str) -> list[Any]:
        """A list."""
        value = self._value(name, "a list")
        if not isinstance(value, list):
            raise self.wrong(name, "a list")
        return value

    def record(self, name: str) -> "Record":
        """An object within this one."""
        value = self._value(name, "an object")
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Record(value, f"{self.where}, {plain(name)}")

    def records(self, name: str) -> list["Record"]:
        """A list of objects; they are numbered from 1."""
        return listed(self.values(name), f"{self.where}, {plain(name)}")

    def named(self) -> dict[str, "Record"]:
        """Objects by their names, which this one consists of."""
        return {name: self.record(name) for name in self.row}


def listed(values: Any, where: str) -> list[Record]:
    """The objects of a list, numbered from 1.

    Raises:
        ValueError: it is no list, or holds something else.
    """
    if not isinstance(values, list):
        raise ValueError(f"{where}: expected a list of records, found {shown(values)}")
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise ValueError(f"{where}, record {number}: expected an object, found {shown(value)}")
    return [Record(value, f"{where}, record {number}") for number, value in enumerate(values, 1)]


def plain(name: str) -> str:
    """A name as it is, if it can stand in a sentence; quoted and escaped otherwise."""
    return name if name.isprintable() else repr(name)


def as_text(value: Any) -> str | None:
    """A text as it is, a number as its text; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return None if isinstance(value, float) and math.isnan(value) else str(value)


def shown(value: Any) -> str:
    """A value for people: its kind, and how it begins."""
    if value is None:
        return "null"
    kinds: Mapping[type, str] = {dict: "an object", list: "a list", str: "the text", bool: ""}
    kind = kinds.get(type(value), "the number")
    begin = json.dumps(value, ensure_ascii=False, default=str)
    return f"{kind} {begin[:60]}{'...' * (len(begin) > 60)}".strip()
