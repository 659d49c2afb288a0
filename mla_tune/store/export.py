"""The committed export of a database: what a policy is fitted from, small enough to review and to keep in git.

JSON lines. Line 1 is a header with the environment; then comes a line for each point with all its measurements, one for
each try of a probe, and one for each set of tuned launch parameters, all sorted. The same content gives the same bytes,
whatever order it was taken or inserted in. Raw and disturbed samples stay in the database; latencies are kept to 0.001 us
and first calls to 1 us, which is far below their noise. Version 1 had no tries and did not say why sampling stopped,
version 2 knew of no launch parameters, version 3 of no
kernels but the project's own, version 4 did not tell the products of one chip apart; all are read as well.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import msgspec

from mla_tune.errors import StoreError, UsageError
from mla_tune.files import write_atomically
from mla_tune.hardware.sku import LATER_FIELDS, Environment, KernelLibrary
from mla_tune.store.limit_try import Try
from mla_tune.store.lines import (
    MALFORMED,
    EnvironmentRecord,
    FormatVersion,
    Header,
    decode_point,
    decode_try,
    decode_tuned,
    encode_line,
    encode_point,
    encode_try,
    encode_tuned,
    measurements_fault,
    tries_fault,
)
from mla_tune.store.measurement import Measurement
from mla_tune.store.tuned import Tuned, tuned_fault

FORMAT = "mla-tune-measurements"
VERSION = 5
_WITHOUT_PRODUCTS = 4
_WITHOUT_PROVIDERS = 3
_WITHOUT_LAUNCHES = 2
MAX_BYTES = 64 * 2**20
"""Largest export that is read: ten times what a sweep of every site of a GPU writes, small enough for any machine."""


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Export:
    """What an export holds."""

    environment: Environment
    measurements: tuple[Measurement, ...]
    """Ordered by their key."""
    tries: tuple[Try, ...] = ()
    """Ordered by their key."""
    tuned: tuple[Tuned, ...] = ()
    """Ordered by their key."""


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
        quarantined=(),
    )


def attempt_to_export_precision(attempt: Try) -> Try:
    """The try as an export gives it back: rounded."""
    return replace(attempt, first_call_s=_rounded(attempt.first_call_s, 6))


def tuned_to_export_precision(tuned: Tuned) -> Tuned:
    """Tuned launch parameters as an export gives them back: rounded."""
    return replace(tuned, latency_us=round(tuned.latency_us, 3), default_us=round(tuned.default_us, 3))


def export_lines(
    environment: Environment,
    measurements: Iterable[Measurement],
    tries: Iterable[Try] = (),
    tuned: Iterable[Tuned] = (),
) -> Iterator[str]:
    """Lines of an export, newlines included. Raises :class:`StoreError` on what an export cannot hold.

    That is an unsound measurement or try, two with one key, or a point with two roles.
    """
    rows = sorted(map(to_export_precision, measurements), key=lambda m: m.key)
    if reason := measurements_fault(rows):
        raise StoreError(f"measurements must be sound to be exported: {reason}")
    attempts = sorted(map(attempt_to_export_precision, tries), key=lambda attempt: attempt.key)
    if reason := tries_fault(attempts):
        raise StoreError(f"tries must be sound to be exported: {reason}")
    launches = sorted(map(tuned_to_export_precision, tuned), key=lambda entry: entry.key)
    if reason := next((fault for entry in launches if (fault := tuned_fault(entry))), None):
        raise StoreError(f"launch parameters must be sound to be exported: {reason}")
    points = [list(point) for _, point in groupby(rows, key=lambda m: (m.site, m.shape))]
    described = msgspec.convert(asdict(environment), EnvironmentRecord)
    # What an earlier version can hold is written as that version: committed exports stay the bytes that they are.
    news = bool(launches) or any(m.launches or m.site.overlap for m in rows)
    provided = any(m.site.provider for m in rows) or any(attempt.site.provider for attempt in attempts)
    least = _WITHOUT_PRODUCTS if provided else _WITHOUT_PROVIDERS if news else _WITHOUT_LAUNCHES
    if any(getattr(environment, name) for name in LATER_FIELDS):
        least = VERSION
    header = Header(
        format=FORMAT,
        version=least,
        points=len(points),
        tries=len(attempts),
        launches=len(launches) if least >= _WITHOUT_PROVIDERS else msgspec.UNSET,
        environment=described,
    )
    yield encode_line(header)
    yield from (encode_line(encode_point(point)) for point in points)
    yield from (encode_line(encode_try(attempt)) for attempt in attempts)
    yield from (encode_line(encode_tuned(entry)) for entry in launches)


def write_export(
    path: str | os.PathLike[str],
    environment: Environment,
    measurements: Iterable[Measurement],
    tries: Iterable[Try] = (),
    tuned: Iterable[Tuned] = (),
) -> None:
    """Write an export, all or nothing; raises :class:`StoreError`."""
    data = "".join(export_lines(environment, measurements, tries, tuned)).encode()
    try:
        write_atomically(path, data)
    except OSError as error:
        raise StoreError(
            f"an export must go to a folder where files may be made: cannot write {os.fspath(path)}: {error.strerror}; "
            "nothing was changed; name another file"
        ) from error


def read_export(path: str | os.PathLike[str]) -> Export:
    """Everything in an export. Raises :class:`StoreError` that names file and line."""
    lines = _read(path).removesuffix(b"\n").split(b"\n")
    header = _decode_header(path, lines[0])
    counts = (header.points, header.tries, header.launches or 0)
    found = _Lines(path, lines)
    points = found.take(counts[0], "point", decode_point, lambda point: (point[0].site.key, point[0].shape))
    tries = found.take(counts[1], "try", decode_try, lambda attempt: attempt.key)
    tuned = found.take(counts[2], "launch", decode_tuned, lambda entry: entry.key)
    if len(lines) != 1 + sum(counts):
        raise _refusal(
            path,
            len(lines),
            f"the last of {counts[0]} points, {counts[1]} tries and {counts[2]} launches: the file is cut short or was "
            "added to",
        )
    measurements = tuple(measurement for point in points for measurement in point)
    return Export(_environment(header), measurements, tuple(tries), tuple(tuned))


class _Lines:
    """The lines of an export behind its header, decoded one kind after the other."""

    def __init__(self, path: str | os.PathLike[str], lines: list[bytes]) -> None:
        self._path, self._lines = path, lines
        self._next = 1

    def take(self, count: int, kind: str, decode: Callable[[bytes], _T], identity: Callable[[_T], object]) -> list[_T]:
        """The next ``count`` lines, or as many as there are. Raises :class:`StoreError` on a wrong or repeated one."""
        found, seen = [], set()
        end = min(self._next + count, len(self._lines))
        for number in range(self._next, end):
            try:
                value = decode(self._lines[number])
            except (*MALFORMED, ValueError, UsageError) as error:
                raise _refusal(self._path, number + 1, f"a {kind} as mla-tune db export writes it: {error}") from error
            key = identity(value)
            if key in seen:
                raise _refusal(self._path, number + 1, f"a {kind} that no line before has: {key} is repeated")
            seen.add(key)
            found.append(value)
        self._next = end
        return found


def export_sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of an export's bytes: the provenance that a policy names."""
    return hashlib.sha256(_read(path)).hexdigest()


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(float(value), digits)


