"""Reading a Chrome trace piece by piece, so that a trace of any length takes little memory.

A trace is one JSON object whose ``traceEvents`` hold nearly all of it, or a bare list of events; plain or gzip. The text is
cut between two events, at a place that looks like one, and the piece is decoded as a list. That is also the proof of the
cut: inside an event or a string the piece would have an open bracket or quote, and would not decode.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from mla_tune.errors import TraceError
from mla_tune.trace.chrome_event import Event

PIECE_BYTES = 4 << 20
_LONGEST_EVENT_BYTES = 512 << 20
"""Where no two events can be told apart in so much text, it is no trace."""
_CUTS_TRIED = 8
_BETWEEN_EVENTS = re.compile(rb"\}\s*,\s*(?=\{)")
_EVENTS_BEGIN = re.compile(rb'"traceEvents"\s*:\s*\[')
_NO_NUMBERS = re.compile(rb":\s*[-+]?(?:nan|NaN|inf|Infinity)(?=\s*[,}\]])")
"""What profilers print for a bandwidth over no time, which JSON does not have."""

_POSITION = re.compile(r" \(byte \d+\)|(?<=traceEvents)\[\d+\]")
"""A position in the last piece, which says nothing of the file."""

_Bytes = BinaryIO | gzip.GzipFile
_Wrong = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class DistributedInfo(msgspec.Struct, frozen=True):
    """What torch.profiler writes of the process group."""

    rank: int | None = None
    world_size: int | None = None


class GpuProperties(msgspec.Struct, frozen=True):
    """What torch.profiler writes of each GPU of the machine."""

    id: int | None = None
    name: str = ""


class Document(msgspec.Struct):
    """A trace's own fields, which stand before or after the events; the others are skipped."""

    trace_events: list[Event] = msgspec.field(default_factory=list, name="traceEvents")
    distributed: msgspec.Raw = msgspec.field(default=msgspec.Raw(b"null"), name="distributedInfo")
    devices: msgspec.Raw = msgspec.field(default=msgspec.Raw(b"null"), name="deviceProperties")


@dataclass(slots=True)
class EventStream:
    """The events of one file, in lists. What the file says beside them is complete once they are read."""

    path: Path
    rank: int | None = None
    world_size: int | None = None
    gpus: tuple[GpuProperties, ...] = ()

    def pieces(self) -> Iterator[list[Event]]:
        """Every event, in the file's order. Raises :class:`TraceError` for what is no whole trace."""
        with self.path.open("rb") as raw:
            magic = raw.read(2)
            raw.seek(0)
            if not magic:
                raise self._error("the file is empty")
            if magic != b"\x1f\x8b":
                yield from self._parsed(raw)
                return
            with gzip.GzipFile(fileobj=raw) as unpacked:
                try:
                    yield from self._parsed(unpacked)
                except EOFError:
                    raise self._error("the compressed data is cut short") from None
                except (zlib.error, gzip.BadGzipFile) as error:
                    raise self._error(f"the compressed data is damaged ({error})") from None

    def _error(self, reason: str) -> TraceError:
        return TraceError(
            f"{self.path} must be a whole trace of torch.profiler (Chrome format): {reason}; record or copy it again"
        )

    def _parsed(self, file: _Bytes) -> Iterator[list[Event]]:
        buffer = file.read(PIECE_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
        if buffer.startswith(b"["):
            opening, buffer = b"[", buffer[1:]
        elif buffer.startswith(b"{"):
            opening, buffer = b'{"traceEvents":[', self._after_header(file, buffer)
        else:
            raise self._error("it begins with neither { nor [")
        wanted = PIECE_BYTES
        while more := file.read(wanted):
            buffer += more
            events, used = _whole_events(buffer)
            if events is None:
                if len(buffer) > _LONGEST_EVENT_BYTES:
                    raise self._error("its events cannot be told apart")
                wanted = len(buffer)  # twice as much each time: the work stays in proportion to the file
                continue
            yield events
            buffer, wanted = buffer[used:], PIECE_BYTES
        yield self._rest(opening, buffer)

    def _after_header(self, file: _Bytes, buffer: bytes) -> bytes:
        """What follows ``"traceEvents": [``, with the fields before it noted."""
        while True:
            for found in _EVENTS_BEGIN.finditer(buffer):
                try:
                    self._note(_decoded(buffer[: found.end()] + b"]}", _DOCUMENT))
                except _Wrong:  # the words stand in a string or deeper down
                    continue
                return buffer[found.end() :]
            more = file.read(max(PIECE_BYTES, len(buffer)))
            if not more or len(buffer) > _LONGEST_EVENT_BYTES:
                break
            buffer += more
        try:
            msgspec.json.decode(buffer)
        except _Wrong as error:
            raise self._error(_reason(error)) from None
        raise self._error("it has no list traceEvents")

    def _rest(self, opening: bytes, buffer: bytes) -> list[Event]:
        """The last events, and the fields after them."""
        text = opening + buffer
        try:
            if opening == b"[":
                return _decoded(text, _EVENTS)
            document = _decoded(text, _DOCUMENT)
        except _Wrong as error:
            raise self._error(_reason(error)) from None
        self._note(document)
        return document.trace_events

    def _note(self, document: Document) -> None:
        """Keep what the fields say, where they say it as torch.profiler does."""
        try:
            found = msgspec.json.decode(document.distributed, type=DistributedInfo | None)
        except _Wrong as error:
            raise self._error(f"distributedInfo is not what torch.profiler writes ({error})") from None
        if found is not None:
            self.rank, self.world_size = found.rank, found.world_size
        with suppress(*_Wrong):  # names for the first line, nothing more
            self.gpus = tuple(msgspec.json.decode(document.devices, type=list[GpuProperties] | None) or self.gpus)


def _whole_events(buffer: bytes) -> tuple[list[Event] | None, int]:
    """The events up to the last place where the text can be cut, and its length; None where there is none."""
    cuts = [found.span() for found in _BETWEEN_EVENTS.finditer(buffer, len(buffer) * 15 // 16)]
    for end, begin in reversed(cuts[-_CUTS_TRIED:]):
        with suppress(*_Wrong):
            return _decoded(b"[" + buffer[: end + 1] + b"]", _EVENTS), begin
    return None, 0


_EVENTS = msgspec.json.Decoder(list[Event])
_DOCUMENT = msgspec.json.Decoder(Document)
_Decoded = TypeVar("_Decoded")


def _decoded(text: bytes, decoder: msgspec.json.Decoder[_Decoded]) -> _Decoded:
    """``text``, if need be with null for numbers that JSON does not have."""
    try:
        return decoder.decode(text)
    except _Wrong:
        mended, found = _NO_NUMBERS.subn(b":null", text)
        if not found:
            raise
        return decoder.decode(mended)


def _reason(error: Exception) -> str:
    if "truncated" in str(error):
        return "the JSON is cut short"
    return f"the JSON cannot be read ({_POSITION.sub('', str(error))})"
