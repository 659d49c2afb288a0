"""What a fit is asked to minimize, as the options that ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mla_tune.fit.objective import Objective
from mla_tune.sites.served_shapes import read_traffic
from mla_tune.store.measurement import Regime


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a fit was asked to minimize, as options; see :class:`mla_tune.fit.objective.Objective`."""

    regime: Regime | None = None
    traffic: Path | None = None
    max_workspace_bytes: int | None = None

    def words(self) -> list[str]:
        """The options again."""
        given = {
            "--regime": self.regime,
            "--traffic": self.traffic.as_posix() if self.traffic else None,
            "--max-workspace-bytes": self.max_workspace_bytes,
        }
        return [word for option, value in given.items() if value is not None for word in (option, str(value))]

    def objective(self) -> Objective:
        """With the traffic read. Raises :class:`StoreError`."""
        return Objective(self.regime, read_traffic(self.traffic) if self.traffic else None, self.max_workspace_bytes)


NO_WISHES = Wishes()
