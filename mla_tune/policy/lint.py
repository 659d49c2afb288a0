"""What is wrong with a policy file, or may mislead whoever reviews it: everything that needs no GPU and no refit.

A server's own reader refuses what it cannot serve. This goes further: the evidence beside the file, the measurements that
it names, thresholds that nothing reaches, and the size that a review takes in.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from mla_tune.errors import PolicyError
from mla_tune.policy.codec import EDITOR_LINE, digest, dump_policy, parse_policy, read_policy_file
from mla_tune.policy.comparison import table_name
from mla_tune.policy.decision import Decision
from mla_tune.policy.evidence import PolicyEvidence, TableEvidence, evidence_path, parse_evidence
from mla_tune.policy.file_form import written_tokens
from mla_tune.policy.rules import shown
from mla_tune.policy.schema import Policy, Row, Table, row_ends
from mla_tune.policy.search import policy_name
from mla_tune.sites.provider import OWN

MAX_LINES, MAX_COLUMNS, MAX_BYTES = 400, 120, 30_000
"""What a review takes in."""


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """The file is wrong, or does not belong to what it names."""
    WARNING = "warning"
    """It may be right; here that cannot be told, or is unusual."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that lint found."""

    file: str
    severity: Severity
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.severity}: {self.message}"


Staleness = Callable[[Policy], Iterable[tuple[Severity, str]]]
"""How the builds that are installed differ from those of a policy; told from outside, where runtimes are known."""
_Told = Iterator[tuple[Severity, str]]


def lint_policy(path: str, staleness: Staleness | None = None) -> list[Finding]:
    """Everything found about the policy file at ``path``; nothing of ``staleness`` without one."""
    return [Finding(path, severity, " ".join(message.split())) for severity, message in _told(path, staleness)]


def _told(path: str, staleness: Staleness | None) -> _Told:
    try:
        data = read_policy_file(path)
        policy = parse_policy(data, path)
    except PolicyError as error:
        yield Severity.ERROR, _without_file(str(error), path)
        return
    yield from _size(data)
    yield from _tables(policy)
    stated = None
    try:
        stated = _evidence_of(path, data)
    except (PolicyError, OSError) as error:
        yield Severity.ERROR, f"its evidence must be readable and its own: {error}"
    else:
        yield from _evidence(policy, stated, path)
        yield from _written(data, policy, stated)
    yield from _source(policy, Path(path))
    yield from _name(policy, Path(path))
    if staleness is not None:
        yield from staleness(policy)


def _without_file(text: str, path: str) -> str:
    """An error of the reader, its place in words: lines of lint begin with the file already."""
    rest = text.removeprefix(f"{path}:")
    found = re.match(r"(\d+):(?:\d+:)?\s*", rest)
    return f"line {found[1]}: {rest[found.end() :]}" if found else rest.strip()


def _size(data: bytes) -> _Told:
    lines = data.decode().splitlines()
    if len(lines) > MAX_LINES:
        yield Severity.ERROR, f"must have at most {MAX_LINES} lines, which a review takes in: got {len(lines)}"
    if len(data) > MAX_BYTES:
        yield Severity.ERROR, f"must have at most {MAX_BYTES} bytes, which a review takes in: got {len(data)}"
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_COLUMNS:
            yield Severity.ERROR, f"line {number}: must have at most {MAX_COLUMNS} columns: got {len(line)}"
    if not data.startswith(EDITOR_LINE.encode()):
        yield Severity.WARNING, f"its first line must name the schema to editors: {EDITOR_LINE.strip()}"


def _tables(policy: Policy) -> _Told:
    for table in policy.tables:
        try:
            Decision(table)
        except PolicyError as error:
            yield Severity.ERROR, str(error)
        for row, end in zip(table.rows, row_ends(table), strict=True):
            for rule in _row(table, row, end):
                yield Severity.ERROR, f"{table_name(table)}: {rule}"


