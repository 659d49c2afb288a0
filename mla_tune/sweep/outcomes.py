"""Failures as rows: why a candidate has no timing at a point, and when to stop trying it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mla_tune.site import SiteName
from mla_tune.store.measurement import PER_FORWARD_TOTAL, PER_LAYER_TOTAL, Measurement, Outcome, Regime
from mla_tune.sweep.grid import Point

DEADLY = frozenset({Outcome.RUNTIME_ERROR, Outcome.CRASH, Outcome.TIMEOUT})
"""Outcomes that cost a worker or a compilation each; two of them at a site end the attempts at larger counts."""
_DEADLY_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a candidate has no timing at a point."""

    outcome: Outcome
    detail: str


def total_part(point: Point) -> str:
    """The part that stands for a whole candidate at a point: its per-layer path, or the indexer's only stage."""
    return PER_FORWARD_TOTAL if point.site.name is SiteName.INDEXER_METADATA else PER_LAYER_TOTAL


def failures(point: Point, candidate: str, failure: Failure, regimes: Sequence[Regime]) -> list[Measurement]:
    """Rows of a candidate that has no timing: one for each regime, at the part that stands for it."""
    part, detail = total_part(point), " ".join(failure.detail.split())
    return [
        Measurement(point.site, point.shape, point.role, candidate, part, regime, failure.outcome, detail)
        for regime in regimes
    ]


class Deaths:
    """Counts what each candidate did to its workers at each site, and says when it is not worth another one."""

    def __init__(self) -> None:
        self._failing_tokens: dict[tuple[str, str], list[int]] = {}

    def note(self, rows: Iterable[Measurement]) -> None:
        """Take the outcomes of one point into account."""
        for candidate, row in {row.candidate: row for row in rows if row.outcome in DEADLY}.items():
            self._failing_tokens.setdefault((row.site.key, candidate), []).append(row.shape.num_qo_tokens)

    def hopeless(self, point: Point, candidate: str) -> Failure | None:
        """Why not to try ``candidate`` at ``point``; None if it is worth trying."""
        tokens = self._failing_tokens.get((point.site.key, candidate), [])
        if len(tokens) < _DEADLY_ATTEMPTS or point.shape.num_qo_tokens < min(tokens):
            return None
        return Failure(Outcome.UNSUPPORTED, f"not tried: failed {len(tokens)} times from {min(tokens)} query tokens up")
