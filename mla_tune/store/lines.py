"""The lines of an export: their schema, and values to and from them. A file of them is :mod:`mla_tune.store.export`'s."""

from __future__ import annotations

import operator
from dataclasses import MISSING
from itertools import pairwise
from typing import Annotated, Any, get_args

import msgspec

from mla_tune.sites.launch_parameters import make_launch, parameters
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Site
from mla_tune.store.limit_try import Try, try_fault
from mla_tune.store.measurement import Level, Measurement, Outcome, Regime, Role, fault, stored
from mla_tune.store.tuned import Tuned, tuned_fault


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every part of a line: immutable, and strict about unknown keys."""


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""What a database column can hold."""


class _Library(_Record, frozen=True):
    name: str
    version: str
    sha256: str


class EnvironmentRecord(_Record, frozen=True, omit_defaults=True):
    """See :class:`mla_tune.hardware.sku.Environment`."""

    sku: str
    sm_count: _Count
    shared_memory_optin_bytes: _Count
    driver: str
    cuda: str
    torch: str
    triton: str
    libraries: tuple[_Library, ...]
    product: str = ""
    memory_gib: _Count = 0
    power_limit_w: _Count = 0
    """These three since version 5."""


class Header(_Record, frozen=True):
    """The first line."""

    format: str
    version: int
    points: _Count
    """Lines of points that follow: a file that was cut short shows it."""
    environment: EnvironmentRecord
    tries: _Count = 0
    """Lines of tries after those; version 1 had none."""
    launches: _Count | msgspec.UnsetType = msgspec.UNSET
    """Lines of tuned launch parameters after those; versions 1 and 2 had none."""


class FormatVersion(msgspec.Struct, frozen=True):
    """What a header of any version has."""

    format: str
    version: int


_RESULT, _TIMING = stored(Level.RESULT), stored(Level.TIMING)
_SHARED = operator.attrgetter("candidate", *(entry.name for entry in _RESULT))
"""What the measurements of one result have in common."""
_MEASURED = operator.attrgetter("part", "regime", *(entry.name for entry in _TIMING))

_FIRST, *_OTHERS = _TIMING
_Timing: Any = tuple.__class_getitem__((str, Regime, get_args(_FIRST.kind)[0], *(entry.kind for entry in _OTHERS)))
"""(part, regime, latency_us, ci_low_us, ci_high_us, num_samples) of an ``ok`` measurement, which has a latency."""

_Result: Any = msgspec.defstruct(
    "_Result",
    [
        ("candidate", str),
        *((entry.name, entry.kind, Outcome.OK if entry.default is MISSING else entry.default) for entry in _RESULT),
        ("timings", tuple[_Timing, ...], ()),
        ("parts", tuple[tuple[str, Regime], ...], ()),
    ],
    bases=(_Record,),
    frozen=True,
    omit_defaults=True,
)
"""All measurements of one candidate at one point that share everything but part, regime and timing.

``parts`` are (part, regime) of each measurement that failed in this one way; empty for ``ok``.
"""


class _Point(_Record, frozen=True):
    site: str
    role: Role
    shape: tuple[int, int, int]
    """(num_reqs, num_qo_tokens, kv_tokens)"""
    results: tuple[_Result, ...]


class _Try(_Record, frozen=True, omit_defaults=True):
    """One try of a probe."""

    site: str
    candidate: str
    shape: tuple[int, int, int]
    outcome: Outcome
    detail: str = ""
    first_call_s: float | None = None


class _Tuned(_Record, frozen=True):
    """Tuned launch parameters of one kernel in one size class."""

    kernel: str
    size_from: _Count
    parameters: dict[str, int]
    latency_us: float
    default_us: float
    trials: _Count


