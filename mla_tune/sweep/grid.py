"""Which points a sweep measures: a structured grid for the fit, and random held-out shapes to judge it by.

A candidate's cost is a sum of stages, each nearly a function of one or two variables, so the grid is a few axes and not a
dense product: query tokens finely at one context, coarsely at contexts and request counts that span the rest, and the
chunked prefill of one long prompt. Held-out shapes are drawn evenly over the logarithm of each axis; all layer types of a
model family get the same ones, so that a whole forward can be judged too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from mla_tune.sites.kernel_switches import switch_contexts
from mla_tune.sites.shape import AnyShape, RaggedShape, Shape, workload
from mla_tune.sites.site import MODELS, LayerType, ModelConfig, Site, SiteName, attention_sites
from mla_tune.store.measurement import Role


@dataclass(frozen=True, slots=True)
class Point:
    """One site at one shape, and what it is measured for."""

    site: Site
    shape: Shape
    role: Role = Role.FIT
    ragged: RaggedShape | None = None
    """Unequal requests of the same three integers, to build inputs of instead; measurements are filed under ``shape``."""

    @property
    def built(self) -> AnyShape:
        """What inputs are built of."""
        return self.ragged or self.shape


@dataclass(frozen=True, slots=True)
class Grid:
    """The axes of a sweep. ``contexts`` are (num_reqs, tokens per request)."""

    dense_context: tuple[int, int]
    dense_query_tokens: tuple[int, ...]
    contexts: tuple[tuple[int, int], ...]
    query_tokens: tuple[int, ...]
    seeds: tuple[tuple[int, int, tuple[int, ...]], ...]
    """What an adaptive sweep starts from, as (num_reqs, tokens per request, query tokens): the corners and one axis."""
    indexer_seeds: tuple[int, ...]
    prompt: int
    """Length of the prompt whose chunked prefill is measured; 0 for none."""
    chunks: tuple[int, ...]
    indexer_query_tokens: tuple[int, ...]
    indexer_contexts: tuple[tuple[int, int], ...]
    held_out: int
    """Random shapes per attention site."""
    held_out_indexer: int
    held_out_requests: int
    """Most requests of a held-out shape; with the two ranges below it stays inside what the fit points cover."""
    held_out_query_tokens: tuple[int, int]
    held_out_context: tuple[int, int]
    max_attention_flops: float
    """Points whose attention alone costs more are left out: on a slow device they would eat the whole budget."""
    architecture: str | None = None
    """Of the GPU, where kernels change with the width of a selection; see :mod:`mla_tune.sites.kernel_switches`."""


_K = 1024
_SWITCH_QUERY_TOKENS = (64, 4096)
"""Query tokens of the seeds on both sides of a change of kernels: one where launches count, one of full waves."""
_POOL_PER_OCTAVE = 4
"""Query token counts an octave to choose from: a fifth apart, which is less than a threshold's bracket."""


def gpu_grid(sm_count: int, architecture: str | None = None) -> Grid:
    """The grid of a GPU, ``architecture`` as :func:`mla_tune.hardware.datasheet.architecture` names it.

    Multiples of the SM count, plus and minus one, are where the attention kernels' waves begin.
    """
    waves = [sm_count * n + d for n in (1, 2, 4) for d in (-1, 0, 1)]
    # Half octaves where a crossover is likely, and where schedulers of some builds change their ways.
    halves = [round(2 ** (n + 0.5)) for n in (7, 8, 9, 13, 14)]
    return Grid(
        dense_context=(1, 128 * _K),
        dense_query_tokens=tuple(sorted([1 << n for n in range(16)] + waves + halves)),
        contexts=(
            *((1, context * _K) for context in (1, 8, 1024)),
            *((4, context * _K) for context in (16,)),
            *((16, context * _K) for context in (2, 128)),
            *((64, context * _K) for context in (4, 32, 1024)),
        ),
        query_tokens=(16, 64, 256, 1024, 4096, 16384),
        seeds=(
            (1, 128 * _K, (1, 64, sm_count, 512, 4096, 32 * _K)),
            (1, _K, (16,)),
            (1, _K * _K, (16, 4096)),
            (16, 128 * _K, (256,)),
            (64, 4 * _K, (64, 4096)),
            (64, 32 * _K, (64,)),
            (64, _K * _K, (64, 16 * _K)),
        ),
        indexer_seeds=(1, 256, 8192, 32 * _K),
        prompt=128 * _K,
        chunks=tuple(_K << n for n in range(7)),
        indexer_query_tokens=(1, 16, 64, 256, 1024, 4096, 8192, 11673, 14336, 15360, 32768),
        indexer_contexts=((1, _K), (1, 128 * _K), (64, _K * _K)),
        held_out=36,
        held_out_indexer=6,
        held_out_requests=64,
        held_out_query_tokens=(16, 32 * _K),
        held_out_context=(2 * _K, _K * _K),
        max_attention_flops=float("inf"),
        architecture=architecture,
    )