def _decode_header(path: str | os.PathLike[str], line: bytes) -> Header:
    accepted = (
        f'a header {{"format": "{FORMAT}", "version": {VERSION}, "points": ..., "tries": ..., "launches": ..., '
        '"environment": {...}}'
    )
    try:
        found = msgspec.json.decode(line, type=FormatVersion)
        if found.format == FORMAT and found.version > VERSION:
            raise _refusal(path, 1, f"a format version up to {VERSION}: got {found.version}; upgrade mla-tune")
        header = msgspec.json.decode(line, type=Header)
    except MALFORMED as error:
        raise _refusal(path, 1, f"{accepted}: {error}") from error
    unknown = (
        (header.version < 2 and header.tries)
        or (header.version < 3 and header.launches)
        or (header.version < 5 and any(getattr(header.environment, name) for name in LATER_FIELDS))
    )
    if header.format != FORMAT or not 1 <= header.version <= VERSION or unknown:
        raise _refusal(path, 1, f"{accepted}: got format {header.format!r}, version {header.version}")
    return header


def _environment(header: Header) -> Environment:
    libraries = tuple(
        KernelLibrary(library.name, library.version, library.sha256) for library in header.environment.libraries
    )
    fields = {name: getattr(header.environment, name) for name in header.environment.__struct_fields__}
    return Environment(**{**fields, "libraries": libraries})


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
