"""Made-up measurements from a known cost model: the tests' generator, nothing that was ever timed.

The laws have the form of the real kernels (staircases in waves, a fixed cost per launch, rows to dequantize) with round
coefficients, and an effect that no basis knows: misses that grow with the pool.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from mla_tune.hardware.sku import Environment
from mla_tune.policy.schema import Source
from mla_tune.sites.candidates import names_at, stages
from mla_tune.sites.shape import Shape, workload
from mla_tune.sites.site import MODELS, LayerType, ModelConfig, Site, SiteName
from mla_tune.sites.stages import Amortization
from mla_tune.store.measurement import PER_FORWARD_TOTAL, PER_LAYER_TOTAL, Measurement, Outcome, Regime, Role

FLASH = MODELS["deepseek-v4-flash"]
V3_2 = MODELS["deepseek-v3.2"]
C4A = FLASH.site(SiteName.PREFILL_ATTENTION, LayerType.C4A)
METADATA = FLASH.site(SiteName.INDEXER_METADATA, LayerType.C4A)
ENVIRONMENT = Environment("nvidia-h200", 132, 232448, "580.0", "13.0", "2.11.0", "3.6.0", ())
SOURCE = Source(file="db/nvidia-h200.jsonl", sha256="0" * 64, measurements=1, command="mla-tune fit --gpu h200")

StageLaw = Callable[[Site, str, str, Shape], float]
"""``law(site, candidate, stage, shape)`` -> microseconds."""


def stage_us(site: Site, candidate: str, stage: str, shape: Shape) -> float:
    """The default law of every stage."""
    load = workload(site, shape)
    tokens = shape.num_qo_tokens
    tiles = math.ceil(load.attended / 64)
    waves = math.ceil(tokens * (site.h_q or 64) / 64 / ENVIRONMENT.sm_count)
    misses = 1 + 0.3 * load.rows / (load.rows + 4e4)
    if stage == "attention" and candidate.startswith("sparse_fwd"):
        return 8 + waves * (2 + 1.9 * tiles) * misses
    if stage == "attention":
        return 12 + 0.02 * tokens + tokens * (site.h_q or 64) / 64 * tiles * 3.1 / 132 * misses
    if stage == "schedule":
        return 12 + 0.065 * tokens + (10_000 if tokens > 19371 else 0)
    if stage == "metadata":
        return 19 + 0.0042 * tokens if candidate == "deep_gemm" else 6 + 0.0002 * tokens
    if stage == "topk_transform":
        return 4 + tokens * load.compressed_rows / shape.num_reqs * (3e-6 if candidate == "sparse_fwd" else 2e-6)
    rows = load.compressed_rows if stage in ("row_ids", "dequantize_compressed") else load.window_rows
    scale = {"dequantize_compressed": 4.5e-4, "dequantize_window": 4.5e-4, "row_ids": 3e-6, "window_ids": 1e-5}
    if stage in ("mark", "compact", "dequantize_selected"):
        scale_of = {"mark": 0.0, "compact": 1e-6, "dequantize_selected": 4.5e-4}
        counted = load.compressed_rows if stage == "compact" else load.distinct_rows
        return 3 + scale_of[stage] * counted + (1e-5 * tokens * load.selection_width if stage == "mark" else 0)
    if stage == "prepare":
        return 4 + 4.7e-4 * load.rows + 8e-6 * tokens * load.index_width
    if stage == "combine":
        return 3 + tokens * load.index_width * 8e-6
    return 3 + scale[stage] * rows


@dataclass
class World:
    """What the made-up device does."""

    law: StageLaw = stage_us
    noise: float = 0.0
    """Standard deviation of the logarithm of every timing."""
    launch_gap_us: float = 1.0
    """What the whole path takes beyond each of its stages."""
    failures: dict[tuple[str, int], tuple[Outcome, str]] = field(default_factory=dict)
    """(candidate, query tokens from which it fails) -> outcome and detail."""
    regime: Regime = Regime.GRAPH
    not_measured: tuple[str, ...] = ("sparse_fwd_fused", "sparse_fwd_selected")
    """Candidates that the device lacks: most laws here are of two candidates."""

    def measure(self, site: Site, shapes: Iterable[Shape], role: Role = Role.FIT) -> Iterator[Measurement]:
        for shape in shapes:
            for candidate in (name for name in names_at(site) if name not in self.not_measured):
                yield from self._measure_candidate(site, shape, role, candidate)

    def _measure_candidate(self, site: Site, shape: Shape, role: Role, candidate: str) -> Iterator[Measurement]:
        for (name, tokens), (outcome, detail) in self.failures.items():
            if name == candidate and shape.num_qo_tokens >= tokens:
                yield Measurement(site, shape, role, candidate, PER_FORWARD_TOTAL, self.regime, outcome, detail)
                return
        totals: dict[str, float] = {}
        for stage in stages(site, candidate):
            us = self.law(site, candidate, stage.name, shape)
            yield self._timed(site, shape, role, candidate, stage.name, us)
            total = PER_LAYER_TOTAL if stage.amortization is Amortization.PER_LAYER else PER_FORWARD_TOTAL
            totals[total] = totals.get(total, 0.0) + us + self.launch_gap_us
        for total, us in totals.items():
            yield self._timed(site, shape, role, candidate, total, us)

    def _timed(self, site: Site, shape: Shape, role: Role, candidate: str, part: str, us: float) -> Measurement:
        seed = f"{site.key} {shape} {candidate} {part}"
        us *= math.exp(random.Random(seed).gauss(0, self.noise)) if self.noise else 1.0
        ci = (us * 0.998, us * 1.002)
        return Measurement(site, shape, role, candidate, part, self.regime, Outcome.OK, "", us, *ci, num_samples=21)


def fit_shapes(model: ModelConfig = FLASH) -> list[Shape]:
    """A structured grid like a sweep's."""
    tokens = sorted({1 << n for n in range(16)} | {131, 132, 133, 264, 265, 528, 529})
    shapes = {Shape(1, q, 131072) for q in tokens}
    contexts = (
        (1, 1024),
        (1, 8192),
        (1, model.max_context),
        (8, 32768),
        (16, 131072),
        (64, 4096),
        (64, model.max_context),
    )
    for num_reqs, context in contexts:
        for q in (16, 64, 256, 1024, 4096, 16384):
            if num_reqs <= q <= num_reqs * context:
                shapes.add(Shape(num_reqs, q, num_reqs * context))
    return sorted(shapes)


