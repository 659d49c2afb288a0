"""Where the whole path should be timed next: at the predicted crossovers, which is where a wrong curve would cost most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from mla_tune.learn.costs import CostModel
from mla_tune.learn.observations import shares
from mla_tune.learn.work import Array, work
from mla_tune.shape import Shape
from mla_tune.site import ModelConfig, Site, SiteName
from mla_tune.store.measurement import Role

_PER_OCTAVE = 8


def crossover_shapes(costs: CostModel, models: Iterable[ModelConfig]) -> list[tuple[Site, Shape]]:
    """One shape on each side of every crossover between the two fastest candidates of every attention site.

    The crossovers are looked for along query tokens, at each (requests, context) that the fit points of the site cover.
    """
    found: dict[tuple[Site, Shape], None] = {}
    for model in models:
        for h_q in model.heads:
            for layer in model.site_layers(SiteName.PREFILL_ATTENTION):
                site = model.site(SiteName.PREFILL_ATTENTION, layer, h_q)
                for shape in _site_crossovers(costs, model, site):
                    found[site, shape] = None
    return list(found)


def _site_crossovers(costs: CostModel, model: ModelConfig, site: Site) -> Iterator[Shape]:
    names = costs.candidates(site)
    if len(names) < 2:
        return
    contexts = sorted({(s.num_reqs, s.kv_tokens) for s in costs.observations.shapes(site, Role.FIT)})
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
        for index in np.flatnonzero(winner[1:] != winner[:-1]):
            yield shapes[index]
            yield shapes[index + 1]


def _counts(low: int, high: int) -> list[int]:
    """Query token counts from ``low`` to ``high``, evenly on the logarithm."""
    steps = max(2, round(np.log2(max(high / low, 1.0)) * _PER_OCTAVE))
    return sorted({round(low * (high / low) ** (step / steps)) for step in range(steps + 1)})
