"""Where the whole path should be timed next: at the predicted crossovers, which is where a wrong curve would cost most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import zip_longest

import numpy as np

from mla_tune.fit.costs import CostModel
from mla_tune.fit.observations import shares
from mla_tune.fit.work import Array, work
from mla_tune.sites.engines import Engine, engine_choice
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import ModelConfig, Site, attention_sites
from mla_tune.store.measurement import Role

_PER_OCTAVE = 8
_AXIS = 3
"""Query token counts that make a context an axis of the grid, rather than one chunk of a prefill."""


def crossover_shapes(costs: CostModel, models: Iterable[ModelConfig]) -> list[tuple[Site, Shape]]:
    """For every attention site, a shape just below the first and one just above the last change of the fastest candidate.

    Changes are looked for along query tokens, at each (requests, context) where the fit points of the site have an
    axis. The sites take turns in the result, so that all get some of a budget that ends early.
    """
    columns = [
        [
            (site, shape)
            for names in engine_choices(costs, site)
            for shape in _site_crossovers(costs, model, site, names)
        ]
        for site, model in attention_sites(models, costs.observations.conditions).items()
    ]
    return [found for row in zip_longest(*columns) for found in row if found is not None]


def engine_choices(costs: CostModel, site: Site) -> Iterator[tuple[str, ...]]:
    """What each engine chooses from at this site, as far as it ran: a crossover that one of them has is looked for."""
    ran = costs.candidates(site)
    sets = (engine_choice(engine, site.name, site.layer).candidates for engine in Engine)
    names = dict.fromkeys(tuple(name for name in candidates if name in ran) for candidates in sets)
    yield from (candidates for candidates in names if len(candidates) > 1)


def _site_crossovers(costs: CostModel, model: ModelConfig, site: Site, names: tuple[str, ...]) -> Iterator[Shape]:
    swept = Counter((s.num_reqs, s.kv_tokens) for s in costs.observations.shapes(site, Role.FIT))
    contexts = sorted(context for context, counts in swept.items() if counts >= _AXIS)
    largest = max((s.num_qo_tokens for s in costs.observations.shapes(site, Role.FIT)), default=0)
    for num_reqs, kv_tokens in contexts:
        shapes = [
            Shape(num_reqs, count, kv_tokens)
            for count in _counts(num_reqs, min(kv_tokens, largest))
            if count >= num_reqs
        ]
        if len(shapes) < 2:
            continue
        load = work(site, shapes)
        share = shares(model, site)
        costs_us: Array = np.stack([costs.costs(site, name).amortized_us(load, share) for name in names])
        winner = costs_us.argmin(axis=0)
        switches = np.flatnonzero(winner[1:] != winner[:-1])
        if len(switches):
            yield shapes[switches[0]]
            yield shapes[switches[-1] + 1]


def _counts(low: int, high: int) -> list[int]:
    """Query token counts from ``low`` to ``high``, evenly on the logarithm."""
    steps = max(2, round(np.log2(max(high / low, 1.0)) * _PER_OCTAVE))
    return sorted({round(low * (high / low) ** (step / steps)) for step in range(steps + 1)})
