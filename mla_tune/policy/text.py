"""Policies as text in the form in which this project writes them: a writer, and a reader of nothing else.

The form is a part of the YAML that :mod:`mla_tune.policy.codec` reads: printable ASCII, blocks of lower-case keys two
blanks deeper than what holds them, and below them values in flow style, each on one line. A server reads files that
``mla-tune fit`` wrote; for them it neither imports PyYAML nor pays for its events. Of a text that is not surely in this
form the reader says None, and the other one reads it or says what is wrong with it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mla_tune.errors import PolicyError

Value = Any
"""A tree of dict (string keys), list, str, int, float, bool and None."""

MAX_DEPTH = 16
"""Nesting that is read; the schema needs 8."""
_LONGEST_WORD = 1000
"""YAML allows no key of more than 1024 characters."""
_BLOCK_DEPTH, _FLOW_DEPTH = 6, 4
"""What this form needs; together they stay below the limit."""
MAX_INT64 = 2**63 - 1
REBUILD = "rebuild the file with `mla-tune fit`"
"""The next step of every error about a file's content."""
RESERVED = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
"""Words that some YAML reader takes for a boolean or a null, whatever their case."""

_WORD = re.compile(r"[A-Za-z_/][A-Za-z0-9_./+-]*(?: [A-Za-z0-9_./+-]+)*")
"""A string that is written without quotes."""
_LINE = re.compile(r"( *)(- )?(?:([a-z_][a-z0-9_]*):(?: (.+))?|(\{.+\}))")
"""Indentation, the mark of a list's item, then a key (its value may lie below), or an item in flow style."""
_NO_BRACKETS = re.compile(r"[^\[\]{}]+")


class _UnsureError(Exception):
    """The text may be in another form."""


def _once(pairs: list[tuple[str, Value]]) -> dict[str, Value]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _UnsureError
    return found


def _integer(digits: str) -> int:
    if len(digits) >= len(str(MAX_INT64)):
        raise _UnsureError
    return int(digits)


_JSON = json.JSONDecoder(object_pairs_hook=_once, parse_int=_integer)