def _row(table: Table, row: Row, end: int) -> Iterator[str]:
    """What of a row nothing reaches."""
    measured, where = (
        table.measured,
        f"from {row.num_reqs_from} requests and {written_tokens(row.kv_tokens_from)} context",
    )
    if row.num_reqs_from > measured.num_reqs[1]:
        yield f"the choices {where} must start inside the measured requests: got more than {measured.num_reqs[1]}"
    if row.kv_tokens_from > measured.kv_tokens[1]:
        yield f"the choices {where} must start inside the measured context: got more than {measured.kv_tokens[1]}"
    limits = {limit.candidate: limit.num_qo_tokens for limit in table.limits}
    low = max(row.kv_tokens_from, measured.kv_tokens[0])
    for choice in row.choices[1:]:
        least = choice.threshold.at(low)  # a line never falls, so it is nowhere lower in the row
        if least > measured.num_qo_tokens[1]:
            yield (
                f"{choice.candidate} {where} must start inside the measured query tokens: got {least}; accepted: up to "
                f"{measured.num_qo_tokens[1]}"
            )
        if least > limits.get(choice.candidate, least):
            yield (
                f"{choice.candidate} {where} must start below its limit: got {least}; accepted: up to "
                f"{limits[choice.candidate]}"
            )


def _evidence_of(path: str, data: bytes) -> PolicyEvidence | None:
    file = evidence_path(path)
    return parse_evidence(file.read_bytes(), file.name, digest(data)) if file.is_file() else None


def _evidence(policy: Policy, stated: PolicyEvidence | None, path: str) -> _Told:
    if stated is None:
        yield Severity.WARNING, f"no {evidence_path(path).name} beside it says what its thresholds rest on"
        return
    keys = {table.key for table in policy.tables}
    for entry in stated.tables:
        if entry.key not in keys:
            yield Severity.ERROR, f"its evidence must be of its tables: got one of {shown(entry.key)}, which it lacks"
    for table in policy.tables:
        found = stated.of(table)
        faults = ["it has none"] if found is None else _disagreements(table, found)
        for fault in faults:
            yield Severity.ERROR, f"{table_name(table)}: its evidence must agree with it: {fault}"


def _disagreements(table: Table, found: TableEvidence) -> Iterator[str]:
    rows = [(row.num_reqs_from, row.kv_tokens_from, len(row.choices) - 1) for row in table.rows]
    judged = [(row.num_reqs_from, row.kv_tokens_from, len(row.thresholds)) for row in found.rows]
    if rows != judged:
        yield f"got rows, with their thresholds, of {shown(judged)}; accepted: {shown(rows)}"
    limits = {limit.candidate: limit.num_qo_tokens for limit in table.limits}
    for limit in found.limits:
        if limits.get(limit.candidate) != limit.num_qo_tokens:
            yield (
                f"got a limit of {limit.candidate} at {limit.num_qo_tokens}; accepted: "
                f"{limits.get(limit.candidate, 'none')}"
            )


def _written(data: bytes, policy: Policy, stated: PolicyEvidence | None) -> _Told:
    """A file is generated: what differs from that was edited, or written by another release."""
    try:
        again = dump_policy(policy, stated).splitlines()
    except PolicyError:  # a text that this release writes otherwise
        return
    lines = data.splitlines()
    if lines != again:
        pairs = zip([*lines, b""], [*again, b""], strict=False)
        number = next((at for at, (ours, theirs) in enumerate(pairs, 1) if ours != theirs), min(len(lines), len(again)))
        yield (
            Severity.WARNING,
            f"line {number}: is not as mla-tune writes it: the file was edited, or is another release's",
        )


def _source(policy: Policy, path: Path) -> _Told:
    source = policy.source
    found = path.parent.parent / source.file
    if not found.is_file():
        yield Severity.WARNING, f"its measurements are not here to compare: {source.file}"
        return
    sha256 = hashlib.sha256(found.read_bytes()).hexdigest()
    if sha256 != source.sha256:
        yield (
            Severity.ERROR,
            f"must be made of {source.file} as it is: that has SHA-256 {sha256[:12]}, the policy names "
            f"{source.sha256[:12]}; fit it again with `{source.command}`",
        )


def _name(policy: Policy, path: Path) -> _Told:
    accepted = {policy_name(sku, policy.provider or OWN) for sku in policy.gpu.skus}
    if not policy.overlap and path.name not in accepted:
        yield (
            Severity.WARNING,
            f"is found only where it is named: got {path.name}; accepted: {', '.join(sorted(accepted))}",
        )
