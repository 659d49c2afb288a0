"""Capability bounds: those that a sweep ran into, and those that a probe went looking for."""

from __future__ import annotations

from collections.abc import Iterable

from mla_tune.fit.observations import Observations
from mla_tune.policy.evidence import LimitEvidence
from mla_tune.sites.site import Site
from mla_tune.store.measurement import CAPABILITY, Outcome

_REASON_CHARACTERS = 160


def limits(observations: Observations, sites: Iterable[Site], candidates: Iterable[str]) -> tuple[LimitEvidence, ...]:
    """One limit for each candidate that failed from some count of query tokens on, at any of ``sites``.

    Held-out points count too: a limit is about safety, not cost, and a failure that was seen must not be served. A
    candidate that failed at its smallest count has no limit, see :func:`is_unsafe`. A probe's tries count like points,
    and the limit is a probe's where neighbours were tried: one count that ran and the next that failed.
    """
    chosen = list(sites)
    found = [_limit(candidate, *_counts(observations, chosen, candidate)) for candidate in sorted(candidates)]
    return tuple(limit for limit in found if limit is not None)


def is_unsafe(observations: Observations, sites: Iterable[Site], candidate: str) -> bool:
    """Whether the candidate failed at its smallest count of query tokens, so that no count is known to be safe."""
    ran, failed = _counts(observations, list(sites), candidate)
    return bool(failed) and min(failed) <= min(ran, default=min(failed))


def _counts(observations: Observations, sites: list[Site], candidate: str) -> tuple[set[int], dict[int, str]]:
    """Query token counts at which the candidate ran, and those at which it failed with what the failure said."""
    ran: set[int] = set()
    failed: dict[int, str] = {}
    for site in sites:
        for shape in observations.shapes(site):
            failure = observations.failure(site, candidate, shape)
            if failure is not None and failure.outcome in CAPABILITY:
                failed.setdefault(shape.num_qo_tokens, failure.detail)
            elif observations.cost(site, candidate, shape) is not None:
                ran.add(shape.num_qo_tokens)
        for attempt in observations.tries(site, candidate):
            if attempt.outcome in CAPABILITY:
                failed.setdefault(attempt.shape.num_qo_tokens, attempt.detail)
            elif attempt.outcome is Outcome.OK:
                ran.add(attempt.shape.num_qo_tokens)
    return ran, failed


def _limit(candidate: str, ran: set[int], failed: dict[int, str]) -> LimitEvidence | None:
    if not failed:
        return None
    fails_at = min(failed)
    below = [count for count in ran if count < fails_at]
    if not below:
        return None
    return LimitEvidence(
        candidate=candidate,
        num_qo_tokens=max(below),
        fails_at=fails_at,
        found_by="probe" if max(below) + 1 == fails_at else "sweep",
        reason=_one_line(failed[fails_at]),
    )


def _one_line(detail: str) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in detail).split())
    return text if len(text) <= _REASON_CHARACTERS else f"{text[: _REASON_CHARACTERS - 3]}..."
