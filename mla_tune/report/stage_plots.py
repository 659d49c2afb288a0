"""The cost curve of every stage: what was timed, what the fit makes of it along one line of shapes, and the roofline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from mla_tune.fit.costs import CostModel
from mla_tune.fit.modelled import ModelledCosts
from mla_tune.fit.observations import Observations
from mla_tune.fit.work import Array, work
from mla_tune.hardware.datasheet import DATASHEETS, Datasheet
from mla_tune.report.measured_points import MeasuredCost, significant
from mla_tune.report.roofline import MEASURED_COPY_GBPS, LeastWork, least_work
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Site
from mla_tune.sites.stages import Amortization, Law, Stage
from mla_tune.store.measurement import Role

REFERENCE_CONTEXT = 131072
"""Context tokens of the one request along which stages that depend on query tokens are drawn."""
_REFERENCE_QUERIES = 64
"""Its query tokens where the context varies instead."""
_STEPS_AN_OCTAVE = 2
_MOST_QUERIES = 65536
_MOST_CONTEXT = 1 << 26


class StagePoint(msgspec.Struct, frozen=True, array_like=True):
    """One timing of one stage."""

    size: float
    """What the stage's time depends on most; see :attr:`StagePlot.axis`."""
    cost: MeasuredCost
    shape: tuple[int, int, int]
    """Requests, query tokens, context tokens."""


class CurvePoint(msgspec.Struct, frozen=True, array_like=True):
    """The fitted curve at one shape."""

    size: float
    latency_us: float
    roofline_us: float | None
    """At the datasheet's figures; None for a stage without a line."""
    copy_us: float | None
    """At the bandwidth of a measured copy, of a stage that only moves bytes on a GPU where one was measured."""


class StagePlot(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of one candidate at one site."""

    site: str
    layer: str
    candidate: str
    stage: str
    run_by: str
    """Whose kernel runs it."""
    often: str
    """How often it runs."""
    axis: str
    """What the horizontal axis counts."""
    along: str
    """The shapes of the curve, in words."""
    points: tuple[StagePoint, ...]
    """Empty where the curve is scaled from another GPU's."""
    curve: tuple[CurvePoint, ...]
    error: float
    """Half-width of the interval around the curve, as a logarithm: its errors at points that were left out of it, and what
    scaling adds."""


@dataclass(frozen=True, slots=True)
class _Axis:
    """What a law is drawn over."""

    words: str
    column: str
    """Of :class:`mla_tune.fit.work.Work`."""
    over_context: bool = False


_QUERIES = _Axis("query tokens", "num_qo_tokens")
_AXES = {
    Law.COMPRESSED_ROWS: _Axis("cache rows dequantized", "compressed_rows", over_context=True),
    Law.WINDOW_ROWS: _Axis("window rows dequantized", "window_rows"),
    Law.SELECTED_ROWS: _Axis("selected rows dequantized", "distinct_rows"),
    Law.PREPARE: _Axis("cache rows dequantized", "rows", over_context=True),
    Law.COMPACT: _Axis("cache rows looked through", "compressed_rows", over_context=True),
    Law.TOPK_TRANSFORM: _QUERIES,
}
_OFTEN = {
    Amortization.PER_LAYER: "in every layer",
    Amortization.PER_LAYER_TYPE: "once for all layers of a type",
    Amortization.PER_FORWARD: "once a forward",
}


def stage_plots(costs: CostModel, sites: list[Site], candidates: tuple[str, ...]) -> tuple[StagePlot, ...]:
    """Every stage of ``candidates`` at ``sites``, in running order."""
    sheet = next((sheet for sheet in DATASHEETS if sheet.sku == costs.environment.sku), None)
    found: list[StagePlot] = []
    for site in sites:
        for name in costs.candidates(site):
            if name in candidates:
                found += _of_candidate(costs, site, name, sheet)
    return tuple(found)


def _of_candidate(costs: CostModel, site: Site, name: str, sheet: Datasheet | None) -> Iterator[StagePlot]:
    scaled = costs.stages(site, name) if isinstance(costs, ModelledCosts) else {}
    for path in costs.costs(site, name).paths:
        for stage, curve in path.stages:
            axis = _AXES.get(stage.law, _QUERIES)
            load = work(site, _reference(axis))
            sizes: Array = getattr(load, axis.column)
            modelled = scaled.get(stage.name)
            error = modelled.measured_error + modelled.doubt if modelled else costs.stage_error(site, name, stage).mean
            yield StagePlot(
                site=site.key,
                layer=site.layer,
                candidate=name,
                stage=stage.name,
                run_by=stage.run_by(site),
                often=_OFTEN[stage.amortization],
                axis=axis.words,
                along=_words(axis),
                points=() if modelled else tuple(_points(costs.observations, site, name, stage, axis)),
                curve=_curve(sizes, curve.latency_us(load), least_work(site, stage, load), sheet),
                error=significant(error),
            )


def _reference(axis: _Axis) -> list[Shape]:
    """One request along which only one of query tokens and context grows."""
    low, high = (_REFERENCE_QUERIES, _MOST_CONTEXT) if axis.over_context else (1, _MOST_QUERIES)
    octaves = np.arange(np.log2(low), np.log2(high) + 1e-9, 1 / _STEPS_AN_OCTAVE)
    counts = sorted({round(2.0**octave) for octave in octaves})
    if axis.over_context:
        return [Shape(1, _REFERENCE_QUERIES, count) for count in counts]
    return [Shape(1, count, max(REFERENCE_CONTEXT, count)) for count in counts]


def _words(axis: _Axis) -> str:
    if axis.over_context:
        return f"one request with {_REFERENCE_QUERIES} query tokens and a growing context"
    return f"one request with {REFERENCE_CONTEXT >> 10}K of context and growing query tokens"


def _curve(sizes: Array, latency_us: Array, least: LeastWork | None, sheet: Datasheet | None) -> tuple[CurvePoint, ...]:
    roofline_us = least.time_us(sheet).tolist() if least and sheet else [None] * len(sizes)
    copy = MEASURED_COPY_GBPS.get(sheet.sku) if sheet else None
    copy_us = least.copied_us(copy).tolist() if least and copy and not least.flops.any() else [None] * len(sizes)
    by_size = {
        significant(size): CurvePoint(significant(size), significant(us), _bound(roofline), _bound(copied))
        for size, us, roofline, copied in zip(sizes.tolist(), latency_us.tolist(), roofline_us, copy_us, strict=True)
        if size > 0 and us > 0
    }
    return tuple(by_size[size] for size in sorted(by_size))


def _bound(us: float | None) -> float | None:
    return None if us is None else significant(us)


def _points(observations: Observations, site: Site, name: str, stage: Stage, axis: _Axis) -> Iterator[StagePoint]:
    shapes = [shape for role in Role for shape in observations.shapes(site, role)]
    timed = [
        (shape, row)
        for shape in sorted(shapes)
        if (row := observations.part(site, name, shape, stage.name)) is not None and (row.latency_us or 0) > 0
    ]
    if not timed:
        return
    sizes: Array = getattr(work(site, [shape for shape, _ in timed]), axis.column)
    for (shape, row), size in zip(timed, sizes.tolist(), strict=True):
        if size > 0:
            us = row.latency_us or 0.0
            low, high = (us if end is None else end for end in (row.ci_low_us, row.ci_high_us))
            yield StagePoint(
                significant(size),
                MeasuredCost(significant(us), significant(low), significant(high)),
                (shape.num_reqs, shape.num_qo_tokens, shape.kv_tokens),
            )
