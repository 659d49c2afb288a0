"""What one table chooses for, and what each candidate costs there: measured, or predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mla_tune.fit.costs import CostModel
from mla_tune.fit.interval import Interval
from mla_tune.fit.observations import Observations, shares
from mla_tune.fit.work import Array, Work
from mla_tune.sites.engines import Engine, engine_choice, engine_heads, launched_site, model_incumbent, table_engine
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import FORWARD, MODELS, PLAIN, Conditions, ModelConfig, Site, SiteName
from mla_tune.store.measurement import Role


@dataclass(frozen=True, slots=True)
class Scope:
    """What one table chooses for: a layer type of a model, or its whole mix of layers."""

    name: SiteName
    model: ModelConfig
    layer: str
    h_q: int | None
    parts: tuple[tuple[Site, int], ...]
    """Each site that the choice covers, with the layers that it counts for (1 in a table of one layer type)."""
    engine: Engine = Engine.SGLANG
    """The engine that chooses."""

    @property
    def incumbent(self) -> str:
        """What the engine takes today."""
        return model_incumbent(self.engine, self.name, self.model)

    def measured_us(self, observations: Observations, candidate: str, shape: Shape) -> float | None:
        """Measured whole-path cost: per layer, or per forward; None if any part of it was not measured."""
        total_us = 0.0
        for site, layers in self.parts:
            cost = observations.cost(self.launched(site, candidate, observations), candidate, shape)
            if cost is None:
                return None
            total_us += layers * cost.amortized(shares(self.model, site))
        return total_us

    def measured_interval(self, observations: Observations, candidate: str, shape: Shape) -> Interval | None:
        """Confidence interval of :meth:`measured_us`; None where that is None."""
        low_us = high_us = 0.0
        for site, layers in self.parts:
            launched = self.launched(site, candidate, observations)
            ends = observations.cost_range(launched, candidate, shape, shares(self.model, site))
            if ends is None:
                return None
            low_us, high_us = low_us + layers * ends[0], high_us + layers * ends[1]
        return Interval(low_us, high_us)

    def predicted_us(self, costs: CostModel, candidate: str, works: Sequence[Work]) -> Array:
        """Predicted cost, (num_shapes,); ``works`` holds the shapes' work at each site of :attr:`parts`."""
        total_us = np.zeros_like(works[0].num_qo_tokens)
        for (site, layers), load in zip(self.parts, works, strict=True):
            launched = self.launched(site, candidate, costs)
            total_us += layers * costs.costs(launched, candidate).amortized_us(load, shares(self.model, site))
        return total_us

    def error(self, costs: CostModel, candidate: str) -> float:
        """Relative error of a prediction between the measured points, weighted by layers."""
        layers = sum(count for _, count in self.parts)
        launched = ((self.launched(site, candidate, costs), count) for site, count in self.parts)
        return sum(count * costs.costs(site, candidate).error for site, count in launched) / layers

    def launched(self, site: Site, candidate: str, ran: Observations | CostModel) -> Site:
        """The site whose kernels the engine runs for ``candidate``; ``site`` where that one was not swept."""
        launched = launched_site(self.engine, site, candidate, ran.architecture)
        return launched if launched is site or candidate in ran.candidates(launched) else site

    def candidates(self, observations: Observations) -> tuple[str, ...]:
        """Candidates of the engine that ran at every site of the scope, sorted."""
        ran = [
            set(observations.candidates(site)) & set(engine_choice(self.engine, self.name, site.layer).candidates)
            for site, _ in self.parts
        ]
        return tuple(sorted(set.intersection(*ran)))

    def swept(self, observations: Observations, role: Role) -> list[Shape]:
        """Shapes of one role at which every site of the scope was attempted, sorted."""
        return sorted(set.intersection(*(set(observations.shapes(site, role)) for site, _ in self.parts)))


def scopes(conditions: Conditions = PLAIN) -> Iterator[Scope]:
    """Every table that a policy can have, in the order of its file: site, model, engine, heads, layer types, forward.

    ``conditions`` are those of the measurements that it is fitted on.
    """
    for name in SiteName:
        for model in MODELS.values():
            for engine in Engine:
                if table_engine(engine, name, model) is engine:
                    for h_q in engine_heads(engine, model) if name is SiteName.PREFILL_ATTENTION else (None,):
                        yield from _layer_scopes(name, model, h_q, engine, conditions)


def scope(
    name: SiteName,
    model: ModelConfig,
    layer: str,
    h_q: int | None,
    engine: Engine = Engine.SGLANG,
    conditions: Conditions = PLAIN,
) -> Scope:
    """The scope of one table; its key is taken to be valid. ``conditions`` as in :func:`scopes`."""
    return next(found for found in _layer_scopes(name, model, h_q, engine, conditions) if found.layer == layer)


def _layer_scopes(
    name: SiteName, model: ModelConfig, h_q: int | None, engine: Engine, conditions: Conditions
) -> Iterator[Scope]:
    sites = [conditions.at(model.site(name, layer, h_q)) for layer in model.site_layers(name)]
    for site in sites:
        yield Scope(name, model, site.layer, h_q, ((site, 1),), engine)
    # A forward computes metadata once for all layers of a type, and attention in each of them.
    counted = tuple((s, model.layer_count(s.layer) if name is SiteName.PREFILL_ATTENTION else 1) for s in sites)
    yield Scope(name, model, FORWARD, h_q, counted, engine)
