"""How long a sweep may take, for ``--dry-run``: bytes and operations over nominal rates, plus a fixed cost a point."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mla_tune.bench.sampling import MIN_SAMPLES
from mla_tune.sites.shape import workload
from mla_tune.sites.site import LayerType, SiteName
from mla_tune.sweep.grid import Point, attention_flops

_CALLS = 4 * MIN_SAMPLES
"""Attention calls a point at least: each candidate's attention alone and within its path, in both regimes."""


@dataclass(frozen=True, slots=True)
class _Rates:
    """Nominal rates of a device class: for an estimate only, nothing is decided by them."""

    seconds_per_point: float
    """Inputs, reference, first calls, graph captures."""
    flops_per_s: float
    bytes_per_s: float


_RATES = {"cuda": _Rates(0.35, 4e14, 3e12), "cpu": _Rates(0.2, 4e10, 2e9)}


def estimated_seconds(points: Iterable[Point], kind: str) -> float:
    """Rough wall time of measuring ``points`` on a ``cpu`` or ``cuda`` device."""
    return sum(_seconds(point, _RATES[kind]) for point in points)


def _seconds(point: Point, rates: _Rates) -> float:
    if point.site.name is SiteName.INDEXER_METADATA:
        return rates.seconds_per_point
    work = workload(point.site, point.shape)
    row_bytes = 656 + 1152 if point.site.layer is LayerType.DSA else 584 + 1024
    device_s = attention_flops(point.site, point.shape) / rates.flops_per_s + work.rows * row_bytes / rates.bytes_per_s
    return rates.seconds_per_point + _CALLS * device_s
