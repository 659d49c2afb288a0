"""From one GPU's curve to another's: each term of the law by the ratio of what bounds it, and how far that may be off.

* Clock (launches, latencies, the serial scheduler): the ratio of boost clocks.
* Memory: the ratio of bandwidths. The share of gathers that miss is taken anew with an L2 larger by the ratio of both.
* SMs: the staircase is laid anew in waves of the target's SM count. A wave lasts as long as one SM needs, which is the
  tensor cores' part, by throughput per SM, and the rest, by clock; how large the first is says the utilisation that the
  kernel reaches on the measured GPU. On another architecture ``sparse_fwd`` is another kernel, written for that one's
  tensor cores: its utilisation is taken to stay. ``with_kvcache`` dequantizes on the CUDA cores, which are no faster
  there, so it keeps the two parts on both.

On SM100 the KV-cache kernel leaves narrow selections unsplit (:mod:`mla_tune.sites.kernel_switches`), so that the laws
count no schedule and no merge there.

What a law misses (the local correction) is carried over as it is: it is a ratio without a unit, made by tails of waves,
by partial overlap and by what a stage finds in the L2, and on the target it is looked up at as many waves as it was
measured at. So is the ratio of whole paths to the sum of their stages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mla_tune.fit.bases import L2_BYTES, Chip, Resource, basis
from mla_tune.fit.curves import Curve, terms_of
from mla_tune.fit.work import Array, Work
from mla_tune.hardware.datasheet import Datasheet
from mla_tune.sites.site import LayerType, Site
from mla_tune.sites.stages import Law, Stage

_D_V = 512
_D_QK = {LayerType.DSA: 576}
"""Elements of a key where it is not as wide as a value (512): V3.2 keeps 64 for the position apart."""

_ANOTHER_PART = 0.03
"""Doubt in any ratio on the same architecture: under its power cap a part runs below the clock of its datasheet, and
differently so (an H200's tensor cores reach about 790 of 989 TFLOP/s)."""
_ANOTHER_ARCHITECTURE = 0.15
"""The same where the chip is another as well. A judgement: no stage was timed on two architectures yet."""
_CLOCK_EXPONENT = 0.5
"""A latency is partly the memory's, which no SM clock shortens: its exponent on the clock is between 0 and 1."""
_MEMORY_EXPONENT = 0.25
"""The dequantize kernel moves 0.80 of an H200's 4.8 TB/s at best; a part with more reaches a smaller share."""
_OVER_WORKSPACE = (Law.WORKSPACE_ATTENTION, Law.SELECTED_ATTENTION)
_ANOTHER_KERNEL = {True: 0.25, False: 0.5}
"""Doubt in an attention kernel of another architecture: over a workspace, and over the paged cache.

FlashMLA's README states, of V3.2 shapes: sparse prefill 640
TFLOP/s on an H800 and 1450 on a B200, 0.65 and 0.64 of the peak, where the same utilisation gives 1455; but V4's
queries are shorter. Sparse decoding 410 and 350, "not really optimized yet", 1.31 times the time per SM, where the two
parts at a utilisation of 0.41 give 0.79: off by exp(0.5)."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """The way from the curves of ``source`` to those of ``target``."""

    source: Datasheet
    target: Datasheet
    always_splits: bool = False
    """Whether the target's KV-cache kernel is taken to split every query, as FlashMLA's builds of before 2026 did."""

    @property
    def same_architecture(self) -> bool:
        """Whether both run the same kernels."""
        return self.source.architecture == self.target.architecture

    @property
    def _clock(self) -> float:
        return self.source.boost_clock_mhz.value / self.target.boost_clock_mhz.value

    @property
    def _memory(self) -> float:
        return self.source.memory_bandwidth_gbps.value / self.target.memory_bandwidth_gbps.value

    @property
    def _tensor(self) -> float:
        return self.source.bf16_tflops_per_sm / self.target.bf16_tflops_per_sm

    def factor(self, resource: Resource, law: Law, utilisation: float) -> float:
        """What a term's coefficient is multiplied by; exactly 1 where source and target are one product.

        ``utilisation`` is the share of the source's tensor peak that the kernel reaches.
        """
        if resource is Resource.CLOCK:
            return self._clock
        if resource is Resource.MEMORY:
            return self._memory
        per_sm = self._per_sm(law, utilisation)
        if resource is Resource.DEVICE:
            return per_sm * self.source.sm_count.value / self.target.sm_count.value
        return per_sm

    def _per_sm(self, law: Law, utilisation: float) -> float:
        if law in _OVER_WORKSPACE and not self.same_architecture:
            return self._tensor
        return 1 + utilisation * (self._tensor - 1) + (1 - utilisation) * (self._clock - 1)

    def doubt(self, resource: Resource, law: Law, utilisation: float) -> float:
        """Half-width of the interval around a scaled term, as a logarithm; 0 for the product that was measured."""
        if self.source.sku == self.target.sku:
            return 0.0
        base = _ANOTHER_PART if self.same_architecture else _ANOTHER_ARCHITECTURE
        if resource is Resource.CLOCK:
            return base + _CLOCK_EXPONENT * abs(float(np.log(self._clock)))
        if resource is Resource.MEMORY:
            return base + _MEMORY_EXPONENT * abs(float(np.log(self._memory)))
        if not self.same_architecture:
            return _ANOTHER_KERNEL[law in _OVER_WORKSPACE]
        # The two parts of a wave are added, as if one waited for the other; at the other end they overlap in full.
        overlapped = max(utilisation * self._tensor, self._clock)
        return base + abs(float(np.log(self._per_sm(law, utilisation) / overlapped)))

    def chip(self) -> Chip:
        """The device that the scaled basis is for."""
        return Chip(
            int(self.target.sm_count.value),
            L2_BYTES * self.target.l2_bytes.value / self.source.l2_bytes.value,
            int(self.source.sm_count.value),
            None if self.always_splits else self.target.architecture,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ScaledStage:
    """The curve of one stage on the target."""

    curve: Curve
    measured_error: float
    """What the measured curve is off by at points that were left out of it."""
    doubt: float
    """What scaling adds: that of each term, weighted by the time that the term takes on the target, at the measured
    shape where that is most."""


def scale_stage(scaling: Scaling, site: Site, stage: Stage, measured: Curve, error: float, load: Work) -> ScaledStage:
    """``measured`` on the target of ``scaling``.

    ``error`` is the measured curve's own, ``load`` the work of the shapes that it was measured at.
    """
    utilisation = tensor_utilisation(scaling.source, site, measured, load) if stage.name == "attention" else 0.0
    target = basis(site, stage.law, scaling.chip())
    pieces = len(measured.coefficients) // len(target.resources)  # a law with a break has every term twice
    resources = target.resources * pieces
    factors = [scaling.factor(resource, stage.law, utilisation) for resource in resources]
    curve = replace(
        measured,
        basis=target,
        coefficients=tuple(c * factor for c, factor in zip(measured.coefficients, factors, strict=True)),
        floor_us=measured.floor_us * scaling.factor(Resource.CLOCK, stage.law, utilisation),
    )
    doubts = [scaling.doubt(resource, stage.law, utilisation) for resource in resources]
    doubt = float(np.einsum("ij,i->j", _shares(curve, load), np.array(doubts)).max())
    return ScaledStage(curve, error, doubt)


def tensor_utilisation(source: Datasheet, site: Site, attention: Curve, load: Work) -> float:
    """The highest share of the tensor peak that an attention kernel reaches at the shapes of ``load``, at most 1.

    A query of one head costs 2 * (d_qk + d_v) floating point operations for each entry that it attends to.
    """
    flops = 2.0 * (_D_QK.get(site.layer, _D_V) + _D_V) * (site.h_q or 0) * load.num_qo_tokens * load.attended
    tflops = flops / attention.latency_us(load) / 1e6
    return min(float(tflops.max()) / source.bf16_tflops.value, 1.0)


def _shares(curve: Curve, load: Work) -> Array:
    """Share of each term in the law's time at the shapes of ``load``; (num_terms, num_shapes)."""
    terms = terms_of(curve.basis, load, curve.break_at)
    parts_us = np.stack([c * term for c, term in zip(curve.coefficients, terms, strict=True)])
    sums_us = np.maximum(parts_us.sum(axis=0), 1e-300)  # a law may be its floor alone
    return np.asarray(parts_us / sums_us)
