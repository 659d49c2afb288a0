"""The committed export of a database: what a policy is fitted from, small enough to review and to keep in git.

JSON lines. Line 1 is a header with the environment; then comes a line for each point with all its measurements, then one
for each try of a probe, both sorted. The same content gives the same bytes, whatever order it was taken or inserted in.
Raw and disturbed samples stay in the database; latencies are kept to 0.001 us and first calls to 1 us, which is far below
their noise. Version 1 had no tries and did not say why sampling stopped; it is read as well.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import msgspec

from mla_tune.errors import StoreError, UsageError
from mla_tune.files import write_atomically
from mla_tune.sku import Environment, KernelLibrary
from mla_tune.store.lines import (
    MALFORMED,
    EnvironmentRecord,
    FormatVersion,
    Header,
    decode_point,
    decode_try,
    encode_line,
    encode_point,
    encode_try,
    measurements_fault,
    tries_fault,
)
from mla_tune.store.measurement import Measurement
from mla_tune.store.probe import Try

FORMAT = "mla-tune-measurements"
VERSION = 2
MAX_BYTES = 64 * 2**20
"""Largest export that is read: ten times what a sweep of every site of a GPU writes, small enough for any machine."""


@dataclass(frozen=True, slots=True)
class Export:
    """What an export holds."""

    environment: Environment
    measurements: tuple[Measurement, ...]
    """Ordered by their key."""
    tries: tuple[Try, ...] = ()
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


def export_lines(
    environment: Environment, measurements: Iterable[Measurement], tries: Iterable[Try] = ()
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
    points = [list(point) for _, point in groupby(rows, key=lambda m: (m.site, m.shape))]
    described = msgspec.convert(asdict(environment), EnvironmentRecord)
    header = Header(format=FORMAT, version=VERSION, points=len(points), tries=len(attempts), environment=described)
    yield encode_line(header)
    yield from (encode_line(encode_point(point)) for point in points)
    yield from (encode_line(encode_try(attempt)) for attempt in attempts)


def write_export(
    path: str | os.PathLike[str],
    environment: Environment,
    measurements: Iterable[Measurement],
    tries: Iterable[Try] = (),
) -> None:
    """Write an export, all or nothing; raises :class:`StoreError`."""
    data = "".join(export_lines(environment, measurements, tries)).encode()
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
    environment, points, num_tries = _decode_header(path, lines[0])
    end = min(1 + points, len(lines))
    measurements: list[Measurement] = []
    seen: set[object] = set()
    for number, line in enumerate(lines[1:end], start=2):
        try:
            point = decode_point(line)
        except (*MALFORMED, ValueError, UsageError) as error:
            raise _refusal(path, number, f"a point as mla-tune db export writes it: {error}") from error
        identity = (point[0].site.key, point[0].shape)
        if identity in seen:
            raise _refusal(path, number, f"a point that no line before has: {point[0].label} is repeated")
        seen.add(identity)
        measurements += point
    tries: list[Try] = []
    for number, line in enumerate(lines[end:], start=end + 1):
        try:
            tries.append(decode_try(line))
        except (*MALFORMED, ValueError, UsageError) as error:
            raise _refusal(path, number, f"a try as mla-tune db export writes it: {error}") from error
        if tries[-1].key in seen:
            raise _refusal(path, number, f"a try that no line before has: {tries[-1].key} is repeated")
        seen.add(tries[-1].key)
    if len(lines) != 1 + points + num_tries:
        raise _refusal(
            path,
            len(lines),
            f"the last of {points} points and {num_tries} tries: the file is cut short or was added to",
        )
    return Export(environment, tuple(measurements), tuple(tries))


def export_sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of an export's bytes: the provenance that a policy names."""
    return hashlib.sha256(_read(path)).hexdigest()


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(float(value), digits)


def _decode_header(path: str | os.PathLike[str], line: bytes) -> tuple[Environment, int, int]:
    """Environment, number of points, number of tries."""
    accepted = (
        f'a header {{"format": "{FORMAT}", "version": {VERSION}, "points": ..., "tries": ..., "environment": {{...}}}}'
    )
    try:
        found = msgspec.json.decode(line, type=FormatVersion)
        if found.format == FORMAT and found.version > VERSION:
            raise _refusal(path, 1, f"a format version up to {VERSION}: got {found.version}; upgrade mla-tune")
        header = msgspec.json.decode(line, type=Header)
    except MALFORMED as error:
        raise _refusal(path, 1, f"{accepted}: {error}") from error
    if header.format != FORMAT or not 1 <= header.version <= VERSION or (header.version == 1 and header.tries):
        raise _refusal(path, 1, f"{accepted}: got format {header.format!r}, version {header.version}")
    libraries = tuple(
        KernelLibrary(library.name, library.version, library.sha256) for library in header.environment.libraries
    )
    fields = {name: getattr(header.environment, name) for name in header.environment.__struct_fields__}
    return Environment(**{**fields, "libraries": libraries}), header.points, header.tries


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
