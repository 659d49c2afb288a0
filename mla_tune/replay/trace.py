"""Reading a request trace: JSON lines in the format that Mooncake publishes (github.com/kvcache-ai/Mooncake).

A line is ``{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}``, with one id for each
512 tokens of the prompt, the last one perhaps in part; equal leading ids mean a shared prefix. Reading is strict: whatever
does not fit is refused with its line. The file may be compressed with gzip.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from mla_tune.errors import UsageError
from mla_tune.replay.requests import Request

BLOCK_TOKENS = 512
"""Tokens that one id stands for."""
MAX_BYTES = 1 << 28
"""Largest trace that is read, uncompressed: ninety times Mooncake's, small enough for any machine."""
MAX_PROMPT_TOKENS = 1 << 24
"""Longest prompt and answer of a line: sixteen times the longest context of any model."""
_MAX_TIMESTAMP_MS = 1e12
"""Thirty years."""
_GZIP = b"\x1f\x8b"

_Tokens = Annotated[int, msgspec.Meta(ge=1, le=MAX_PROMPT_TOKENS)]


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    timestamp: Annotated[float, msgspec.Meta(ge=0, le=_MAX_TIMESTAMP_MS)]
    input_length: _Tokens
    output_length: Annotated[int, msgspec.Meta(ge=0, le=MAX_PROMPT_TOKENS)]
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]]


_DECODER = msgspec.json.Decoder(_Line)


@dataclass(frozen=True, slots=True)
class Trace:
    """The requests of a trace, in the order of their arrival. A :class:`mla_tune.replay.requests.RequestSource`."""

    requests: tuple[Request, ...]
    left_out: int = 0
    """Requests that were dropped because their prompt is longer than a model's context."""

    def arrivals(self) -> Sequence[Request]:
        """All requests."""
        return self.requests

    def after(self, request: Request, now_us: float) -> Request | None:
        """None: in a trace no request waits for another."""
        return None

    def within(self, max_context: int) -> Trace:
        """The requests whose prompt a model takes. Raises :class:`UsageError` if there is none."""
        kept = tuple(request for request in self.requests if request.prompt_tokens <= max_context)
        if not kept:
            raise UsageError(
                f"a trace must have a prompt within the model's context of {max_context} tokens: got "
                f"{len(self.requests)} prompts, all longer; name another --model"
            )
        return Trace(kept, self.left_out + len(self.requests) - len(kept))


def read_trace(path: str | os.PathLike[str], speed: float = 1.0) -> Trace:
    """The trace at ``path``, its times of arrival divided by ``speed`` (infinite: all at once).

    Raises :class:`UsageError` that names the file and the line.
    """
    name = os.fspath(path)
    if not speed > 0:
        raise UsageError(f"speed must be above 0: got {speed}; accepted: 1 for a trace as it was recorded, 2, inf")
    requests = list(_requests(name, _content(name), speed))
    if not requests:
        raise UsageError(f"{name}: a trace must have a request: got an empty file; {_FORMAT}")
    return Trace(tuple(sorted(requests, key=lambda request: request.arrival_us)))


_FORMAT = (
    'accepted: lines like {"timestamp": 0, "input_length": 700, "output_length": 9, "hash_ids": [0, 1]}, '
    "one id for each 512 tokens"
)


def _requests(name: str, data: bytes, speed: float) -> Iterator[Request]:
    for number, text in enumerate(data.split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            line = _DECODER.decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(f"{name}, line {number}: not a request: {_one_line(error)}; {_FORMAT}") from None
        blocks = -(-line.input_length // BLOCK_TOKENS)
        if len(line.hash_ids) != blocks:
            raise UsageError(
                f"{name}, line {number}: hash_ids must have one id for each {BLOCK_TOKENS} tokens: "
                f"got {len(line.hash_ids)} for {line.input_length} tokens; accepted: {blocks}"
            )
        yield Request(
            arrival_us=line.timestamp * 1e3 / speed,
            prompt_tokens=line.input_length,
            output_tokens=line.output_length,
            blocks=tuple(line.hash_ids),
            block_tokens=BLOCK_TOKENS,
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _content(name: str) -> bytes:
    """What the file holds, uncompressed; never more than is accepted in memory."""
    try:
        with open(name, "rb") as file:
            packed = file.read(len(_GZIP)) == _GZIP
        with gzip.open(name) if packed else open(name, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{name}: a compressed trace must be whole: {_one_line(error)}; fetch it again") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"a trace must be readable: got {name}: {reason}; check the path") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{name}: a trace must be at most {MAX_BYTES} bytes: got more; cut it to its first lines")
    return data
