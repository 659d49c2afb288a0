"""YAML in which every reader sees the same values.

Plain integers (``12``), plain decimals (``1.25``), ``true``, ``false``, ``null`` and strings; mappings whose keys occur
once; no aliases or tags. Whatever else is not quoted is a string, so that ``yes``, ``1e3`` or a date, which YAML 1.1
and 1.2 read differently, is refused by whoever expects a number.

PyYAML parses; what its nodes mean is decided here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import yaml

from mla_tune.errors import PolicyError
from mla_tune.policy.rules import REBUILD, shown

_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
_TAGS: dict[type[yaml.Node], str] = {
    yaml.ScalarNode: "tag:yaml.org,2002:str",
    yaml.SequenceNode: "tag:yaml.org,2002:seq",
    yaml.MappingNode: "tag:yaml.org,2002:map",
}
_INT = re.compile(r"-?(0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)\.[0-9]+")
_CONSTANTS = {"true": True, "false": False, "null": None}
_WORD = re.compile(r"[A-Za-z_/][A-Za-z0-9_./+-]*(?: [A-Za-z0-9_./+-]+)*|[1-9][0-9]*[KM]")
"""A string that is written without quotes."""
_RESERVED = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
"""Words that some YAML reader takes for a boolean or a null, whatever their case."""
MAX_DEPTH = 16
"""Nesting that is read; a policy needs 7."""


def read_yaml(text: str, source: str) -> tuple[Any, yaml.Node]:
    """The one document in ``text``, and its node for :func:`line_at`. Raises :class:`PolicyError` with source and line."""
    try:
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise PolicyError(f"{place}: must be valid YAML: {error.problem or error.context}; {REBUILD}") from None
    except (yaml.YAMLError, RecursionError) as error:  # the parser's own errors (forbidden characters) carry no mark
        raise PolicyError(f"{source}: must be valid YAML: {' '.join(str(error).split())}; {REBUILD}") from None
    if node is None:
        raise PolicyError(f"{source}: must hold one YAML document: got an empty file; {REBUILD}")
    return _Values(source).value(node, 0), node


def line_at(node: yaml.Node, path: str) -> int:
    """Line (from 1) of ``path``, such as ``tables[3].choices[0]``, or of the nearest part of it that exists."""
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        if isinstance(node, yaml.MappingNode):
            below = next((value for name, value in node.value if name.value == key), None)
        elif isinstance(node, yaml.SequenceNode) and index and int(index) < len(node.value):
            below = node.value[int(index)]
        else:
            below = None
        if below is None:
            break
        node = below
    line: int = node.start_mark.line + 1
    return line


class _Values:
    """What nodes mean."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._seen: set[int] = set()

    def value(self, node: yaml.Node, depth: int) -> Any:
        if id(node) in self._seen:
            self._refuse(node, "aliases are not accepted; write the value out")
        self._seen.add(id(node))
        if node.tag != _TAGS[type(node)]:
            self._refuse(node, f"tags are not accepted: got {shown(node.tag)}; remove it")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if depth == MAX_DEPTH:
            self._refuse(node, f"nesting must be at most {MAX_DEPTH} levels; {REBUILD}")
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, depth + 1) for item in node.value]
        found: dict[object, Any] = {}
        for name, below in node.value:
            key = self.value(name, MAX_DEPTH)
            if key in found:
                self._refuse(name, f"keys must occur once in a mapping: got {shown(key)} again; remove one")
            found[key] = self.value(below, depth + 1)
        return found

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text: str = node.value
        if node.style or not text:  # quoted or block: a string, whatever it looks like
            return self._string(node) if node.style else None
        if _INT.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
        return _CONSTANTS[text] if text in _CONSTANTS else self._string(node)

    def _string(self, node: yaml.ScalarNode) -> str:
        text: str = node.value
        if not text.isprintable():
            self._refuse(node, f"strings must be one line of printable characters: got {shown(text)}; {REBUILD}")
        return text

    def _refuse(self, node: yaml.Node, rule: str) -> NoReturn:
        mark = node.start_mark
        raise PolicyError(f"{self._source}:{mark.line + 1}:{mark.column + 1}: {rule}")


def write_yaml(
    value: Mapping[str, Any], *, one_line: frozenset[str] = frozenset(), one_line_items: frozenset[str] = frozenset()
) -> str:
    """``value`` in block style, in its own key order, as text that :func:`read_yaml` reads back equal.

    Values of the keys in ``one_line``, each item of the keys in ``one_line_items``, and lists of scalars are written in
    flow style on one line. Raises :class:`PolicyError` for a string that is not one printable line.
    """
    return "".join(f"{line}\n" for line in _block(value, "", one_line, one_line_items))


def _block(value: Mapping[str, Any], pad: str, one_line: frozenset[str], items: frozenset[str]) -> Iterator[str]:
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


def _is_nested(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return any(isinstance(item, Mapping) for item in value)
    return isinstance(value, Mapping) and bool(value)


def _flow(value: Any) -> str:
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
    if _WORD.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    if not text.isprintable():
        raise PolicyError(f"strings of a policy must be one line of printable characters: got {shown(text)}")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
