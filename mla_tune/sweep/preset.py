"""How much a sweep measures: frozen presets behind ``--effort``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mla_tune.errors import UsageError
from mla_tune.sites.engines import VARIANTS


@dataclass(frozen=True, slots=True)
class Preset:
    """One effort."""

    name: str
    dense: bool
    """Measure the whole grid and both sides of its crossovers; otherwise a few seeds, then where doubt is largest."""
    held_out: int
    """Random shapes that judge each attention site."""
    held_out_indexer: int
    points_per_round: int
    """Points that an adaptive sweep adds to each site before the curves are fitted again."""
    sampling_s: float
    """Time that the samples of one point may take in one regime; a median that is known to 1 % takes less."""
    variants: bool
    """Measure our own variants of a path too, which no engine but ours has.

    On an H200 181 points took 75 s without them, 121 points 90 s with them, compilation included.
    """
    budget_s: Mapping[str, float]
    """Seconds of measuring by kind of device."""

    @property
    def without(self) -> tuple[str, ...]:
        """Candidates that it leaves alone."""
        return () if self.variants else tuple(candidate.name for candidate in VARIANTS)


QUICK = Preset("quick", False, 3, 2, 2, 0.08, False, MappingProxyType({"cuda": 45.0, "cpu": 60.0}))
DEFAULT = Preset("default", False, 4, 2, 2, 0.12, False, MappingProxyType({"cuda": 90.0, "cpu": 150.0}))
FULL = Preset("full", True, 36, 6, 0, 0.3, True, MappingProxyType({"cuda": 540.0, "cpu": 600.0}))
PRESETS = {preset.name: preset for preset in (QUICK, DEFAULT, FULL)}


def find_preset(name: str) -> Preset:
    """The preset that ``--effort`` names. Raises :class:`UsageError` for an unknown one."""
    if name not in PRESETS:
        raise UsageError(f"--effort must be a known preset: got {name!r}; accepted: {', '.join(PRESETS)}")
    return PRESETS[name]