_ENCODER = msgspec.json.Encoder()
_POINT_DECODER = msgspec.json.Decoder(_Point)
_TRY_DECODER = msgspec.json.Decoder(_Try)
_TUNED_DECODER = msgspec.json.Decoder(_Tuned)
MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding a line raises, besides ``ValueError`` and ``UsageError``."""


def encode_line(record: _Record) -> str:
    """One line, with its end."""
    return _ENCODER.encode(record).decode() + "\n"


def measurements_fault(rows: list[Measurement]) -> str | None:
    """Why measurements sorted by key cannot stand in one export, in one line; None if they can."""
    for row in rows:
        if reason := fault(row):
            return f"{row.label}: {reason}"
    for first, second in pairwise(rows):
        if first.key == second.key:
            return f"{first.label} must occur once: it is repeated"
        if (first.site, first.shape) == (second.site, second.shape) and first.role is not second.role:
            return f"{first.label} must have one role: got {first.role} and {second.role}"
    return None


def tries_fault(tries: list[Try]) -> str | None:
    """Why tries sorted by key cannot stand in one export, in one line; None if they can."""
    for attempt in tries:
        if reason := try_fault(attempt):
            return f"{attempt.site.key} {attempt.candidate}: {reason}"
    for first, second in pairwise(tries):
        if first.key == second.key:
            return f"{first.key} must occur once: it is repeated"
    return None


def encode_point(measurements: list[Measurement]) -> _Point:
    """The measurements of one point, which are sorted by key."""
    groups: dict[tuple[Any, ...], list[Measurement]] = {}
    for measurement in measurements:  # a group stands where its first key stands, so the order is that of the keys
        groups.setdefault(_SHARED(measurement), []).append(measurement)
    first = measurements[0]
    return _Point(
        site=first.site.key,
        role=first.role,
        shape=(first.shape.num_reqs, first.shape.num_qo_tokens, first.shape.kv_tokens),
        results=tuple(_encode_result(group) for group in groups.values()),
    )


def _encode_result(group: list[Measurement]) -> Any:
    candidate, *shared = _SHARED(group[0])
    return _Result(
        candidate=candidate,
        **dict(zip((entry.name for entry in _RESULT), shared, strict=True)),
        timings=tuple(_MEASURED(m) for m in group if m.latency_us is not None),
        parts=tuple((m.part, m.regime) for m in group if m.latency_us is None),
    )


def decode_point(line: bytes) -> list[Measurement]:
    """Measurements of one line, sorted by key. Raises ``ValueError``, ``UsageError`` or what msgspec raises."""
    point = _POINT_DECODER.decode(line)
    site, shape = _decode_site(point.site), Shape(*point.shape)
    measurements: list[Measurement] = []
    for result in point.results:
        shared = {entry.name: getattr(result, entry.name) for entry in _RESULT}
        for part, regime, *timing in (*result.timings, *result.parts):
            timed = dict(zip((entry.name for entry in _TIMING), timing, strict=bool(timing)))
            measurements.append(Measurement(site, shape, point.role, result.candidate, part, regime, **shared, **timed))
    if not measurements:
        raise ValueError("it holds no measurement")
    measurements.sort(key=lambda m: m.key)
    if reason := measurements_fault(measurements):
        raise ValueError(reason)
    return measurements


def encode_try(attempt: Try) -> _Try:
    """One try."""
    return _Try(
        site=attempt.site.key,
        candidate=attempt.candidate,
        shape=(attempt.shape.num_reqs, attempt.shape.num_qo_tokens, attempt.shape.kv_tokens),
        outcome=attempt.outcome,
        detail=attempt.detail,
        first_call_s=attempt.first_call_s,
    )


def decode_try(line: bytes) -> Try:
    """The try of one line. Raises ``ValueError``, ``UsageError`` or what msgspec raises."""
    found = _TRY_DECODER.decode(line)
    attempt = Try(
        _decode_site(found.site), found.candidate, Shape(*found.shape), found.outcome, found.detail, found.first_call_s
    )
    if reason := try_fault(attempt):
        raise ValueError(reason)
    return attempt


def encode_tuned(tuned: Tuned) -> _Tuned:
    """Tuned launch parameters."""
    return _Tuned(
        kernel=tuned.launch.kernel,
        size_from=tuned.launch.size_from,
        parameters=parameters(tuned.launch.config),
        latency_us=tuned.latency_us,
        default_us=tuned.default_us,
        trials=tuned.trials,
    )


def decode_tuned(line: bytes) -> Tuned:
    """The launch parameters of one line. Raises ``ValueError``, ``UsageError`` or what msgspec raises."""
    found = _TUNED_DECODER.decode(line)
    launch = make_launch(found.kernel, found.size_from, found.parameters)
    tuned = Tuned(launch, found.latency_us, found.default_us, found.trials)
    if reason := tuned_fault(tuned):
        raise ValueError(reason)
    return tuned


def _decode_site(key: str) -> Site:
    try:
        return Site.parse(key)
    except ValueError as error:
        raise ValueError(f"site must be a key like prefill_attention/c4a/h64/k512: got {key!r}") from error
