"""A table's answers as areas and lines over (query tokens, context tokens), for one range of request counts.

An area is one choice of one row, cut where a limit or the measured range changes what is answered: all of its shapes get
the same candidate. Its sides are the policy's own thresholds in their exact integers: what is drawn is what is served.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mla_tune.policy.decision import Decision, Leaf
from mla_tune.policy.evidence import RowEvidence, TableEvidence, ThresholdEvidence
from mla_tune.policy.rules import MAX_INT64
from mla_tune.policy.schema import Table, row_ends
from mla_tune.policy.threshold import Threshold

_STEPS = 24
"""Contexts at which a slanted side is drawn, evenly spread over the logarithm: a straight line is a curve there."""
_PROBES = 65
"""Contexts at which an area is looked into for a shape that it really holds."""


@dataclass(frozen=True, slots=True)
class Area:
    """Shapes that one choice of one row serves with one candidate."""

    candidate: str
    kv_tokens: tuple[int, int]
    """Least and most context tokens, both inside."""
    num_qo_tokens: tuple[int, int]
    """Query tokens that it never leaves; the second is the first count outside."""
    left: Threshold
    right: Threshold | None
    """The threshold of the next choice; None for a row's last."""

    def span(self, kv_tokens: int) -> tuple[int, int]:
        """First query tokens inside and first behind, at a context of the area; empty where they are equal."""
        low, high = self.num_qo_tokens
        start = min(max(low, self.left.at(kv_tokens)), high)
        end = high if self.right is None else min(high, self.right.at(kv_tokens))
        return start, max(start, end)

    def holds(self, num_qo_tokens: int, kv_tokens: int) -> bool:
        """Whether a shape lies in it."""
        if not self.kv_tokens[0] <= kv_tokens <= self.kv_tokens[1]:
            return False
        start, end = self.span(kv_tokens)
        return start <= num_qo_tokens < end

    def outline(self) -> tuple[tuple[int, int], ...]:
        """Corners (query tokens, context tokens), around the area; where it has no width both sides meet.

        Less what no forward is: one has at least as many context tokens as query tokens.
        """
        level = self.left.is_level and (self.right is None or self.right.is_level)
        whole = level and self.span(self.kv_tokens[0])[1] <= self.kv_tokens[0]
        contexts = sorted(set(self.kv_tokens)) if whole else spread(*self.kv_tokens)
        spans = [tuple(min(count, kv + 1) for count in self.span(kv)) for kv in contexts]
        up = [(start, kv) for kv, (start, _) in zip(contexts, spans, strict=True)]
        down = [(end, kv) for kv, (_, end) in zip(contexts, spans, strict=True)]
        return (*up, *reversed(down))


@dataclass(frozen=True, slots=True)
class Crossing:
    """One threshold of one row, with its bracket where there is evidence."""

    before: str
    """Candidate below the threshold."""
    after: str
    """Candidate from it upward."""
    kv_tokens: tuple[int, ...]
    num_qo_tokens: tuple[int, ...]
    """The threshold at each context."""
    bracket: tuple[tuple[int, int], ...]
    """Below the first ``before`` clearly wins, above the second ``after``; empty without evidence."""
    win: tuple[float, float] | None
    """Mean relative win of ``before`` at the lower edge of the bracket, and of ``after`` at the upper one."""


def spread(low: int, high: int) -> list[int]:
    """Counts from ``low`` to ``high``, both among them, evenly spread over the logarithm."""
    return sorted({low, high, *(int(count) for count in np.geomspace(max(low, 1), max(high, 1), _STEPS)[1:-1])})


def areas(table: Table, num_reqs: int, most_context: int = MAX_INT64) -> tuple[Area, ...]:
    """Everything that the measured range holds for forwards of ``num_reqs`` requests. No two areas share a shape.

    ``most_context`` cuts off contexts that the model cannot have.
    """
    return tuple(_areas(table, num_reqs, most_context))


