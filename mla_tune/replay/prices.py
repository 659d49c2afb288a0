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
from mla_tune.fit.costs import CostModel
from mla_tune.fit.interval import LEAST_DIFFERENCE
from mla_tune.fit.observations import shares
from mla_tune.fit.scope import scope
from mla_tune.fit.work import Array, Work, work
from mla_tune.policy.schema import Limit, Table
from mla_tune.sites.shape import AnyShape, RaggedShape, Shape
from mla_tune.sites.site import FORWARD, MODELS, ModelConfig, Site, SiteName


@dataclass(frozen=True, slots=True)
class Tables:
    """What a policy says for one model and head count."""

    attention: Table
    """Of the whole forward."""
    layers: tuple[Table, ...]
    """Of each layer type, in the model's order."""
    metadata: Table
    """The indexer's, of the whole forward."""
    noise_band: float = LEAST_DIFFERENCE
    """Relative difference below which two candidates of :attr:`attention` count as equal."""
    served: ModelConfig | None = None
    """A model that takes another one's tables, with its own layer counts; None for the tables' own."""

    @property
    def model(self) -> ModelConfig:
        """The model that they are for."""
        return self.served or MODELS[self.attention.model]


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
    works: tuple[Work, ...]
    """Work at each layer type."""

    def attention_of(self, candidate: str) -> Array:
        """Attention of whole forwards when every layer takes ``candidate``, (num_forwards,)."""
        return np.asarray(sum(layer.total_us[layer.candidates.index(candidate)] for layer in self.attention))


class Pricer:
    """Prices forwards of one model by the cost model of one GPU."""

    def __init__(self, costs: CostModel, tables: Tables) -> None:
        """Raises :class:`PolicyError` if a table names a candidate that the measurements lack."""
        self.costs, self.tables = costs, tables
        self.model = tables.model
        conditions = costs.observations.conditions
        attention, metadata = SiteName.PREFILL_ATTENTION, SiteName.INDEXER_METADATA
        h_q = tables.attention.h_q
        self._attention = scope(attention, self.model, FORWARD, h_q, tables.attention.engine, conditions)
        self.sites: tuple[tuple[Site, int], ...] = self._attention.parts
        self._metadata = scope(metadata, self.model, FORWARD, None, tables.metadata.engine, conditions)
        for table, parts in ((tables.attention, self.sites), (tables.metadata, self._metadata.parts)):
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
        works = tuple(work(site, forwards) for site, _ in self.sites)
        names = self.tables.attention.candidates
        layers = []
        for (site, count), load, table in zip(self.sites, works, self.tables.layers, strict=True):
            share = shares(self.model, site)
            paths = [self.costs.costs(self._attention.launched(site, name, self.costs), name) for name in names]
            us = np.stack([count * path.amortized_us(load, share) for path in paths])
            layers.append(LayerPrices(site.layer, names, _limited(us, names, tokens, table.limits)))
        indexer = self.tables.metadata.candidates
        loads = [work(site, forwards) for site, _ in self._metadata.parts]
        us = np.stack([self._metadata.predicted_us(self.costs, name, loads) for name in indexer])
        metadata = LayerPrices(FORWARD, indexer, _limited(us, indexer, tokens, self.tables.metadata.limits))
        return Prices(tuple(layers), metadata, works)

    def incumbent_us(self, forward: AnyShape) -> float:
        """Attention and indexer of one forward under the engine's own choice, limits aside."""
        names = self.tables.attention.incumbent, self.tables.metadata.incumbent
        return sum(
            float(where.predicted_us(self.costs, name, [work(site, [forward]) for site, _ in where.parts])[0])
            for where, name in zip((self._attention, self._metadata), names, strict=True)
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
        """Microseconds, limits aside: past one, what the curves say that it would take."""
        shape = _rounded(forward)
        if shape not in self._known:
            self._known[shape] = self.pricer.incumbent_us(shape)
        return self._known[shape]


def _rounded(forward: RaggedShape) -> Shape:
    num_reqs = _to_grid(forward.num_reqs, 1)
    tokens = max(num_reqs, _to_grid(forward.num_qo_tokens, _QUERY_STEPS_PER_OCTAVE))
    return Shape(num_reqs, tokens, max(tokens, _to_grid(forward.kv_tokens, _CONTEXT_STEPS_PER_OCTAVE)))


def _to_grid(value: int, steps_per_octave: int) -> int:
    return max(1, round(2 ** (round(math.log2(value) * steps_per_octave) / steps_per_octave)))
