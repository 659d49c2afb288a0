"""Failures as rows: why a candidate has no timing at a point, whether to try again, and when to stop."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mla_tune.sites.shape import Shape
from mla_tune.sites.site import SiteName
from mla_tune.store.measurement import PER_FORWARD_TOTAL, PER_LAYER_TOTAL, Measurement, Outcome, Regime
from mla_tune.sweep.grid import Point

DEADLY = frozenset({Outcome.RUNTIME_ERROR, Outcome.CRASH, Outcome.TIMEOUT})
"""Outcomes that cost a worker or a compilation each; two of them at a site end the tries at larger counts."""
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


_SKIPPED = "not tried: "


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A candidate that is not tried any more at a site."""

    site: str
    """Its key."""
    candidate: str
    num_qo_tokens: int
    """From this count of query tokens up."""
    failures: int
    last_detail: str
    """What the last failure said."""

    @property
    def reason(self) -> str:
        """One line, for the rows of what is not tried."""
        return f"{_SKIPPED}failed {self.failures} times from {self.num_qo_tokens} query tokens up: {self.last_detail}"


def was_skipped(row: Measurement) -> bool:
    """Whether a row says that its candidate was not tried, because of failures elsewhere."""
    return row.outcome is Outcome.UNSUPPORTED and row.detail.startswith(_SKIPPED)


class FailureTracker:
    """Counts the failures that cost a worker, by candidate and site, and says when another try is not worth it."""

    def __init__(self) -> None:
        self._failed: dict[tuple[str, str], dict[Shape, str]] = {}

    def note(self, rows: Iterable[Measurement]) -> None:
        """Take outcomes into account: those of a point that was just measured, or all that are stored."""
        for row in rows:
            if row.outcome in DEADLY:
                self._failed.setdefault((row.site.key, row.candidate), {})[row.shape] = row.detail

    def skip_reason(self, point: Point, candidate: str) -> Failure | None:
        """Why ``candidate`` is not tried at ``point``; None if it is."""
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


def too_large(needed_bytes: float, device_bytes: float) -> str:
    """What a point says that does not fit the device whatever else runs there."""
    return f"needs {needed_bytes / 2**30:.1f} GiB, the device has {device_bytes / 2**30:.1f} GiB"


_TOO_LARGE = re.compile(r"needs [\d.]+ GiB, the device has [\d.]+ GiB$")


def is_spoiled(outcome: Outcome, detail: str) -> bool:
    """Whether another try may end otherwise, since the failure did not come from the candidate."""
    if outcome is Outcome.NO_MEMORY:
        return not _TOO_LARGE.search(detail)
    return outcome is Outcome.DISTURBED and not detail.startswith(NO_SAMPLES)


NO_SAMPLES = "no undisturbed samples: "
"""How the detail of a timing begins of which every sample was disturbed: the sampling has tried for long enough."""
