"""Would another sweep choose the same? Two sweeps of the same machine, compared point by point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mla_tune.errors import FitError
from mla_tune.fit.observations import Observations
from mla_tune.fit.scope import Scope, scopes
from mla_tune.fit.winner import Verdict, verdict
from mla_tune.sites.engines import Engine
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import FORWARD


@dataclass(frozen=True, slots=True)
class Flip:
    """A point at which two sweeps choose differently."""

    table: str
    """Site, model, heads and layer type, as messages show them."""
    shape: Shape
    first: Verdict
    second: Verdict

    @property
    def ambiguous(self) -> bool:
        """Whether one of the sweeps says itself that it cannot tell."""
        return self.first.ambiguous or self.second.ambiguous


@dataclass(frozen=True, slots=True)
class Repetition:
    """How far two sweeps agree."""

    points: int
    """(table, shape) pairs that both sweeps compared, of tables of one layer type."""
    ambiguous: int
    """Pairs that at least one sweep calls ambiguous."""
    flips: tuple[Flip, ...]
    """Pairs at which the choice differs."""
    timings: int
    """Whole-path costs that both sweeps measured."""
    differences: tuple[float, float, float]
    """Relative difference of such a cost between the sweeps: median, 95th percentile, largest."""

    @property
    def clear_flips(self) -> tuple[Flip, ...]:
        """Flips outside the ambiguous band: each sweep is sure, and of something else."""
        return tuple(flip for flip in self.flips if not flip.ambiguous)


def compare(first: Observations, second: Observations) -> Repetition:
    """Compare two sweeps. Raises :class:`FitError` if they have no comparison in common."""
    compared = [scope for scope in scopes(first.conditions) if _compared(scope)]
    pairs = [pair for scope in compared for pair in _verdicts(first, second, scope)]
    differences = [d for scope in compared for d in _differences(first, second, scope)]
    if not pairs:
        raise FitError(
            "two sweeps are compared where both measured every candidate: got no such point; "
            "next: repeat with a larger --budget"
        )
    flips = tuple(pair for pair in pairs if pair.first.choice != pair.second.choice)
    return Repetition(
        points=len(pairs),
        ambiguous=sum(pair.ambiguous for pair in pairs),
        flips=flips,
        timings=len(differences),
        differences=(
            float(np.median(differences)),
            float(np.percentile(differences, 95)),
            float(np.max(differences)),
        ),
    )


def _compared(scope: Scope) -> bool:
    """Each site once: not the whole forward, nor the same measurements as another engine sees them."""
    return scope.layer != FORWARD and scope.engine is Engine.SGLANG


def _names(observations: Observations, scope: Scope) -> list[str]:
    """Candidates that ran, the incumbent first; empty where that did not run."""
    ran = scope.candidates(observations)
    incumbent = scope.incumbent
    return [incumbent, *(name for name in ran if name != incumbent)] if incumbent in ran else []


def _verdicts(first: Observations, second: Observations, scope: Scope) -> Iterator[Flip]:
    """Both verdicts at every point that both sweeps can judge, whether they agree or not."""
    names = [name for name in _names(first, scope) if name in _names(second, scope)]
    if len(names) < 2:
        return
    (site, _), *_ = scope.parts
    heads = f" h_q {scope.h_q}" if scope.h_q else ""
    for shape in first.shapes(site):
        one, other = verdict(first, scope, names, shape), verdict(second, scope, names, shape)
        if one is not None and other is not None:
            yield Flip(f"{scope.name} {scope.model.name}{heads} {scope.layer}", shape, one, other)


def _differences(first: Observations, second: Observations, scope: Scope) -> Iterator[float]:
    (site, _), *_ = scope.parts
    for name in _names(first, scope):
        for shape in first.shapes(site):
            one, other = scope.measured_us(first, name, shape), scope.measured_us(second, name, shape)
            if one and other:
                yield abs(one - other) / min(one, other)