def shown(value: object) -> str:
    """``value`` as an error prints it: on one line and short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_written(text: str) -> dict[str, Value] | None:
    """What :func:`mla_tune.policy.codec.read_yaml` gives for ``text``, or None where another form is possible.

    Parts of the value may be one object; it is to be converted, not changed.
    """
    lines = text.split("\n")
    if lines.pop() or not text.isascii() or "\\" in text or not "".join(lines).isprintable():
        return None  # a last line without its end, or characters that may be escaped or forbidden
    first = next((at for at, line in enumerate(lines) if not line.startswith("#")), len(lines))
    try:
        parts = [_parts(line) for line in lines[first:]]
        return _Block(parts, _values([part[3] for part in parts if part[3] is not None])).document()
    except (_UnsureError, ValueError, RecursionError):  # ValueError: not JSON
        return None


_Part = tuple[int, bool, str | None, str | None]
"""Of a line: where its key or item begins, whether it begins an item of a list, the key, and the flow-style value."""


def _parts(line: str) -> _Part:
    found = _LINE.fullmatch(line)
    if found is None:
        raise _UnsureError
    blanks, mark, key, flow, item = found.groups()
    if (item is not None and mark is None) or len(key or "") > _LONGEST_WORD:
        raise _UnsureError
    return len(blanks) + (2 if mark else 0), mark is not None, key, flow if key else item


def _values(flows: Iterable[str]) -> dict[str, Value]:
    """Values in flow style by their text: they are JSON, all in one array, once their words are in quotes.

    Each closes its quotes and, outside them, its brackets: none can reach into another's place in the array.
    """
    ordered = list(dict.fromkeys(flows))
    skeletons = {_NO_BRACKETS.sub("", flow if '"' not in flow else "".join(flow.split('"')[::2])) for flow in ordered}
    if any(flow.count('"') % 2 for flow in ordered) or not all(map(_is_closed, skeletons)):
        raise _UnsureError
    words: dict[str, str] = {}

    def quoted(found: re.Match[str]) -> str:
        word = found[0]
        known = words.get(word)
        if known is None:
            if len(word) > _LONGEST_WORD or (word.lower() in RESERVED and word not in ("true", "false", "null")):
                raise _UnsureError
            known = words[word] = word if word in RESERVED else f'"{word}"'
        return known

    parts = ", ".join(ordered).split('"')
    for at in range(0, len(parts), 2):  # what is not quoted already
        part = parts[at]
        if part.count(":") != part.count(": ") or part.count(",") != part.count(", "):  # a:b is a string in YAML
            raise _UnsureError
        parts[at] = _WORD.sub(quoted, part)
    if any(len(part) > _LONGEST_WORD for part in parts[1::2]):
        raise _UnsureError
    array = '"'.join(parts)
    return dict(zip(ordered, _JSON.decode(f"[{array}]"), strict=True))


def _is_closed(brackets: str) -> bool:
    """Whether every bracket is closed, and they nest no deeper than this form needs."""
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in "[{" else -1
        if not 0 <= depth <= _FLOW_DEPTH:
            return False
    return depth == 0


class _Block:
    """Builds the value of a document from its lines and from what stands in flow style."""

    def __init__(self, lines: list[_Part], values: dict[str, Value]) -> None:
        self._lines, self._values, self._at = lines, values, 0

    def document(self) -> dict[str, Value]:
        found = self._mapping(0)
        if self._at != len(self._lines):
            raise _UnsureError
        return found

    def _mapping(self, column: int) -> dict[str, Value]:
        """Keys that begin in ``column``, up to the first line that is none of them or begins the next item of a list."""
        found: dict[str, Value] = {}
        while self._at < len(self._lines):
            place, begins, key, flow = self._lines[self._at]
            if place != column or key is None or (begins and found):
                break
            if key in found or key in RESERVED:
                raise _UnsureError
            self._at += 1
            found[key] = self._below(column) if flow is None else self._values[flow]
        if not found:
            raise _UnsureError
        return found

    def _below(self, column: int) -> Value:
        """The block below a key in ``column``."""
        if self._at == len(self._lines) or column > 2 * _BLOCK_DEPTH:
            raise _UnsureError
        if not self._lines[self._at][1]:
            return self._mapping(column + 2)
        items = []
        while self._at < len(self._lines):
            place, begins, key, flow = self._lines[self._at]
            if not begins or place != column + 4:
                break
            if key is None and flow is not None:
                self._at += 1
                items.append(self._values[flow])
            else:
                items.append(self._mapping(column + 4))
        if not items:
            raise _UnsureError
        return items


def write_yaml(
    value: Mapping[str, Value], *, one_line: frozenset[str] = frozenset(), one_line_items: frozenset[str] = frozenset()
) -> str:
    """``value`` in block style, in its own key order, as text that :func:`read_yaml` reads back equal.

    Values of the keys in ``one_line``, each item of the keys in ``one_line_items``, and lists of scalars are written in
    flow style on one line. Raises :class:`PolicyError` for a string that is not one printable line.
    """
    return "".join(f"{line}\n" for line in _block(value, "", one_line, one_line_items))


def _block(value: Mapping[str, Value], pad: str, one_line: frozenset[str], items: frozenset[str]) -> Iterator[str]:
    for key, below in value.items():
        if key in one_line or not _is_nested(below):
            yield f"{pad}{key}: {_flow(below)}"
        elif isinstance(below, Mapping):
            yield f"{pad}{key}:"
            yield from _block(below, f"{pad}  ", one_line, items)
        else:
            yield f"{pad}{key}:"
            for item in below:
                lines = iter([_flow(item)]) if key in items else _block(item, f"{pad}    ", one_line, items)
                yield f"{pad}  - {next(lines).lstrip()}"
                yield from lines


def _is_nested(value: Value) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return any(isinstance(item, Mapping) for item in value)
    return isinstance(value, Mapping) and bool(value)


def _flow(value: Value) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(below)}" for key, below in value.items()) + "}"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, float):
        return _decimal(value)
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _decimal(value: float) -> str:
    """All digits of ``value`` without an exponent; ``float`` reads them back to the same number."""
    if not math.isfinite(value):
        raise PolicyError(f"numbers of a policy must be finite: got {value}; fit again without that measurement")
    from decimal import Decimal  # a server writes nothing

    digits = format(Decimal(float.__repr__(value)), "f")
    return digits if "." in digits else f"{digits}.0"


def _string(text: str) -> str:
    if _WORD.fullmatch(text) and text.lower() not in RESERVED:
        return text
    if not text.isprintable():
        raise PolicyError(f"strings of a policy must be one line of printable characters: got {shown(text)}")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
