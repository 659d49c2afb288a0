"""One try of a probe: a candidate at one shape in a worker process of its own, run and compared, never timed.

Tries are how a capability limit is found (doubling, then bisection). They are kept beside the measurements, so that a
limit can be read off them again, and say what a first call costs a process that never ran the candidate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Site
from mla_tune.store.measurement import Outcome


@dataclass(frozen=True, slots=True)
class Try:
    """How one candidate did at one shape in a fresh process."""

    site: Site
    candidate: str
    shape: Shape
    outcome: Outcome
    """``ok`` if it ran and its output was right."""
    detail: str = ""
    """One line: why the outcome is not ``ok``; empty otherwise."""
    first_call_s: float | None = None
    """Seconds of the first call, compilation and module load included; None where it did not return."""

    @property
    def key(self) -> tuple[str, str, Shape]:
        """What makes two tries of one environment the same: (site, candidate, shape). The later one replaces the first."""
        return (self.site.key, self.candidate, self.shape)


def try_fault(attempt: Try) -> str | None:
    """Why a try may not be stored, in one line; None for a sound one."""
    if not attempt.candidate or not attempt.candidate.isprintable():
        return f"candidate must be a name: got {attempt.candidate!r}"
    if (attempt.outcome is Outcome.OK) != (not attempt.detail):
        return f"outcome {attempt.outcome} and detail must agree: got detail {attempt.detail!r}"
    if not (attempt.detail.isprintable() or not attempt.detail):
        return f"detail must be one line: got {attempt.detail!r}"
    seconds = attempt.first_call_s
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        return f"first_call_s must be finite and at least 0: got {seconds}"
    return None
