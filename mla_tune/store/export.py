"""The committed export of a database: what a policy is fitted from, small enough to review and to keep in git.

JSON lines. Line 1 is a header with the environment; every other line is one point with all its measurements, and the
lines are sorted. The same measurements give the same bytes, whatever order they were taken or inserted in. Raw samples
stay in the database; latencies are kept to 0.001 us and first calls to 1 us, which is far below their noise.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated

import msgspec

from mla_tune.errors import StoreError, UsageError
from mla_tune.files import write_atomically
from mla_tune.shape import Shape
from mla_tune.site import Site
from mla_tune.sku import Environment, KernelLibrary
from mla_tune.store.measurement import Measurement, Outcome, Regime, Role, fault

FORMAT = "mla-tune-measurements"
VERSION = 1
MAX_BYTES = 64 * 2**20
"""Largest export that is read: ten times what a sweep of every site of a GPU writes, small enough for any machine."""


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every part of a line: immutable, and strict about unknown keys."""


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""What a database column can hold."""


class _Library(_Record, frozen=True):
    name: str
    version: str
    sha256: str


class _Environment(_Record, frozen=True):
    sku: str
    sm_count: _Count
    shared_memory_optin_bytes: _Count
    driver: str
    cuda: str
    torch: str
    triton: str
    libraries: tuple[_Library, ...]


class _Header(_Record, frozen=True):
    format: str
    version: int
    points: _Count
    """Lines that follow: a file that was cut short shows it."""
    environment: _Environment


class _Version(msgspec.Struct, frozen=True):
    """What a header of any version has."""

    format: str
    version: int


_Timing = tuple[str, Regime, float, float | None, float | None, int]
"""(part, regime, latency_us, ci_low_us, ci_high_us, num_samples) of an ``ok`` measurement."""


class _Result(_Record, frozen=True, omit_defaults=True):
    """All measurements of one candidate at one point that share everything but part, regime and latency."""

    candidate: str
    outcome: Outcome = Outcome.OK
    detail: str = ""
    first_call_s: float | None = None
    workspace_bytes: int | None = None
    timings: tuple[_Timing, ...] = ()
    parts: tuple[tuple[str, Regime], ...] = ()
    """(part, regime) of each measurement that failed in this one way; empty for ``ok``."""


class _Point(_Record, frozen=True):
    site: str
    role: Role
    shape: tuple[int, int, int]
    """(num_reqs, num_qo_tokens, kv_tokens)"""
    results: tuple[_Result, ...]


_ENCODER = msgspec.json.Encoder()
_POINT_DECODER = msgspec.json.Decoder(_Point)
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def to_export_precision(measurement: Measurement) -> Measurement:
    """The measurement as an export gives it back: rounded, without raw samples.

    Whoever fits from a database applies it first, so that database and export lead to the same policy. Rounding twice
    changes nothing, and neither does rounding upset ``ci_low_us <= latency_us <= ci_high_us``.
    """
    return replace(
        measurement,
        latency_us=_rounded(measurement.latency_us, 3),
        ci_low_us=_rounded(measurement.ci_low_us, 3),
        ci_high_us=_rounded(measurement.ci_high_us, 3),
        first_call_s=_rounded(measurement.first_call_s, 6),
        samples_us=(),
    )


def export_lines(environment: Environment, measurements: Iterable[Measurement]) -> Iterator[str]:
    """Lines of an export, newlines included. Raises :class:`StoreError` on what an export cannot hold.

    That is an unsound measurement, two with one key, or a point with two roles.
    """
    rows = sorted(map(to_export_precision, measurements), key=lambda m: m.key)
    if reason := _collective_fault(rows):
        raise StoreError(f"measurements must be sound to be exported: {reason}")
    points = [list(point) for _, point in groupby(rows, key=lambda m: (m.site, m.shape))]
    described = msgspec.convert(asdict(environment), _Environment)
    yield _line(_Header(format=FORMAT, version=VERSION, points=len(points), environment=described))
    yield from (_line(_encode_point(point)) for point in points)


def write_export(path: str | os.PathLike[str], environment: Environment, measurements: Iterable[Measurement]) -> None:
    """Write an export, all or nothing; raises :class:`StoreError`."""
    data = "".join(export_lines(environment, measurements)).encode()
    try:
        write_atomically(path, data)
    except OSError as error:
        raise StoreError(
            f"an export must go to a folder where files may be made: cannot write {os.fspath(path)}: {error.strerror}; "
            "nothing was changed; name another file"
        ) from error


def read_export(path: str | os.PathLike[str]) -> tuple[Environment, list[Measurement]]:
    """Environment and measurements of an export, in its order. Raises :class:`StoreError` that names file and line."""
    lines = _read(path).removesuffix(b"\n").split(b"\n")
    environment, points = _decode_header(path, lines[0])
    measurements: list[Measurement] = []
    seen: set[tuple[str, Shape]] = set()
    for number, line in enumerate(lines[1:], start=2):
        try:
            point = _decode_point(line)
        except (*_MALFORMED, ValueError, UsageError) as error:
            raise _refusal(path, number, f"a point as mla-tune db export writes it: {error}") from error
        identity = (point[0].site.key, point[0].shape)
        if identity in seen:
            raise _refusal(path, number, f"a point that no line before has: {point[0].label} is repeated")
        seen.add(identity)
        measurements += point
    if len(seen) != points:
        raise _refusal(path, len(lines), f"the last of {points} points: the file is cut short or was added to")
    return environment, measurements


def export_sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of an export's bytes: the provenance that a policy names."""
    return hashlib.sha256(_read(path)).hexdigest()


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(float(value), digits)


