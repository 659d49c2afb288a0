"""What every rule would make of the same forwards: its choices, their predicted time, and how often they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mla_tune.errors import UsageError
from mla_tune.fit.evaluation import Rule, rules
from mla_tune.fit.work import Array
from mla_tune.policy.evidence import POLICY_RULE
from mla_tune.replay.prices import LayerPrices, Pricer, Prices
from mla_tune.sites.shape import AnyShape

LAYERED_RULE = "policy, each layer type by its own table"
ORACLE = "fastest candidate of each forward"
"""The bound on any rule that makes one choice for a whole forward."""


@dataclass(frozen=True, slots=True)
class RuleTotal:
    """One rule over all forwards. Times are None where it picks a candidate past its limit: it would fail there."""

    rule: str
    is_incumbent: bool
    attention_us: float | None
    metadata_us: float | None
    p50_us: float | None
    """Median of attention and indexer per forward, over the forwards as they occurred."""
    p99_us: float | None
    differs: float
    """Share of forwards in which its attention choice is not the incumbent's, at some layer at least."""
    failing: int
    """Forwards in which it picks a candidate past its limit."""

    @property
    def total_us(self) -> float | None:
        """Attention and indexer together."""
        if self.attention_us is None or self.metadata_us is None:
            return None
        return self.attention_us + self.metadata_us


@dataclass(frozen=True, slots=True)
class Judgement:
    """Every rule over the same forwards."""

    forwards: int
    distinct: int
    outside: float
    """Share of forwards outside the policy's measured ranges: there predictions are extrapolated, and it keeps the
    incumbent."""
    rules: tuple[RuleTotal, ...]

    def rule(self, name: str) -> RuleTotal:
        """One of them by its name."""
        return next(entry for entry in self.rules if entry.rule == name)

    @property
    def incumbent(self) -> RuleTotal:
        """What the engine does today."""
        return next(entry for entry in self.rules if entry.is_incumbent)


def choices(rule: Rule, forwards: Sequence[AnyShape]) -> list[str]:
    """What ``rule`` answers at each forward: all that it sees of unequal requests is their number and their sums."""
    return [rule(forward.num_qo_tokens, forward.kv_tokens, forward.num_reqs) for forward in forwards]


def judge(pricer: Pricer, forwards: Mapping[AnyShape, int]) -> Judgement:
    """Judge every rule over ``forwards``, each with how often it occurred. Raises :class:`UsageError` for none."""
    if not forwards:
        raise UsageError("rules are judged on prefill forwards: got none; next: replay traffic that has a request")
    shapes, counts = list(forwards), np.array(list(forwards.values()), dtype=np.int64)
    prices, tables = pricer.prices(shapes), pricer.tables
    bench = _Bench(prices, counts, tables.attention.incumbent)
    metadata = dict(rules(tables.metadata))
    kept = [tables.metadata.incumbent] * len(shapes)
    found = []
    for name, rule in rules(tables.attention):
        # The engine's constant decides at both sites; any other baseline leaves the indexer as it is today.
        indexer = choices(metadata[name], shapes) if name in metadata else kept
        picked = choices(rule, shapes)
        found.append(bench.total(name, [picked] * len(prices.attention), indexer))
        if name == POLICY_RULE and len(tables.layers) > 1:
            by_layer = [choices(dict(rules(table))[POLICY_RULE], shapes) for table in tables.layers]
            found.append(bench.total(LAYERED_RULE, by_layer, indexer))
    whole = np.stack([prices.attention_of(name) for name in tables.attention.candidates])
    fastest = [tables.attention.candidates[index] for index in whole.argmin(axis=0)]
    found.append(bench.total(ORACLE, [fastest] * len(prices.attention), _fastest(prices.metadata)))
    measured = tables.attention.measured
    inside = np.array([measured.holds(s.num_qo_tokens, s.kv_tokens, s.num_reqs) for s in shapes])
    return Judgement(
        forwards=int(counts.sum()),
        distinct=len(shapes),
        outside=float(counts[~inside].sum() / counts.sum()),
        rules=tuple(found),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Bench:
    prices: Prices
    counts: np.typing.NDArray[np.int64]
    incumbent: str

    def total(self, name: str, attention: Sequence[Sequence[str]], metadata: Sequence[str]) -> RuleTotal:
        """``attention`` holds the choices of each layer type, all of them and ``metadata`` one for each forward."""
        layers = zip(self.prices.attention, attention, strict=True)
        attention_us = np.sum([layer.of(picked) for layer, picked in layers], axis=0)
        metadata_us = self.prices.metadata.of(metadata)
        per_forward_us = attention_us + metadata_us
        failing = int(self.counts[np.isinf(per_forward_us)].sum())
        differs = np.any([[pick != self.incumbent for pick in picked] for picked in attention], axis=0)
        is_incumbent = name == f"always {self.incumbent}"
        share = float(self.counts[differs].sum() / self.counts.sum())
        if failing:
            return RuleTotal(name, is_incumbent, None, None, None, None, share, failing)
        p50_us, p99_us = np.percentile(np.repeat(per_forward_us, self.counts), [50, 99])
        return RuleTotal(
            rule=name,
            is_incumbent=is_incumbent,
            attention_us=self._sum(attention_us),
            metadata_us=self._sum(metadata_us),
            p50_us=float(p50_us),
            p99_us=float(p99_us),
            differs=share,
            failing=0,
        )

    def _sum(self, us: Array) -> float:
        return float((us * self.counts).sum())


def _fastest(prices: LayerPrices) -> list[str]:
    return [prices.candidates[index] for index in prices.total_us.argmin(axis=0)]