def held_out_shapes(count: int = 30, model: ModelConfig = FLASH, seed: int = 0) -> list[Shape]:
    """Random shapes, log-uniform on each axis."""
    rng = random.Random(seed)
    shapes: set[Shape] = set()
    while len(shapes) < count:
        num_reqs = round(64 ** rng.random())
        kv_tokens = num_reqs * round(2048 * (model.max_context / 2048) ** rng.random())
        tokens = round(16 * 2048 ** rng.random())
        if num_reqs <= tokens <= kv_tokens:
            shapes.add(Shape(num_reqs, tokens, kv_tokens))
    return sorted(shapes)


def sweep(world: World, sites: Iterable[Site], held_out: int = 30, model: ModelConfig = FLASH) -> list[Measurement]:
    """Everything a sweep of ``sites`` would store."""
    found: list[Measurement] = []
    for site in sites:
        found += world.measure(site, fit_shapes(model))
        found += world.measure(site, held_out_shapes(held_out, model), Role.HELD_OUT)
    return found


def attention_sites(model: ModelConfig = FLASH) -> list[Site]:
    """The attention sites of a model with its own heads."""
    return [model.site(SiteName.PREFILL_ATTENTION, layer) for layer in model.site_layers(SiteName.PREFILL_ATTENTION)]
