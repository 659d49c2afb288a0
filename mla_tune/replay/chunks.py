"""Which chunk size to prefill with: attention and indexer time, and workspace, of the same prompts in chunks of each size.

Larger chunks dequantize and schedule less often; their workspace grows with the query tokens. The smallest time wins, and
where several sizes are within the noise band of it, the one of them that needs the least memory. What else a forward costs,
whatever its size (launches, weights read once more), speaks for larger chunks: it enters as a stated time per forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mla_tune.errors import UsageError
from mla_tune.fit.evaluation import rules
from mla_tune.fit.work import Array
from mla_tune.fit.workspace_bytes import forward_bytes, workspace
from mla_tune.policy.evidence import POLICY_RULE
from mla_tune.replay.prices import Pricer, Prices
from mla_tune.replay.rule_comparison import choices
from mla_tune.sites.shape import AnyShape, RaggedShape, Shape

CHUNK_SIZES = tuple(1 << n for n in range(10, 17))
"""1K to 64K query tokens, the sizes that a sweep times."""
MAX_PARTS = 1 << 22
"""Most parts of prompts in one round, a prompt's share of a forward being one: what is summed up in seconds. A million
tokens for each of 64 prompts in chunks of 1K."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of one length, and how much they count."""

    tokens: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (self.tokens >= 1 and 0 < self.weight < float("inf")):
            raise UsageError(f"a prompt must have tokens and a weight above 0: got {self.tokens} and {self.weight}")


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """One way to choose, at one chunk size."""

    time_us: float
    """Attention and indexer of all layers; for a distribution, the weighted mean of a round of prompts."""
    workspace_bytes: int
    """Peak over all forwards."""
    candidates: tuple[str, ...]
    """Attention candidates that were chosen, sorted."""


@dataclass(frozen=True, slots=True)
class ChunkSize:
    """What one chunk size costs."""

    chunk_tokens: int
    forwards: float
    """Forwards of all prompts; of a distribution, the weighted mean."""
    policy: ChunkCost
    incumbent: ChunkCost | None
    """None where the engine's own choice is past its limit at this size."""
    rest_us: float = 0.0
    """What all forwards cost besides, whatever their size."""

    @property
    def total_us(self) -> float:
        """What the advice goes by: the time under the policy and the rest."""
        return self.policy.time_us + self.rest_us


@dataclass(frozen=True, slots=True)
class Advice:
    """The size to set."""

    chunk_tokens: int
    reason: str


def side_by_side(prompt_tokens: int, chunk_tokens: int, concurrency: int) -> Counter[AnyShape]:
    """Forwards of ``concurrency`` equal prompts that share every chunk evenly, from nothing cached to all done.

    Raises :class:`UsageError` where a chunk has fewer tokens than there are prompts.
    """
    if not 1 <= concurrency <= chunk_tokens:
        raise UsageError(
            f"a chunk must have a token for each prompt: got {concurrency} prompts and chunks of {chunk_tokens}; "
            "accepted: a concurrency of at least 1 and at most the chunk size"
        )
    found: Counter[AnyShape] = Counter()
    total = prompt_tokens * concurrency
    if -(-total // chunk_tokens) * concurrency > MAX_PARTS:
        raise UsageError(
            f"prompts must be prefilled in at most {MAX_PARTS} parts: got {concurrency} of {prompt_tokens} tokens in "
            f"chunks of {chunk_tokens}; accepted: fewer or shorter ones"
        )
    for start in range(0, total, chunk_tokens):
        tokens = min(chunk_tokens, total - start)
        if tokens < concurrency:  # the last few tokens, one each
            found[RaggedShape(((1, prompt_tokens),) * tokens)] += 1
        else:
            found[Shape(concurrency, tokens, start + tokens)] += 1
    return found


def distribution(prompts: Sequence[Prompts], chunk_tokens: int, concurrency: int) -> dict[AnyShape, float]:
    """Forwards of :func:`side_by_side` over prompts of several lengths, each counting by its weight over all weights."""
    total = sum(prompt.weight for prompt in prompts)
    found: dict[AnyShape, float] = {}
    for prompt in prompts:
        for shape, count in side_by_side(prompt.tokens, chunk_tokens, concurrency).items():
            found[shape] = found.get(shape, 0.0) + count * prompt.weight / total
    return found


def chunk_size(
    pricer: Pricer, chunk_tokens: int, forwards: Mapping[AnyShape, float], rest_us: float = 0.0
) -> ChunkSize:
    """The costs of ``forwards``, each with how often it occurs, which were batched in chunks of ``chunk_tokens``.

    ``rest_us`` is what the rest of the model costs in every forward beyond a share for each token.
    """
    shapes, tables = list(forwards), pricer.tables
    batched = _Batched(pricer, pricer.prices(shapes), np.array(list(forwards.values()), dtype=np.float64))
    by_policy = (choices(dict(rules(table))[POLICY_RULE], shapes) for table in (tables.attention, tables.metadata))
    by_engine = ([table.incumbent] * len(shapes) for table in (tables.attention, tables.metadata))
    policy = batched.served(*by_policy)
    assert policy is not None, "a policy answers no candidate past its limit"
    count = float(batched.weights.sum())
    return ChunkSize(chunk_tokens, count, policy, batched.served(*by_engine), rest_us * count)


@dataclass(frozen=True, slots=True, eq=False)
class _Batched:
    """Forwards with their prices and weights."""

    pricer: Pricer
    prices: Prices
    weights: Array

    def served(self, attention: Sequence[str], metadata: Sequence[str]) -> ChunkCost | None:
        """What these choices, one for each forward, take; None where one of them is past its limit."""
        per_forward_us = self.prices.metadata.of(metadata)
        for layer in self.prices.attention:
            per_forward_us = per_forward_us + layer.of(attention)
        if not np.isfinite(per_forward_us).all():
            return None
        names = np.array(attention)
        peaks = [float(self._bytes(name)[names == name].max()) for name in sorted(set(attention))]
        return ChunkCost(float((per_forward_us * self.weights).sum()), int(max(peaks)), tuple(sorted(set(attention))))

    def _bytes(self, candidate: str) -> Array:
        """Workspace of whole forwards, (num_forwards,)."""
        device = self.pricer.costs.environment.sm_count, self.pricer.costs.architecture
        sites = (site for site, _ in self.pricer.sites)
        return forward_bytes(
            [workspace(site, candidate, load, *device) for site, load in zip(sites, self.prices.works, strict=True)]
        )


def advise(sizes: Sequence[ChunkSize], noise_band: float) -> Advice:
    """The chunk size to set. Raises :class:`UsageError` for none to choose from."""
    if not sizes:
        raise UsageError("a chunk size is chosen from at least one: got none; accepted: " + str(CHUNK_SIZES))
    fastest = min(sizes, key=lambda size: (size.total_us, size.chunk_tokens))
    close = [size for size in sizes if size.total_us <= fastest.total_us * (1 + noise_band)]
    best = min(close, key=lambda size: (size.policy.workspace_bytes, size.chunk_tokens))
    if best is fastest:
        others = "" if len(close) == 1 else " and the least workspace of those within the noise band"
        return Advice(best.chunk_tokens, f"the smallest time{others}")
    slower = best.total_us / fastest.total_us - 1
    return Advice(
        best.chunk_tokens,
        f"{slower:.2%} slower than {fastest.chunk_tokens}, within the noise band of {noise_band:.2%}, with "
        f"{best.policy.workspace_bytes / fastest.policy.workspace_bytes:.0%} of its workspace",
    )