def cpu_grid() -> Grid:
    """Small shapes that two cores sweep in a few minutes."""
    return Grid(
        dense_context=(1, 8 * _K),
        dense_query_tokens=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64),
        contexts=((1, _K), (1, 32 * _K), (2, 4 * _K), (4, 2 * _K), (4, 16 * _K)),
        query_tokens=(1, 4, 16, 64),
        seeds=(
            (1, 8 * _K, (1, 4, 16, 64)),
            (1, _K, (4, 64)),
            (1, 32 * _K, (1, 16)),
            (4, 2 * _K, (8, 64)),
            (4, 16 * _K, (4,)),
        ),
        indexer_seeds=(1, 16, 256, 4096, 16384),
        prompt=0,
        chunks=(),
        indexer_query_tokens=(1, 16, 256, 4096, 16384),
        indexer_contexts=((1, _K), (1, 8 * _K), (4, 16 * _K)),
        held_out=10,
        held_out_indexer=6,
        held_out_requests=4,
        held_out_query_tokens=(1, 64),
        held_out_context=(_K, 16 * _K),
        max_attention_flops=4e9,
    )


def attention_flops(site: Site, shape: Shape) -> float:
    """Floating-point operations of the two products: 2 * queries * attended * heads * (head_dim + 512)."""
    head_dim = 576 if site.layer is LayerType.DSA else 512
    return 2.0 * shape.num_qo_tokens * workload(site, shape).attended * (site.h_q or 0) * (head_dim + 512)


def grid_points(grid: Grid, models: Iterable[ModelConfig], names: Iterable[SiteName], seed: int) -> list[Point]:
    """Every point once, the widest coverage first, so that a budget that ends early still supports a policy.

    The coarse axes come first, mixed with the held-out shapes, then the dense axis with the chunked prefill; within each,
    shapes in a fixed random order, and the sites take turns.
    """
    chosen = list(models)
    points: list[Point] = []
    if SiteName.INDEXER_METADATA in (wanted := set(names)):
        points += _indexer_points(grid, chosen, seed)
    if SiteName.PREFILL_ATTENTION in wanted:
        points += _attention_points(grid, chosen, seed)
    unique: dict[tuple[Site, Shape], Point] = {}
    for point in points:
        unique.setdefault((point.site, point.shape), point)
    return list(unique.values())


def seed_points(grid: Grid, models: Iterable[ModelConfig], names: Iterable[SiteName], seed: int) -> list[Point]:
    """What an adaptive sweep measures first: every site's seeds, then the shapes that it will be judged by.

    In this order a table whose seeds the budget does not cover has no judge either, and is left out.
    """
    few = replace(
        grid,
        contexts=(),
        query_tokens=(),
        dense_query_tokens=(),
        prompt=0,
        chunks=(),
        indexer_query_tokens=grid.indexer_seeds,
        max_attention_flops=float("inf"),
    )
    points = [
        point if point.role is Role.HELD_OUT else replace(point, shape=_affordable(grid, point.site, point.shape))
        for point in grid_points(few, models, names, seed)
    ]
    unique = {
        (point.site, point.shape): point
        for point in points
        if attention_flops(point.site, point.shape) <= grid.max_attention_flops
    }
    return sorted(unique.values(), key=lambda point: point.role is Role.HELD_OUT)


