"""What an operator sets around a server: the ``MLA_TUNE_*`` environment variables, parsed once when a policy is loaded.

Who decides, the first that applies:

1. ``engine``: a setting that the user gave the engine itself (its own flag or environment variable) for this choice;
2. ``off``: ``MLA_TUNE_MODE=off`` or ``MLA_TUNE_POLICY=off``;
3. ``pin``: ``MLA_TUNE_MODE=pin:<candidate>``, for every shape, as far as the candidate's limits reach;
4. ``policy``: the file that ``MLA_TUNE_POLICY`` names, or the one that ships for this GPU;
5. ``incumbent``: the engine's own choice, with the reason in the log.

1, 2 and 5 all leave the engine on its own choice. A pin needs a policy too: only a policy knows the limits of this
kernel build, and a candidate past its limit is never answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import msgspec

from mla_tune.errors import UsageError
from mla_tune.sites.candidates import CANDIDATES, known_candidate
from mla_tune.sites.site import SiteName

POLICY_VARIABLE = "MLA_TUNE_POLICY"
MODE_VARIABLE = "MLA_TUNE_MODE"
MODELLED_VARIABLE = "MLA_TUNE_ALLOW_MODELLED"
RANKS_VARIABLE = "MLA_TUNE_RANKS"
RECORD_VARIABLE = "MLA_TUNE_RECORD"

_TRUTH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_PIN = "pin:"


class Rule(StrEnum):
    """Who decides at a site; see the list above."""

    ENGINE = "engine"
    OFF = "off"
    PIN = "pin"
    POLICY = "policy"
    INCUMBENT = "incumbent"


class RankMismatch(StrEnum):
    """What ranks do that would not decide alike."""

    REFUSE = "refuse"
    INCUMBENT = "incumbent"


class Switches(msgspec.Struct, frozen=True):
    """The variables, parsed. The defaults are those of an empty environment."""

    policy: str | None = None
    """Path of the policy file to take whatever GPU it is for; None for the one that ships."""
    off: str | None = None
    """The setting that keeps the engine's own choice everywhere, for the log; None where none does."""
    pins: tuple[str, ...] = ()
    """Candidates to answer for every shape, at most one per site."""
    allow_modelled: bool | None = None
    """Whether a policy that was not measured may serve; None: only one that :attr:`policy` names."""
    on_rank_mismatch: RankMismatch = RankMismatch.REFUSE
    record: str | None = None
    """File that the histogram of shapes is written to; None records nothing."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Switches:
        """Parse ``environment``. Raises :class:`UsageError` for a value that none of the variables accepts."""
        values = {name: environment.get(name, "").strip() for name in _VARIABLES}
        policy, mode = values[POLICY_VARIABLE], values[MODE_VARIABLE]
        off = [f"{name}=off" for name in (MODE_VARIABLE, POLICY_VARIABLE) if values[name] == "off"]
        return cls(
            policy=policy if policy != "off" and policy else None,
            off=off[0] if off else None,
            pins=_pins(mode),
            allow_modelled=_truth(values[MODELLED_VARIABLE]),
            on_rank_mismatch=_rank_mismatch(values[RANKS_VARIABLE]),
            record=values[RECORD_VARIABLE] or None,
        )

    def pin(self, site: SiteName) -> str | None:
        """The candidate that is pinned at ``site``, or None."""
        names = {candidate.name for candidate in CANDIDATES[site]}
        return next((name for name in self.pins if name in names), None)

    @property
    def mode(self) -> str:
        """:data:`MODE_VARIABLE` as it would be written for these switches."""
        if self.off is not None:
            return "off"
        return _PIN + ",".join(self.pins) if self.pins else "auto"


_VARIABLES = (POLICY_VARIABLE, MODE_VARIABLE, MODELLED_VARIABLE, RANKS_VARIABLE, RECORD_VARIABLE)


def _pins(mode: str) -> tuple[str, ...]:
    if mode in ("", "auto", "off"):
        return ()
    known = ", ".join(candidate.name for found in CANDIDATES.values() for candidate in found)
    if not mode.startswith(_PIN):
        raise UsageError(
            f"{MODE_VARIABLE} must be a known mode: got {mode!r}; accepted: auto, off, or {_PIN} with one of {known}"
        )
    pins = tuple(name.strip() for name in mode.removeprefix(_PIN).split(","))
    for name in pins:
        if known_candidate(name) is None:
            raise UsageError(f"{MODE_VARIABLE} must pin a known candidate: got {name!r}; accepted: {known}")
    for site, found in CANDIDATES.items():
        if len(set(pins) & {candidate.name for candidate in found}) > 1:
            raise UsageError(f"{MODE_VARIABLE} must pin one candidate per site: got {mode!r} for {site}; keep one")
    return tuple(sorted(set(pins)))


def _truth(value: str) -> bool | None:
    try:
        return _TRUTH[value.lower()] if value else None
    except KeyError:
        raise UsageError(
            f"{MODELLED_VARIABLE} must be a truth value: got {value!r}; accepted: {', '.join(_TRUTH)}"
        ) from None


def _rank_mismatch(value: str) -> RankMismatch:
    try:
        return RankMismatch(value or RankMismatch.REFUSE)
    except ValueError:
        raise UsageError(
            f"{RANKS_VARIABLE} must be a known word: got {value!r}; accepted: {', '.join(RankMismatch)}"
        ) from None
