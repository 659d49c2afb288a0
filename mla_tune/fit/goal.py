"""Does a policy keep its promise on shapes that nobody chose? Fresh points, judged against a stated goal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mla_tune.errors import FitError
from mla_tune.fit.evaluation import is_single_layer_attention, rules, table_scope
from mla_tune.fit.interval import noise_band
from mla_tune.fit.observations import Observations
from mla_tune.fit.scope import Scope
from mla_tune.fit.winner import overlapping
from mla_tune.policy.evidence import POLICY_RULE, PolicyEvidence
from mla_tune.policy.schema import Policy, Table
from mla_tune.sites.shape import Shape


@dataclass(frozen=True, slots=True)
class Goal:
    """Largest slowdowns that a policy may show against the fastest measured candidate."""

    mean: float = 1.005
    p99: float = 1.05
    worst: float = 1.10


@dataclass(frozen=True, slots=True)
class RuleLoss:
    """How one rule did on all points that it applies to."""

    rule: str
    points: int
    mean: float
    p99: float
    worst: float


@dataclass(frozen=True, slots=True)
class Loss:
    """A point at which the policy's choice is slower than another one."""

    table: str
    shape: Shape
    choice: str
    slowdown: float


_UNSURE = 0.05
"""Half-width of a median's interval, relative, from which on it decides nothing: the goal's p99 is a difference of 5 %."""


@dataclass(frozen=True, slots=True)
class Unsure:
    """A point that is not judged, since a median there is known too badly."""

    table: str
    shape: Shape
    candidate: str
    relative: float
    """Half-width of its interval over its median."""


@dataclass(frozen=True, slots=True)
class Validation:
    """What a policy's choices cost on fresh points."""

    points: int
    """(table, shape) pairs that were judged."""
    losses: tuple[RuleLoss, ...]
    """The policy first, then every baseline."""
    below_incumbent: tuple[Loss, ...]
    """Where the policy left the engine's own choice and lost to it beyond the noise band."""
    worst: tuple[Loss, ...]
    """The policy's five worst points, the worst first."""
    unsure: tuple[Unsure, ...] = ()
    """Points that were not judged."""

    def missed(self, goal: Goal) -> list[str]:
        """Each part of ``goal`` that was missed, with the figure; empty where it was met."""
        own = self.losses[0]
        figures = (("mean", own.mean, goal.mean), ("p99", own.p99, goal.p99), ("worst", own.worst, goal.worst))
        found = [f"{name} {value:.4f} is above {most}" for name, value, most in figures if value > most]
        if self.below_incumbent:
            found.append(f"{len(self.below_incumbent)} points are slower than the incumbent beyond the noise band")
        return found


def validate(observations: Observations, policy: Policy, evidence: PolicyEvidence | None = None) -> Validation:
    """Judge every attention table of one layer type at every shape of ``observations`` where all its candidates ran.

    A loss counts beyond the noise band that ``evidence`` has of the table; without it beyond what two timings differ by.

    Raises :class:`FitError` if there is no such point: nothing passes on nothing.
    """
    found = [entry for table in policy.tables for entry in _judged(observations, table, evidence)]
    judged = [entry for entry in found if isinstance(entry, _Judged)]
    unsure = tuple(entry for entry in found if isinstance(entry, Unsure))
    if unsure and not judged:
        raise FitError(
            f"a validation needs a point whose medians are known to {_UNSURE:.0%}: got none of {len(unsure)}; next: "
            "validate again when nothing else runs on this machine"
        )
    if not judged:
        raise FitError(
            "a validation needs a point at which every candidate of a table ran: got none; next: raise --points, or see "
            "with `mla-tune verify` why candidates fail here"
        )
    names = list(dict.fromkeys(name for entry in judged for name in entry.slowdowns))
    losses = [Loss(e.table, e.shape, e.choice, e.slowdowns[POLICY_RULE]) for e in judged]
    return Validation(
        points=len(judged),
        losses=tuple(_rule(name, [e.slowdowns[name] for e in judged if name in e.slowdowns]) for name in names),
        below_incumbent=tuple(Loss(e.table, e.shape, e.choice, e.over_incumbent) for e in judged if e.over_incumbent),
        worst=tuple(sorted((loss for loss in losses if loss.slowdown > 1), key=lambda loss: -loss.slowdown)[:5]),
        unsure=unsure,
    )


@dataclass(frozen=True, slots=True)
class _Judged:
    table: str
    shape: Shape
    choice: str
    slowdowns: dict[str, float]
    over_incumbent: float
    """Cost of the choice over the incumbent's where that is beyond the noise band; 0 otherwise."""


def _unsure(
    observations: Observations, scope: Scope, choice: str, fastest: str, shape: Shape
) -> tuple[str, float] | None:
    """Which of the two medians that decide is known too badly, and how badly.

    None if both are known well enough, or if the choice misses the goal wherever in their intervals they lie.
    """
    ends = {name: scope.measured_interval(observations, name, shape) for name in (choice, fastest)}
    mine, best = ends[choice], ends[fastest]
    if mine is None or best is None or (best.high_us > 0 and mine.low_us / best.high_us > Goal().worst):
        return None
    for name, interval in (choice, mine), (fastest, best):
        relative = (interval.high_us - interval.low_us) / (interval.high_us + interval.low_us)
        if relative > _UNSURE:
            return name, relative
    return None


def _judged(observations: Observations, table: Table, evidence: PolicyEvidence | None) -> Iterator[_Judged | Unsure]:
    if not is_single_layer_attention(table) or len(table.candidates) < 2:
        return
    scope = table_scope(table, observations.conditions)
    (site, _), *_ = scope.parts
    band = noise_band(evidence, table)
    judged = rules(table)
    label = f"{table.model} h_q {table.h_q} {table.layer}"
    for shape in observations.shapes(site):
        costs_us = {name: scope.measured_us(observations, name, shape) for name in table.candidates}
        ran = {name: us for name, us in costs_us.items() if us is not None}
        if len(ran) < len(costs_us):
            continue
        picks = {name: rule(shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs) for name, rule in judged}
        choice, fastest_us = picks[POLICY_RULE], min(ran.values())
        fastest = min(ran, key=lambda name: ran[name])
        if (unsure := _unsure(observations, scope, choice, fastest, shape)) is not None:
            yield Unsure(label, shape, *unsure)
            continue
        over = ran[choice] / ran[table.incumbent]
        clear = over > 1 + band and not overlapping(observations, scope, choice, table.incumbent, shape)
        slowdowns = {name: ran[pick] / fastest_us for name, pick in picks.items()}
        yield _Judged(label, shape, choice, slowdowns, over if clear else 0.0)


def _rule(name: str, slowdowns: Sequence[float]) -> RuleLoss:
    values = np.array(slowdowns)
    return RuleLoss(name, len(values), float(values.mean()), float(np.percentile(values, 99)), float(values.max()))