def validation_points(grid: Grid, models: Iterable[ModelConfig], seed: int, count: int) -> list[Point]:
    """``count`` fresh random shapes to judge a policy by, the attention sites in turns."""
    sites = attention_sites(models)
    each = replace(grid, held_out=-(-count // len(sites)))
    columns = [
        [
            Point(site, shape, Role.HELD_OUT)
            for shape in _random_shapes(each, model, each.held_out, seed, stream=site.key)
            if attention_flops(site, shape) <= grid.max_attention_flops
        ]
        for site, model in sites.items()
    ]
    return [point for row in _round_robin(columns) for point in row][:count]


def pool(grid: Grid, model: ModelConfig, site: Site) -> list[Shape]:
    """Shapes that an adaptive sweep may choose from at an attention site, regular on the logarithm of each axis."""
    low_q, high_q = grid.dense_query_tokens[0], grid.held_out_query_tokens[1]
    low_c, high_c = grid.held_out_context[0], min(grid.held_out_context[1], model.max_context)
    counts = _octaves(low_q, high_q, _POOL_PER_OCTAVE)
    contexts = [(r, c) for r in _octaves(1, grid.held_out_requests, 1) for c in _octaves(low_c, high_c, 1)]
    shapes = _product(contexts, counts, model)
    return [shape for shape in shapes if attention_flops(site, shape) <= grid.max_attention_flops]


def _octaves(low: int, high: int, per_octave: int) -> list[int]:
    steps = round(math.log2(high / low) * per_octave)
    return sorted({round(low * 2 ** (step / per_octave)) for step in range(steps + 1)})


def verification_points(models: Iterable[ModelConfig], names: Iterable[SiteName]) -> list[Point]:
    """Small shapes that every device can compare with the reference: one request and a ragged few, at every site."""
    points = [
        Point(model.site(name, layer, h_q if name is SiteName.PREFILL_ATTENTION else None), shape)
        for name in names
        for model in models
        for h_q in model.heads
        for layer in model.site_layers(name)
        for shape in (Shape(1, 1, 1), Shape(1, 33, 4097), Shape(5, 17, 23456))
    ]
    return list(dict.fromkeys(points))


def _attention_points(grid: Grid, models: list[ModelConfig], seed: int) -> list[Point]:
    sites = attention_sites(models)
    points = []
    for phase in ((_seeds, _coarse, _held_out), (_dense, _chunked)):
        rows: list[tuple[float, list[Point]]] = []
        for group in phase:
            role = Role.HELD_OUT if group is _held_out else Role.FIT
            columns = [
                [Point(s, shape, role) for shape in _mixed(group(grid, m, seed), seed)] for s, m in sites.items()
            ]
            if group is _seeds:
                columns = [
                    [*column, *_switches(grid, s, m)] for column, (s, m) in zip(columns, sites.items(), strict=True)
                ]
            turns = list(_round_robin(columns))
            rows += [((index + 0.5) / len(turns), row) for index, row in enumerate(turns)]
        points += [point for _, row in sorted(rows, key=lambda row: row[0]) for point in row]
    return [p for p in points if attention_flops(p.site, p.shape) <= grid.max_attention_flops]


def _affordable(grid: Grid, site: Site, shape: Shape) -> Shape:
    """``shape``, with as many query tokens as the grid's bound allows: seeds reach as far as any judge does."""
    share = grid.max_attention_flops / max(attention_flops(site, shape), 1.0)
    return shape if share >= 1 else replace(shape, num_qo_tokens=max(shape.num_reqs, int(shape.num_qo_tokens * share)))


def _mixed(shapes: list[Shape], seed: int) -> list[Shape]:
    return random.Random(seed).sample(shapes, len(shapes))


def _indexer_points(grid: Grid, models: list[ModelConfig], seed: int) -> list[Point]:
    points = []
    sites = {
        model.site(SiteName.INDEXER_METADATA, layer): model
        for model in models
        for layer in model.site_layers(SiteName.INDEXER_METADATA)
    }
    # One set of held-out shapes for all, whichever are swept: DeepGEMM compiles for seconds at each new count of rows.
    shortest = min(MODELS.values(), key=lambda model: model.max_context)
    # Ascending query tokens: a candidate that fails from some count up is then not tried above it.
    for tokens in grid.indexer_query_tokens:
        for site, model in sites.items():
            for contexts in grid.indexer_contexts:
                points += [Point(site, shape) for shape in _product([contexts], [tokens], model)]
    held_out = _random_shapes(grid, shortest, grid.held_out_indexer, seed, max_query_tokens=8192)
    points += [Point(site, shape, Role.HELD_OUT) for site in sites for shape in held_out]
    return points


def _seeds(grid: Grid, model: ModelConfig, seed: int) -> list[Shape]:
    return [shape for reqs, context, counts in grid.seeds for shape in _product([(reqs, context)], counts, model)]


def _switches(grid: Grid, site: Site, model: ModelConfig) -> list[Point]:
    """Seeds on both sides of every change of kernels: a law is one on either side, so neither may go unmeasured."""
    contexts = [(1, context) for context in switch_contexts(site, grid.architecture)]
    return [Point(site, shape) for shape in _product(contexts, _SWITCH_QUERY_TOKENS, model)]


def _coarse(grid: Grid, model: ModelConfig, seed: int) -> list[Shape]:
    return list(_product(grid.contexts, grid.query_tokens, model))


def _held_out(grid: Grid, model: ModelConfig, seed: int) -> list[Shape]:
    return _random_shapes(grid, model, grid.held_out, seed)


def _dense(grid: Grid, model: ModelConfig, seed: int) -> list[Shape]:
    return list(_product([grid.dense_context], grid.dense_query_tokens, model))


def _chunked(grid: Grid, model: ModelConfig, seed: int) -> list[Shape]:
    """One prompt in chunks: each chunk size at the prefix of its first, middle and last chunk."""
    steps = {chunk: grid.prompt // chunk for chunk in grid.chunks}
    return [Shape(1, c, step * c) for c, n in steps.items() for step in sorted({1, (n + 1) // 2, n})]


def _product(contexts: Iterable[tuple[int, int]], tokens: Iterable[int], model: ModelConfig) -> Iterator[Shape]:
    for num_reqs, context in contexts:
        kv_tokens = num_reqs * min(context, model.max_context)
        for count in tokens:
            if num_reqs <= count <= kv_tokens:
                yield Shape(num_reqs, count, kv_tokens)


def _random_shapes(
    grid: Grid,
    model: ModelConfig,
    count: int,
    seed: int,
    max_query_tokens: int | None = None,
    stream: str = "",
) -> list[Shape]:
    """``count`` shapes, log-uniform in requests, context and query tokens, within the model's context.

    Without a ``stream`` of its own a site shares one with all V4 models, or all of V3.2.
    """
    rng = random.Random(f"{seed}/{stream or model.layers[0][0].has_window}")
    low_q, high_q = grid.held_out_query_tokens
    low_c, high_c = grid.held_out_context
    shapes: list[Shape] = []
    while len(shapes) < count:
        num_reqs = round(_log_uniform(rng, 1, grid.held_out_requests))
        kv_tokens = num_reqs * round(_log_uniform(rng, low_c, min(high_c, model.max_context)))
        tokens = round(_log_uniform(rng, low_q, min(high_q, max_query_tokens or high_q)))
        if num_reqs <= tokens <= kv_tokens:
            shapes.append(Shape(num_reqs, tokens, kv_tokens))
    return shapes


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return float(low * (high / low) ** rng.random())


def _round_robin(columns: list[list[Point]]) -> Iterator[list[Point]]:
    for index in range(max((len(column) for column in columns), default=0)):
        yield [column[index] for column in columns if index < len(column)]