def _line(record: _Record) -> str:
    return _ENCODER.encode(record).decode() + "\n"


def _collective_fault(rows: list[Measurement]) -> str | None:
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


def _shared(m: Measurement) -> tuple[str, Outcome, str, float | None, int | None]:
    return (m.candidate, m.outcome, m.detail, m.first_call_s, m.workspace_bytes)


def _encode_point(measurements: list[Measurement]) -> _Point:
    """One line of the measurements of one point, which are sorted by key."""
    groups: dict[tuple[str, Outcome, str, float | None, int | None], list[Measurement]] = {}
    for measurement in measurements:  # a group stands where its first key stands, so the order is that of the keys
        groups.setdefault(_shared(measurement), []).append(measurement)
    first = measurements[0]
    return _Point(
        site=first.site.key,
        role=first.role,
        shape=(first.shape.num_reqs, first.shape.num_qo_tokens, first.shape.kv_tokens),
        results=tuple(_encode_result(group) for group in groups.values()),
    )


def _encode_result(group: list[Measurement]) -> _Result:
    candidate, outcome, detail, first_call_s, workspace_bytes = _shared(group[0])
    return _Result(
        candidate=candidate,
        outcome=outcome,
        detail=detail,
        first_call_s=first_call_s,
        workspace_bytes=workspace_bytes,
        timings=tuple(
            (m.part, m.regime, m.latency_us, m.ci_low_us, m.ci_high_us, m.num_samples)
            for m in group
            if m.latency_us is not None
        ),
        parts=tuple((m.part, m.regime) for m in group if m.latency_us is None),
    )


def _decode_point(line: bytes) -> list[Measurement]:
    """Measurements of one line, sorted by key. Raises ``ValueError``, ``UsageError`` or what msgspec raises."""
    point = _POINT_DECODER.decode(line)
    site, shape = _decode_site(point.site), Shape(*point.shape)
    measurements: list[Measurement] = []
    for result in point.results:
        failed = ((part, regime, None, None, None, 0) for part, regime in result.parts)
        for part, regime, latency_us, ci_low_us, ci_high_us, num_samples in (*result.timings, *failed):
            measurement = Measurement(
                site=site,
                shape=shape,
                role=point.role,
                candidate=result.candidate,
                part=part,
                regime=regime,
                outcome=result.outcome,
                detail=result.detail,
                latency_us=latency_us,
                ci_low_us=ci_low_us,
                ci_high_us=ci_high_us,
                num_samples=num_samples,
                first_call_s=result.first_call_s,
                workspace_bytes=result.workspace_bytes,
            )
            measurements.append(measurement)
    if not measurements:
        raise ValueError("it holds no measurement")
    measurements.sort(key=lambda m: m.key)
    if reason := _collective_fault(measurements):
        raise ValueError(reason)
    return measurements


def _decode_site(key: str) -> Site:
    try:
        return Site.parse(key)
    except ValueError as error:
        raise ValueError(f"site must be a key like prefill_attention/c4a/h64/k512: got {key!r}") from error


def _decode_header(path: str | os.PathLike[str], line: bytes) -> tuple[Environment, int]:
    accepted = f'a header {{"format": "{FORMAT}", "version": {VERSION}, "points": ..., "environment": {{...}}}}'
    try:
        found = msgspec.json.decode(line, type=_Version)
        if found.format == FORMAT and found.version > VERSION:
            raise _refusal(path, 1, f"a format version up to {VERSION}: got {found.version}; upgrade mla-tune")
        header = msgspec.json.decode(line, type=_Header)
    except _MALFORMED as error:
        raise _refusal(path, 1, f"{accepted}: {error}") from error
    if (header.format, header.version) != (FORMAT, VERSION):
        raise _refusal(path, 1, f"{accepted}: got format {header.format!r}, version {header.version}")
    libraries = tuple(
        KernelLibrary(library.name, library.version, library.sha256) for library in header.environment.libraries
    )
    fields = {name: getattr(header.environment, name) for name in header.environment.__struct_fields__}
    return Environment(**{**fields, "libraries": libraries}), header.points


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise StoreError(
            f"an export must be a readable file: cannot read {os.fspath(path)}: {error.strerror}; "
            "name another, or make one with `mla-tune db export`"
        ) from error
    if len(data) > MAX_BYTES:
        raise StoreError(
            f"an export must have at most {MAX_BYTES} bytes: {os.fspath(path)} has more; name another file"
        )
    return data


def _refusal(path: str | os.PathLike[str], line: int, accepted: str) -> StoreError:
    return StoreError(f"{os.fspath(path)}, line {line} must hold {accepted}")
