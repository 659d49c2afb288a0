"""Launch parameters that were tuned on one environment, with what they bought, as the database and the export keep them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mla_tune.sites.launch_parameters import KernelLaunch, Launches


@dataclass(frozen=True, slots=True)
class Tuned:
    """The outcome of tuning one kernel in one size class."""

    launch: KernelLaunch
    """The winner; the default's own parameters where nothing beat them beyond doubt."""
    latency_us: float
    default_us: float
    """Medians of the winner and of the default, timed in turn."""
    trials: int
    """Distinct configurations that were tried, failed and pruned ones included."""

    @property
    def key(self) -> tuple[str, int]:
        """What makes two of one environment the same: (kernel, size_from). The later one replaces the first."""
        return (self.launch.kernel, self.launch.size_from)


def tuned_fault(tuned: Tuned) -> str | None:
    """Why an outcome may not be stored, in one line; None for a sound one."""
    for name in ("latency_us", "default_us"):
        value: float = getattr(tuned, name)
        if not (math.isfinite(value) and value > 0):
            return f"{name} must be finite and above 0: got {value}"
    return None if tuned.trials >= 1 else f"trials must be at least 1: got {tuned.trials}"


def launches_from(tuned: Iterable[Tuned]) -> Launches:
    """The lookup that the outcomes make."""
    return Launches(tuple(entry.launch for entry in tuned))
