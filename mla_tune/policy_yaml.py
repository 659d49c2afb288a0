"""The YAML that a policy file may use: a small subset, in which every reader sees the same values.

Plain integers (``12``), plain decimals (``1.25``), ``true``, ``false``, ``null`` and one-line strings; mappings with
string keys that occur once; no anchors, aliases, tags or directives. What YAML 1.1 and 1.2 read differently (``1e3``,
``0o17``, ``1_000``, ``.nan``, ``yes``, ``12:30:45``, dates) is refused with its line and column unless it is quoted.

Built on PyYAML's event stream, so that nothing is resolved or constructed behind our back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, NoReturn

import yaml

from mla_tune.errors import PolicyError

Value = Any
"""A tree of dict (string keys), list, str, int, float, bool and None."""

MAX_DEPTH = 16
"""Nesting that is read; the schema needs 8."""
MAX_INT64 = 2**63 - 1
REBUILD = "rebuild the file with `mla-tune fit`"
"""The next step of every error about a file's content."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT = re.compile(r"-?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)\.[0-9]+")
_CONSTANTS = {"true": True, "false": False, "null": None}
# Words that some YAML reader takes for a boolean or a null, whatever their case.
_RESERVED = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
_PLAIN_START = re.compile(r"[A-Za-z_/]")
_PLAIN_WRITTEN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./+-]*( [A-Za-z0-9_./+-]+)*")


def shown(value: object) -> str:
    """``value`` as an error prints it: on one line and short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_yaml(text: str, source: str) -> Value:
    """The one document in ``text``. Raises :class:`PolicyError` with ``source``, line and column."""
    try:
        return _Reader(text, source).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise PolicyError(f"{place}: must be valid YAML: {error.problem or error.context}; {REBUILD}") from None
    except yaml.YAMLError as error:  # the reader's own errors (characters YAML forbids) carry no mark
        raise PolicyError(f"{source}: must be valid YAML: {' '.join(str(error).split())}; {REBUILD}") from None


def line_of(text: str, path: str) -> int | None:
    """Line (from 1) of ``path``, or of the nearest part of it that exists; ``text`` is one :func:`read_yaml` took."""
    node = yaml.compose(text, Loader=_LOADER)
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        below = _child(node, key, index)
        if below is None:
            break
        node = below
    return node.start_mark.line + 1 if node is not None else None


def _child(node: yaml.Node | None, key: str, index: str) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        return next((value for name, value in node.value if name.value == key), None)
    if isinstance(node, yaml.SequenceNode) and index and int(index) < len(node.value):
        child: yaml.Node = node.value[int(index)]
        return child
    return None


class _Reader:
    """Builds values from events; knows nothing of policies."""

    def __init__(self, text: str, source: str) -> None:
        self._next: Any = _LOADER(text).get_event
        self._source = source
        self._plain: dict[str, Value] = {}
        """What plain scalars were read as: most of a policy is a few keys, written a thousand times."""

    def document(self) -> Value:
        self._next()  # the stream's start
        start = self._next()
        if isinstance(start, yaml.StreamEndEvent):
            raise PolicyError(f"{self._source}: must hold one YAML document: got an empty file; {REBUILD}")
        if start.version or start.tags:
            self._refuse(start, "directives (%...) are not accepted; remove them")
        value = self._value(self._next(), 0)
        self._next()  # the document's end
        end = self._next()
        if not isinstance(end, yaml.StreamEndEvent):
            self._refuse(end, "must hold one YAML document: got another; remove it")
        return value

    def _value(self, event: Any, depth: int) -> Value:
        kind = type(event)
        if (
            kind is yaml.ScalarEvent
            and event.value in self._plain
            and not event.style
            and event.anchor is event.tag is None
        ):
            return self._plain[event.value]
        if kind is yaml.AliasEvent:
            self._refuse(event, f"aliases are not accepted: got {shown('*' + event.anchor)}; write the value out")
        if event.anchor is not None:
            self._refuse(event, f"anchors are not accepted: got {shown('&' + event.anchor)}; remove it")
        if event.tag is not None:
            self._refuse(event, f"tags are not accepted: got {shown(event.tag)}; remove it")
        if kind is yaml.ScalarEvent:
            value = self._scalar(event)
            if not event.style:
                self._plain[event.value] = value
            return value
        if depth == MAX_DEPTH:
            self._refuse(event, f"nesting must be at most {MAX_DEPTH} levels; {REBUILD}")
        return self._mapping(depth + 1) if kind is yaml.MappingStartEvent else self._sequence(depth + 1)

    def _mapping(self, depth: int) -> dict[str, Value]:
        found: dict[str, Value] = {}
        while type(event := self._next()) is not yaml.MappingEndEvent:
            key = self._value(event, depth)
            if not isinstance(key, str):
                self._refuse(event, f"keys must be strings: got {shown(key)}; {REBUILD}")
            if key in found:
                self._refuse(event, f"keys must occur once in a mapping: got {shown(key)} again; remove one")
            found[key] = self._value(self._next(), depth)
        return found

    def _sequence(self, depth: int) -> list[Value]:
        found: list[Value] = []
        while type(event := self._next()) is not yaml.SequenceEndEvent:
            found.append(self._value(event, depth))
        return found

    def _scalar(self, event: Any) -> Value:
        text: str = event.value
        if event.style:  # quoted or block: a string, whatever it looks like
            if not text.isprintable():
                self._refuse(event, f"strings must be one line of printable characters: got {shown(text)}; {REBUILD}")
            return text
        if _INT.fullmatch(text):
            if len(text) > len(str(-MAX_INT64)) or abs(int(text)) > MAX_INT64:
                self._refuse(event, f"integers must fit in 64 bits: got {shown(text)}; {REBUILD}")
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if not _PLAIN_START.match(text) or text.lower() in _RESERVED or not text.isprintable():
            accepted = "decimal integers like 12, decimals like 1.25, true, false, null, words; quote any other string"
            self._refuse(
                event, f"plain values must read the same in every YAML version: got {shown(text)}; accepted: {accepted}"
            )
        return text

    def _refuse(self, event: Any, rule: str) -> NoReturn:
        mark = event.start_mark
        raise PolicyError(f"{self._source}:{mark.line + 1}:{mark.column + 1}: {rule}")


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
    digits = format(Decimal(float.__repr__(value)), "f")
    return digits if "." in digits else f"{digits}.0"


def _string(text: str) -> str:
    if _PLAIN_WRITTEN.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    if not text.isprintable():
        raise PolicyError(f"strings of a policy must be one line of printable characters: got {shown(text)}")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
