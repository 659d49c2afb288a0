"""Predicted cost of every candidate at every forward of a model, many forwards at a time.

Forwards enter with their own requests: rows, widths and attended entries are exact. What the cost curves know of unequal
requests is that much: the attention kernels' time goes by the *mean* of attended entries per query, as it was measured on
near-equal requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mla_tune.errors import PolicyError
from mla_tune.learn.costs import CostModel
from mla_tune.learn.observations import shares
from mla_tune.learn.scope import scope
from mla_tune.learn.work import Array, work
from mla_tune.policy import Limit, Table
from mla_tune.shape import AnyShape, RaggedShape, Shape
from mla_tune.site import FORWARD, MODELS, ModelConfig, Site, SiteName


@dataclass(frozen=True, slots=True)
class Tables:
    """What a policy says for one model and head count."""

    attention: Table
    """Of the whole forward."""
    layers: tuple[Table, ...]
    """Of each layer type, in the model's order."""
    metadata: Table
    """The indexer's, of the whole forward."""

    @property
    def model(self) -> ModelConfig:
        """The model that they are for."""
        return MODELS[self.attention.model]


@dataclass(frozen=True, slots=True, eq=False)
class LayerPrices:
    """Predicted costs at one layer type, or of the indexer's metadata in a forward."""

    layer: str
    candidates: tuple[str, ...]
    total_us: Array
    """(num_candidates, num_forwards): all layers of the type together; infinite past a candidate's limit."""

    def of(self, choices: Sequence[str]) -> Array:
        """Cost of one choice for each forward, (num_forwards,)."""
        rows = np.array([self.candidates.index(name) for name in choices], dtype=np.intp)
        return np.asarray(self.total_us[rows, np.arange(self.total_us.shape[1])])


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """Predicted costs at both sites, forward by forward."""

    attention: tuple[LayerPrices, ...]
    metadata: LayerPrices

    def attention_of(self, candidate: str) -> Array:
        """Attention of whole forwards when every layer takes ``candidate``, (num_forwards,)."""
        return np.asarray(sum(layer.total_us[layer.candidates.index(candidate)] for layer in self.attention))


class Pricer:
    """Prices forwards of one model by the cost model of one GPU."""

    def __init__(self, costs: CostModel, tables: Tables) -> None:
        """Raises :class:`PolicyError` if a table names a candidate that the measurements lack."""
        self.costs, self.tables = costs, tables
        self.model = tables.model
        attention = scope(SiteName.PREFILL_ATTENTION, self.model, FORWARD, tables.attention.h_q)
        self.sites: tuple[tuple[Site, int], ...] = attention.parts
        self._metadata = scope(SiteName.INDEXER_METADATA, self.model, FORWARD, None)
        for table, parts in ((tables.attention, attention.parts), (tables.metadata, self._metadata.parts)):
            for site, _ in parts:
                lacking = set(table.candidates) - set(costs.candidates(site))
                if lacking:
                    raise PolicyError(
                        f"a policy is judged by the measurements behind it: they have no {', '.join(sorted(lacking))} at "
                        f"{site.key}; pass the export that the policy was fitted from"
                    )

    def prices(self, forwards: Sequence[AnyShape]) -> Prices:
        """Predicted costs of ``forwards``, in their order."""
        tokens = np.array([forward.num_qo_tokens for forward in forwards], dtype=np.float64)
        names = self.tables.attention.candidates
        layers = []
        for site, count in self.sites:
            load, share = work(site, forwards), shares(self.model, site)
            us = np.stack([count * self.costs.costs(site, name).amortized_us(load, share) for name in names])
            layers.append(LayerPrices(site.layer, names, _limited(us, names, tokens, self.tables.attention.limits)))
        metadata = self.tables.metadata.candidates
        works = [work(site, forwards) for site, _ in self._metadata.parts]
        us = np.stack([self._metadata.predicted_us(self.costs, name, works) for name in metadata])
        return Prices(
            tuple(layers), LayerPrices(FORWARD, metadata, _limited(us, metadata, tokens, self.tables.metadata.limits))
        )


def _limited(us: Array, names: Sequence[str], tokens: Array, limits: Iterable[Limit]) -> Array:
    for limit in limits:
        us[names.index(limit.candidate), tokens > limit.num_qo_tokens] = np.inf
    return us


_QUERY_STEPS_PER_OCTAVE = 4
_CONTEXT_STEPS_PER_OCTAVE = 2


@dataclass(slots=True)
class IncumbentClock:
    """How long a forward's attention and indexer take under the engine's own choice: what batches form by.

    Forwards are rounded to a grid (quarter octaves of query tokens, half octaves of context, powers of two of requests),
    so that a replay asks the cost model a few hundred times and not once a forward. It decides only when forwards begin:
    what they cost is priced exactly afterwards. Every rule is judged on the same forwards.
    """

    pricer: Pricer
    _known: dict[Shape, float] = field(default_factory=dict)

    def __call__(self, forward: RaggedShape) -> float:
        """Microseconds; where the engine's own choice fails, the fastest candidate's."""
        shape = _rounded(forward)
        if shape not in self._known:
            self._known[shape] = self._time_us(shape)
        return self._known[shape]

    def _time_us(self, shape: Shape) -> float:
        prices, tables = self.pricer.prices([shape]), self.pricer.tables
        attention = float(prices.attention_of(tables.attention.incumbent)[0])
        metadata = float(prices.metadata.of([tables.metadata.incumbent])[0])
        if math.isinf(attention):
            attention = min(float(prices.attention_of(name)[0]) for name in tables.attention.candidates)
        if math.isinf(metadata):
            metadata = float(prices.metadata.total_us.min())
        return attention + metadata


def _rounded(forward: RaggedShape) -> Shape:
    num_reqs = _to_grid(forward.num_reqs, 1)
    tokens = max(num_reqs, _to_grid(forward.num_qo_tokens, _QUERY_STEPS_PER_OCTAVE))
    return Shape(num_reqs, tokens, max(tokens, _to_grid(forward.kv_tokens, _CONTEXT_STEPS_PER_OCTAVE)))


def _to_grid(value: int, steps_per_octave: int) -> int:
    return max(1, round(2 ** (round(math.log2(value) * steps_per_octave) / steps_per_octave)))