def _areas(table: Table, num_reqs: int, most_context: int) -> Iterator[Area]:
    decision = Decision(table)
    low, high = table.measured.num_qo_tokens
    cuts = {limit.num_qo_tokens + 1 for limit in table.limits}
    ends = [low, *sorted(cut for cut in cuts if low < cut <= high), high + 1]
    for index in _rows_of(table, num_reqs):
        kv_from, kv_to = _contexts(table, index, most_context)
        if kv_from > kv_to:
            continue
        lines = [choice.threshold for choice in table.rows[index].choices]
        for left, right in zip(lines, [*lines[1:], None], strict=True):
            for start, end in pairwise(ends):
                found = _answered(decision, Area("", (kv_from, kv_to), (start, end), left, right), num_reqs)
                if found is not None:
                    yield Area(found.candidate, (kv_from, kv_to), (start, end), left, right)


def _answered(decision: Decision, area: Area, num_reqs: int) -> Leaf | None:
    """What ``decision`` says in ``area``; None where the area holds no shape."""
    for kv_tokens in np.geomspace(*area.kv_tokens, _PROBES):
        kv = min(max(round(float(kv_tokens)), area.kv_tokens[0]), area.kv_tokens[1])
        start, end = area.span(kv)
        if start < end:
            return decision.answer(start, kv, num_reqs)
    return None


def crossings(
    table: Table, evidence: TableEvidence | None, num_reqs: int, most_context: int = MAX_INT64
) -> tuple[Crossing, ...]:
    """The thresholds that forwards of ``num_reqs`` requests meet, those of a row in its order; see :func:`areas`."""
    return tuple(_crossings(table, evidence, num_reqs, most_context))


def _crossings(table: Table, evidence: TableEvidence | None, num_reqs: int, most_context: int) -> Iterator[Crossing]:
    for index in _rows_of(table, num_reqs):
        kv_from, kv_to = _contexts(table, index, most_context)
        if kv_from > kv_to:
            continue
        row = table.rows[index]
        for place, (before, after) in enumerate(pairwise(row.choices)):
            found = _evidence(evidence.rows[index] if evidence else None, place)
            level = after.threshold.is_level
            found_at = sorted({kv_from, kv_to}) if level else spread(kv_from, kv_to)
            contexts = [kv for kv in found_at if after.threshold.at(kv) <= kv]
            if not contexts:  # no forward has so many query tokens
                continue
            counts = tuple(after.threshold.at(kv) for kv in contexts)
            yield Crossing(
                before=before.candidate,
                after=after.candidate,
                kv_tokens=tuple(contexts),
                num_qo_tokens=counts,
                bracket=tuple(found.at(count) for count in counts) if found else (),
                win=found.win if found else None,
            )


def _evidence(row: RowEvidence | None, place: int) -> ThresholdEvidence | None:
    return row.thresholds[place] if row is not None and place < len(row.thresholds) else None


def request_ranges(table: Table) -> tuple[tuple[int, int], ...]:
    """Ranges of request counts, both ends inside, in which the same rows serve; forwards of one request are one of them."""
    low, high = table.measured.num_reqs
    starts = sorted({low, *(start for row in table.rows if low < (start := row.num_reqs_from) <= high)})
    if low == 1 < high:
        starts = sorted({*starts, 2})
    return tuple((start, end - 1) for start, end in pairwise([*starts, high + 1]))


def _rows_of(table: Table, num_reqs: int) -> list[int]:
    """Indices of the rows that serve forwards of ``num_reqs`` requests."""
    reached = max(row.num_reqs_from for row in table.rows if row.num_reqs_from <= num_reqs)
    return [index for index, row in enumerate(table.rows) if row.num_reqs_from == reached]


def _contexts(table: Table, index: int, most_context: int) -> tuple[int, int]:
    """Least and most context tokens of a row inside the measured range."""
    low, high = table.measured.kv_tokens
    return max(table.rows[index].kv_tokens_from, low), min(row_ends(table)[index] - 1, high, most_context)
