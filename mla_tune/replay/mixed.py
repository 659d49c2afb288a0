"""Batches that mix a long fresh prompt with short extends of long contexts, drawn, and what splitting them is worth."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from mla_tune.errors import UsageError
from mla_tune.fit.batch_split import BatchPlan, BatchRequest, Planner
from mla_tune.fit.observations import shares
from mla_tune.fit.scope import Scope
from mla_tune.sites.candidates import split_stages, stages
from mla_tune.sites.site import Site
from mla_tune.sites.stages import Amortization, Stage
from mla_tune.store.measurement import PER_LAYER_TOTAL, Measurement, Outcome

SPLIT = "split"
MAX_BATCHES = 10_000
_CONTROL_EVERY = 5


class Kind(StrEnum):
    """What a batch is made of."""

    MIXED = "mixed"
    """One fresh prompt and short extends, the prompt at any place among them."""
    FRESH = "fresh"
    """Control: fresh prompts only."""
    EXTENDS = "extends"
    """Control: short extends only."""
    EQUAL = "equal"
    """Control: the same extend several times."""


_CONTROLS = (Kind.FRESH, Kind.EXTENDS, Kind.EQUAL)


@dataclass(frozen=True, slots=True)
class Mix:
    """Closed ranges of what is drawn; each is drawn with its logarithm spread evenly."""

    fresh_tokens: tuple[int, int] = (2048, 8192)
    """Of the fresh prompt, up to a usual prefill chunk."""
    extends: tuple[int, int] = (8, 63)
    """Requests with a cached context; with the prompt 64, the most that the grid's contexts have."""
    new_tokens: tuple[int, int] = (4, 128)
    """Of each of them: a tool's answer or a turn of chat."""
    context_tokens: tuple[int, int] = (1 << 16, 1 << 19)
    """Cached by each of them."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            low, high = getattr(self, name)
            if not 1 <= low <= high <= 1 << 24:
                raise UsageError(f"{name} must be drawn between 1 and {1 << 24}, low to high: got {low}:{high}")


@dataclass(frozen=True, slots=True)
class Batch:
    """One drawn batch."""

    kind: Kind
    requests: tuple[BatchRequest, ...]


def draw_batches(mix: Mix, count: int, seed: int, max_context: int) -> tuple[Batch, ...]:
    """``count`` batches, every fifth a control; contexts end at ``max_context``. The same seed draws the same."""
    if not 1 <= count <= MAX_BATCHES:
        raise UsageError(f"batches must be drawn in a number of 1 to {MAX_BATCHES}: got {count}")
    rng = random.Random(seed)
    return tuple(_drawn(rng, mix, _kind(index), max_context) for index in range(count))


def _kind(index: int) -> Kind:
    rank, behind = divmod(index + 1, _CONTROL_EVERY)
    return Kind.MIXED if behind else _CONTROLS[(rank - 1) % len(_CONTROLS)]


def _drawn(rng: random.Random, mix: Mix, kind: Kind, max_context: int) -> Batch:
    def number(ends: tuple[int, int]) -> int:
        return min(ends[1], int(math.exp(rng.uniform(math.log(ends[0]), math.log(ends[1] + 1)))))

    def extend() -> BatchRequest:
        new = min(number(mix.new_tokens), max_context)
        return BatchRequest(new, min(new + number(mix.context_tokens), max_context))

    def fresh() -> BatchRequest:
        tokens = min(number(mix.fresh_tokens), max_context)
        return BatchRequest(tokens, tokens)

    count = number(mix.extends)
    if kind is Kind.EQUAL:
        return Batch(kind, (extend(),) * count)
    if kind is Kind.FRESH:
        return Batch(kind, tuple(fresh() for _ in range(min(count, 4))))
    requests = [extend() for _ in range(count)]
    if kind is Kind.MIXED:
        requests.insert(rng.randrange(count + 1), fresh())
    return Batch(kind, tuple(requests))


@dataclass(frozen=True, slots=True)
class LayerOutlook:
    """What is predicted of one batch in the layers that one table plans."""

    layer: str
    layers: int
    """How often its times count: the layers of the type, or 1 for a whole forward or one layer alone."""
    plan: BatchPlan
    split: BatchPlan | None
    """The best split, taken or not; None where there is none."""

    @property
    def promised(self) -> bool:
        """Whether the plan is a split."""
        return len(self.plan.parts) > 1


@dataclass(frozen=True, slots=True)
class Outlook:
    """One batch and what is predicted of it, by one table or by that of each layer type."""

    batch: Batch
    layers: tuple[LayerOutlook, ...]

    @property
    def promised(self) -> bool:
        """Whether any of its plans is a split."""
        return any(entry.promised for entry in self.layers)

    @property
    def single_us(self) -> float:
        """By the fastest single path of each table: what one can do without splitting."""
        return sum(entry.layers * entry.plan.single_us for entry in self.layers)

    @property
    def gain(self) -> float:
        """Predicted time without splitting over that of the plans; 1 where none is a split."""
        return self.single_us / sum(entry.layers * entry.plan.predicted_us for entry in self.layers)

    def measured_gain(self, timed: Sequence[Timed]) -> float | None:
        """The same of measured times, one for each table; below 1 where a single path was chosen that is not fastest."""
        return self._measured(timed, [t.plan_us(e.plan) for e, t in zip(self.layers, timed, strict=True)])

    def measured_split_gain(self, timed: Sequence[Timed]) -> float | None:
        """The same with a split in every layer, promised or not."""
        return self._measured(timed, [t.split_us for t in timed])

    def _measured(self, timed: Sequence[Timed], taken_us: Sequence[float | None]) -> float | None:
        best = total = 0.0
        for entry, t, us in zip(self.layers, timed, taken_us, strict=True):
            if t.best_us is None or us is None:
                return None
            best, total = best + entry.layers * t.best_us, total + entry.layers * us
        return best / total


def outlooks(planners: Sequence[tuple[Planner, int]], batches: Iterable[Batch]) -> tuple[Outlook, ...]:
    """Predictions for ``batches``, in their order, by planners with the layers that each counts for.

    Window ids count once a forward; layer types that split differently need them once each, which is left out: it is
    microseconds of milliseconds.
    """

    def seen(planner: Planner, layers: int, batch: Batch) -> LayerOutlook:
        plan, split = planner.plan(batch.requests), planner.best_split(batch.requests)
        return LayerOutlook(planner.layer, layers, plan, split)

    return tuple(Outlook(batch, tuple(seen(p, count, batch) for p, count in planners)) for batch in batches)


@dataclass(frozen=True, slots=True)
class Timed:
    """Measured microseconds of a batch over the whole scope of a table; None where a path failed or was wrong."""

    single_us: tuple[tuple[str, float | None], ...]
    split_us: float | None
    faults: tuple[str, ...]
    """What each failure said, in one line."""

    @property
    def best_us(self) -> float | None:
        """The fastest single path."""
        return min((us for _, us in self.single_us if us is not None), default=None)

    def plan_us(self, plan: BatchPlan) -> float | None:
        """What ``plan`` took."""
        return self.split_us if len(plan.parts) > 1 else dict(self.single_us)[plan.best_single]


def timed(where: Scope, names: Sequence[str], rows: Sequence[Measurement]) -> Timed:
    """Whole times of the paths ``names`` and of the split; ``rows`` are of each site of ``where``, of one batch and regime.

    For every path alike: its per-layer sequence, and the stages of a whole forward one by one, spread over the layers.
    """
    whole = {}
    for name in (*names, SPLIT):
        sites_us = [_site_us(where, site, layers, name, rows) for site, layers in where.parts]
        whole[name] = None if None in sites_us else sum(us for us in sites_us if us is not None)
    faults = [f"{r.candidate} at {r.site.key}: {r.outcome}: {r.detail}" for r in rows if r.outcome is not Outcome.OK]
    return Timed(tuple((name, whole[name]) for name in names), whole[SPLIT], tuple(dict.fromkeys(faults)))


def _site_us(where: Scope, site: Site, layers: int, name: str, rows: Sequence[Measurement]) -> float | None:
    mine = [row for row in rows if (row.site, row.candidate) == (site, name)]
    parts = {row.part: row.latency_us for row in mine if row.outcome is Outcome.OK}
    share = shares(where.model, site)
    found: Sequence[Stage] = split_stages(site) if name == SPLIT else stages(site, name)
    once = [stage for stage in found if stage.amortization is not Amortization.PER_LAYER]
    total_us = parts.get(PER_LAYER_TOTAL)
    for stage in once:
        us = parts.get(stage.name)
        if us is None or total_us is None:
            return None
        total_us += us * share.of(stage.amortization)
    return None if total_us is None else layers * total_us


@dataclass(frozen=True, slots=True)
class Gains:
    """A distribution of gains."""

    batches: int
    geomean: float
    worst: float
    best: float

    @classmethod
    def of(cls, gains: Sequence[float]) -> Gains | None:
        """None of no gains."""
        if not gains:
            return None
        return cls(len(gains), float(np.exp(np.mean(np.log(gains)))), min(gains), max(gains))
