"""The YAML that a policy file may use: a small subset, in which every reader sees the same values.

Plain integers (``12``), plain decimals (``1.25``), ``true``, ``false``, ``null`` and one-line strings; mappings with
string keys that occur once; no anchors, aliases, tags or directives. What YAML 1.1 and 1.2 read differently (``1e3``,
``0o17``, ``1_000``, ``.nan``, ``yes``, ``12:30:45``, dates) is refused with its line and column unless it is quoted.

Built on PyYAML's event stream, so that nothing is resolved or constructed behind our back.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import yaml

from mla_tune.errors import PolicyError
from mla_tune.policy.text import MAX_DEPTH, MAX_INT64, REBUILD, RESERVED, Value, shown

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT = re.compile(r"-?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)\.[0-9]+")
_CONSTANTS = {"true": True, "false": False, "null": None}
_PLAIN_START = re.compile(r"[A-Za-z_/]")


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


def value_at(raw: Value, path: str) -> Value:
    """What stands at ``path``, such as ``tables[3].rows[0]``, in a value that :func:`read_yaml` gave."""
    value = raw
    for part in path.replace("[", ".").replace("]", "").split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


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
        if not _PLAIN_START.match(text) or text.lower() in RESERVED or not text.isprintable():
            accepted = "decimal integers like 12, decimals like 1.25, true, false, null, words; quote any other string"
            self._refuse(
                event, f"plain values must read the same in every YAML version: got {shown(text)}; accepted: {accepted}"
            )
        return text

    def _refuse(self, event: Any, rule: str) -> NoReturn:
        mark = event.start_mark
        raise PolicyError(f"{self._source}:{mark.line + 1}:{mark.column + 1}: {rule}")
