"""The shapes that a server met, as a file: what ``MLA_TUNE_RECORD`` writes, and what weights a sweep or a fit.

A JSON Lines file. The first line says what it is::

    {"format":"mla-tune-traffic","version":1,"forwards_dropped":0}

and each further line is one cell of the histogram, sorted, each at most once::

    {"site":"prefill_attention","model":"deepseek-v4-flash","num_qo_tokens":8192,"kv_tokens":131072,"num_reqs":4,"forwards":17}

Counts from :data:`EXACT_BELOW` up are the middle of a bin of at most 1/:data:`HALF` of their size, smaller ones are
exact. ``forwards_dropped`` counts the forwards that met a full histogram. Standard library and msgspec: a server writes
this, a laptop reads it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import msgspec

from mla_tune.errors import StoreError
from mla_tune.files import write_atomically

FORMAT = "mla-tune-traffic"
VERSION = 1
MAX_CELLS = 1 << 16
"""Most cells of a file, about 8 MB. The rarest are dropped and counted beyond it."""
BIN_BITS = 6
"""Leading bits of a count that a bin keeps: bins are 1/32 to 1/64 wide, finer than the crossovers of any policy."""
HALF = 1 << (BIN_BITS - 1)
EXACT_BELOW = 1 << BIN_BITS


_Line = TypeVar("_Line", bound=msgspec.Struct)


class ServedShape(NamedTuple):
    """What was asked of a policy: the key of a cell."""

    site: str
    model: str
    num_qo_tokens: int
    """Query tokens of the forward, all requests together."""
    kv_tokens: int
    """Context tokens of the forward, all requests together, before compression."""
    num_reqs: int


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    version: int
    forwards_dropped: int


class _Cell(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    site: str
    model: str
    num_qo_tokens: int
    kv_tokens: int
    num_reqs: int
    forwards: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """A histogram of shapes."""

    forwards: dict[ServedShape, int]
    """How many forwards had each shape; every count is at least 1."""
    dropped: int = 0
    """Forwards that were met and are in no cell."""

    def plus(self, other: Traffic) -> Traffic:
        """Both together."""
        return bounded(Counter(self.forwards) + Counter(other.forwards), self.dropped + other.dropped)


def bounded(forwards: dict[ServedShape, int], dropped: int = 0) -> Traffic:
    """At most :data:`MAX_CELLS` cells, the most frequent; the rest is counted as dropped."""
    if len(forwards) <= MAX_CELLS:
        return Traffic(dict(forwards), dropped)
    ranked = sorted(forwards.items(), key=lambda cell: (-cell[1], cell[0]))
    return Traffic(dict(ranked[:MAX_CELLS]), dropped + sum(count for _, count in ranked[MAX_CELLS:]))


def bin_start(count: int) -> int:
    """The lower edge of the bin that ``count`` lies in."""
    shift = count.bit_length() - BIN_BITS
    return count >> shift << shift if shift > 0 else count


def bin_middle(start: int) -> int:
    """The middle of the bin that starts at ``start``, rounded down; in the same bin itself."""
    shift = start.bit_length() - BIN_BITS
    return start + (1 << shift >> 1) if shift > 0 else start


def dump_traffic(traffic: Traffic) -> bytes:
    """``traffic`` as the bytes of its file; equal histograms give equal bytes."""
    lines: list[msgspec.Struct] = [_Header(FORMAT, VERSION, traffic.dropped)]
    lines += [_Cell(*shape, traffic.forwards[shape]) for shape in sorted(traffic.forwards)]
    return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)


def write_traffic(path: str | os.PathLike[str], traffic: Traffic) -> None:
    """Replace the file at ``path``, all of it or nothing. Raises ``OSError``."""
    write_atomically(path, dump_traffic(traffic))


def read_traffic(path: str | os.PathLike[str]) -> Traffic:
    """Read a file back. Raises :class:`StoreError` for one that is missing, malformed or not a recording."""
    try:
        with open(path, "rb") as file:
            return parse_traffic(file, os.fspath(path))
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        reason = getattr(error, "strerror", None) or error
        raise StoreError(
            f"a traffic file must be readable: got {os.fspath(path)}: {reason}; check the path, or record one with "
            "MLA_TUNE_RECORD"
        ) from None


def parse_traffic(lines: Iterable[bytes], source: str) -> Traffic:
    """The histogram in ``lines``; ``source`` names the file in errors. Raises :class:`StoreError`."""
    numbered = enumerate(lines, start=1)
    header = _decode(next(numbered, (1, b""))[1], _Header, source, 1)
    if header.format != FORMAT or header.version != VERSION or header.forwards_dropped < 0:
        raise _refused(source, 1, f"must say {FORMAT} version {VERSION}: got {header.format} version {header.version}")
    forwards: dict[ServedShape, int] = {}
    for number, line in numbered:
        cell = _decode(line, _Cell, source, number)
        shape = ServedShape(cell.site, cell.model, cell.num_qo_tokens, cell.kv_tokens, cell.num_reqs)
        if shape in forwards or cell.forwards < 1 or min(shape[2:]) < 0:
            raise _refused(source, number, "must be a new shape with at least one forward and no negative count")
        forwards[shape] = cell.forwards
    return Traffic(forwards, header.forwards_dropped)


def _decode(line: bytes, kind: type[_Line], source: str, number: int) -> _Line:
    try:
        return msgspec.json.decode(line, type=kind, strict=True)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise _refused(source, number, f"must be one line of a traffic file: {error}") from None


def _refused(source: str, number: int, rule: str) -> StoreError:
    return StoreError(f"{source}:{number}: {rule}; record it again with MLA_TUNE_RECORD")
