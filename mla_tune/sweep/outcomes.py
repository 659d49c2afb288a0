"""Failures as rows: why a candidate has no timing at a point, and when to stop trying it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mla_tune.sites.shape import Shape
from mla_tune.sites.site import SiteName
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


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A candidate that is not tried any more at a site."""

    site: str
    """Its key."""
    candidate: str
    num_qo_tokens: int
    """From this count of query tokens up."""
    failures: int
    last_words: str
    """What the last failure said."""

    @property
    def reason(self) -> str:
        """One line, for the rows of what is not tried."""
        return f"not tried: failed {self.failures} times from {self.num_qo_tokens} query tokens up: {self.last_words}"


class Deaths:
    """Counts what each candidate did to its workers at each site, and says when it is not worth another one."""

    def __init__(self) -> None:
        self._failed: dict[tuple[str, str], dict[Shape, str]] = {}

    def note(self, rows: Iterable[Measurement]) -> None:
        """Take outcomes into account: those of a point that was just measured, or all that are stored."""
        for row in rows:
            if row.outcome in DEADLY:
                self._failed.setdefault((row.site.key, row.candidate), {})[row.shape] = row.detail

    def hopeless(self, point: Point, candidate: str) -> Failure | None:
        """Why not to try ``candidate`` at ``point``; None if it is worth trying."""
        found = self._given_up((point.site.key, candidate))
        if found is None or point.shape.num_qo_tokens < found.num_qo_tokens:
            return None
        return Failure(Outcome.UNSUPPORTED, found.reason)

    def given_up(self) -> tuple[GivenUp, ...]:
        """Every candidate that is not tried any more, in the order of their first failures."""
        return tuple(found for key in self._failed if (found := self._given_up(key)) is not None)

    def _given_up(self, key: tuple[str, str]) -> GivenUp | None:
        failed = self._failed.get(key, {})
        if len(failed) < _DEADLY_ATTEMPTS:
            return None
        fewest = min(shape.num_qo_tokens for shape in failed)
        return GivenUp(*key, fewest, len(failed), list(failed.values())[-1])
