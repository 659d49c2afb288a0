"""Forwards of a replay, drawn to be measured with real kernels: the draw, and the file that carries them to a GPU.

The file is JSON: the model and heads, where the forwards come from, and each forward as a list of requests, every request
as (new tokens, context tokens).
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from typing import Annotated

import msgspec

from mla_tune.errors import UsageError
from mla_tune.files import write_atomically
from mla_tune.sites.shape import AnyShape, RaggedShape, Shape
from mla_tune.sites.site import model as find_model

FORMAT = "mla-tune-forwards"
VERSION = 1
MAX_BYTES = 1 << 24
MAX_FORWARDS = 10_000

_Tokens = Annotated[int, msgspec.Meta(ge=1, le=2**40)]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every part of the file: immutable, and strict about unknown keys."""


class Forward(_Record, frozen=True):
    """One drawn forward."""

    requests: tuple[tuple[_Tokens, _Tokens], ...]
    """(new tokens, context tokens) of each request."""
    occurred: Annotated[int, msgspec.Meta(ge=1)]
    """How often the replay had it."""

    @property
    def shape(self) -> RaggedShape:
        """As the cost model and the input builder take it."""
        return RaggedShape(self.requests)


class ForwardList(_Record, frozen=True):
    """The file."""

    format: str
    version: int
    model: str
    h_q: int
    source: str
    """What was replayed, and how, in one line."""
    seed: int
    forwards: tuple[Forward, ...]


def draw(forwards: Mapping[AnyShape, int], count: int, seed: int) -> tuple[Forward, ...]:
    """``count`` of ``forwards``, or all if there are fewer, the frequent ones the likelier; the same seed draws the same.

    No two have the same three integers, under which their measurements are filed. Raises :class:`UsageError`.
    """
    if not 1 <= count <= MAX_FORWARDS:
        raise UsageError(f"forwards must be drawn in a number of 1 to {MAX_FORWARDS}: got {count}")
    rng = random.Random(seed)
    # Weighted sampling without replacement by exponential keys (Efraimidis and Spirakis, 2006).
    keyed = sorted((rng.expovariate(occurred), index) for index, occurred in enumerate(forwards.values()))
    shapes = list(forwards.items())
    chosen: dict[Shape, Forward] = {}
    for _, index in keyed:
        shape, occurred = shapes[index]
        key = Shape(shape.num_reqs, shape.num_qo_tokens, shape.kv_tokens)
        requests = tuple(zip(shape.extend_lens(), shape.seq_lens(), strict=True))
        chosen.setdefault(key, Forward(requests=requests, occurred=occurred))
        if len(chosen) == count:
            break
    return tuple(chosen.values())


def write_forwards(path: str | os.PathLike[str], forwards: ForwardList) -> None:
    """Write the file, all of it or nothing; raises :class:`UsageError` where it cannot be."""
    try:
        write_atomically(path, msgspec.json.format(msgspec.json.encode(forwards), indent=1) + b"\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"a list of forwards must be writable: got {os.fspath(path)}: {reason}") from None


def read_forwards(path: str | os.PathLike[str]) -> ForwardList:
    """The file at ``path``, checked. Raises :class:`UsageError`."""
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"a list of forwards must be readable: got {name}: {reason}; check the path") from None
    try:
        if len(data) > MAX_BYTES:
            raise UsageError(f"at most {MAX_BYTES} bytes are read")
        found = msgspec.json.decode(data, type=ForwardList)
        _check(found)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, UsageError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{name}: not a list of forwards: {reason}; accepted: what `mla-tune traffic --spot-check N` writes"
        ) from None
    return found


def _check(found: ForwardList) -> None:
    if (found.format, found.version) != (FORMAT, VERSION):
        raise UsageError(f"format must be {FORMAT} {VERSION}: got {found.format[:40]} {found.version}")
    if not 1 <= len(found.forwards) <= MAX_FORWARDS:
        raise UsageError(f"1 to {MAX_FORWARDS} forwards are measured: got {len(found.forwards)}")
    model = find_model(found.model)
    model.check_heads(found.h_q)
    seen: set[Shape] = set()
    for forward in found.forwards:
        shape = forward.shape
        if shape.context > model.max_context:
            raise UsageError(f"a request must fit the {model.max_context} tokens of {model.name}: got {shape.context}")
        if shape.evened() in seen:
            raise UsageError(
                f"two forwards must differ in requests, query or context tokens: got {shape.evened()} twice"
            )
        seen.add(shape.evened())
