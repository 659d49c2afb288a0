"""What bounds a candidate: limits, which a probe proved, and suspects, which a sweep ran into and no probe has settled.

A limit is two neighbours, one count of query tokens that ran and the next that failed, each in a fresh process. A failure
of a sweep alone is a suspect: the policy states no limit for it, the candidate is not chosen from there up, and commands
name it together with the probe that settles it. What did not come from the candidate is neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mla_tune.fit.observations import Observations
from mla_tune.policy.evidence import LimitEvidence
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Site
from mla_tune.store.measurement import Outcome
from mla_tune.store.outside_cause import is_own_failure

_REASON_CHARACTERS = 160


@dataclass(frozen=True, slots=True)
class Suspect:
    """A failure that no probe has settled: neither repeated in a fresh process beside a neighbour that ran, nor cleared."""

    site: Site
    candidate: str
    shape: Shape
    """Where it failed; the fewest query tokens of its kind."""
    runs_at: int
    """Largest count of query tokens below, that ran; 0 if none did."""
    reason: str
    """What the failure said, in one line."""


def limits(observations: Observations, sites: Iterable[Site], candidates: Iterable[str]) -> tuple[LimitEvidence, ...]:
    """The proven bound of each candidate: the lowest that a probe found at any of ``sites``.

    The newest try at a shape counts, since it replaces the one before. A candidate that failed at its smallest count has no
    limit, see :func:`is_unsafe`.
    """
    chosen = list(sites)
    found = []
    for candidate in sorted(candidates):
        proven = [limit for site in chosen if (limit := _Evidence(observations, site, candidate).limit())]
        if proven:
            found.append(min(proven, key=lambda limit: limit.num_qo_tokens))
    return tuple(found)


def suspects(observations: Observations, sites: Iterable[Site], candidates: Iterable[str]) -> tuple[Suspect, ...]:
    """Failures that a probe has still to settle, the lowest of each (site, candidate), below its limit if it has one."""
    found = [
        _Evidence(observations, site, candidate).suspect() for site in sites for candidate in sorted(set(candidates))
    ]
    return tuple(suspect for suspect in found if suspect is not None)


def is_unsafe(observations: Observations, sites: Iterable[Site], candidate: str) -> bool:
    """Whether the candidate failed at its smallest count of query tokens at any site: no count is known to be safe.

    It may have run there too, at another context: a count that ran at 8K of context and failed at 128K is not safe.
    """
    return any(_Evidence(observations, site, candidate).is_unsafe() for site in sites)


class _Evidence:
    """Everything seen of one candidate at one site that says what it can do."""

    def __init__(self, observations: Observations, site: Site, candidate: str) -> None:
        self._site, self._candidate = site, candidate
        tries = observations.tries(site, candidate)
        self._proven = {entry.shape: entry.detail for entry in tries if is_own_failure(entry.outcome, entry.detail)}
        """By shape: failures in a fresh process."""
        self._passed = {e.shape for e in tries if e.outcome is Outcome.OK} - set(self._proven)
        """Shapes that ran in a fresh process."""
        shapes = observations.shapes(site)
        self._timed = {shape for shape in shapes if observations.cost(site, candidate, shape) is not None}
        self._unproven = dict(self._failed_in_sweep(observations, shapes))

    def _failed_in_sweep(self, observations: Observations, shapes: Iterable[Shape]) -> Iterator[tuple[Shape, str]]:
        """Failures of a sweep that nothing speaks against.

        That is a try that ran there, or one or a timing at as many query tokens and as much context at least. A wrong
        result is another matter: that larger shapes are right makes it no better.
        """
        ran = self._timed | self._passed
        for shape in shapes:
            row = observations.failure(self._site, self._candidate, shape)
            if row is None or not is_own_failure(row.outcome, row.detail) or shape in self._passed:
                continue
            if row.outcome is Outcome.WRONG_RESULT or not any(_covers(other, shape) for other in ran):
                yield shape, row.detail

    def limit(self) -> LimitEvidence | None:
        """The pair of neighbours at the lowest count that failed in a fresh process; None if it has none."""
        if not self._proven:
            return None
        shape = min(self._proven, key=lambda shape: shape.num_qo_tokens)
        fails_at = shape.num_qo_tokens
        if not any(passed.num_qo_tokens == fails_at - 1 for passed in self._passed):
            return None
        return LimitEvidence(
            candidate=self._candidate,
            num_qo_tokens=fails_at - 1,
            fails_at=fails_at,
            found_by="probe",
            reason=_one_line(self._proven[shape]),
        )

    def suspect(self) -> Suspect | None:
        if any(shape.num_qo_tokens == 1 for shape in self._proven):  # no count is safe: nothing is left to settle
            return None
        limit = self.limit()
        failed = self._unproven if limit else self._unproven | self._proven
        below = [shape for shape in failed if limit is None or shape.num_qo_tokens < limit.fails_at]
        if not below:
            return None
        shape = min(below, key=lambda shape: (shape.num_qo_tokens, shape))
        return Suspect(
            self._site, self._candidate, shape, self._largest_below(shape.num_qo_tokens), _one_line(failed[shape])
        )

    def _largest_below(self, count: int) -> int:
        ran = self._timed | self._passed
        return max((shape.num_qo_tokens for shape in ran if shape.num_qo_tokens < count), default=0)

    def is_unsafe(self) -> bool:
        failed = self._unproven | self._proven
        if not failed:
            return False
        least = min(shape.num_qo_tokens for shape in failed)
        ran = self._timed | self._passed
        return least <= min((shape.num_qo_tokens for shape in ran), default=least)


def _covers(larger: Shape, shape: Shape) -> bool:
    """Whether a run at ``larger`` says that size is no reason to fail at ``shape``."""
    return larger.num_qo_tokens >= shape.num_qo_tokens and larger.kv_tokens >= shape.kv_tokens and larger != shape


def _one_line(detail: str) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in detail).split())
    return text if len(text) <= _REASON_CHARACTERS else f"{text[: _REASON_CHARACTERS - 3]}..."
