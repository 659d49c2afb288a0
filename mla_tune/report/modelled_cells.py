"""A modelled policy has no points: what its scaled curves predict on a grid, and where they cannot say who is faster."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from mla_tune.fit.costs import CostModel
from mla_tune.fit.scope import Scope
from mla_tune.fit.work import work
from mla_tune.policy.evidence import TableEvidence
from mla_tune.policy.schema import Table
from mla_tune.report.measured_points import significant
from mla_tune.sites.shape import Shape


class ModelledCell(msgspec.Struct, frozen=True, array_like=True):
    """One shape of the grid."""

    num_reqs: int
    num_qo_tokens: int
    kv_tokens: int
    fastest: int
    """Index of the candidate with the least predicted cost."""
    undecided: bool
    """It differs from the engine's default by less than both predictions may be off."""
    latencies_us: tuple[float, ...]
    """Predicted, by candidate."""


def modelled_cells(
    costs: CostModel, table: Table, where: Scope, evidence: TableEvidence | None, num_reqs: tuple[int, int]
) -> tuple[ModelledCell, ...]:
    """Shapes an octave apart along both axes, of as many requests as lie in the middle of ``num_reqs``."""
    shapes = _grid(table, where.model.max_context, round(float(np.sqrt(num_reqs[0] * num_reqs[1]))))
    if not shapes:
        return ()
    works = [work(site, shapes) for site, _ in where.parts]
    predicted = np.stack([where.predicted_us(costs, name, works) for name in table.candidates])
    band = evidence.noise_band if evidence else 0.0
    return tuple(_cell(shape, table, column, band) for shape, column in zip(shapes, predicted.T.tolist(), strict=True))


def _cell(shape: Shape, table: Table, latencies_us: Sequence[float], band: float) -> ModelledCell:
    default = table.candidates.index(table.incumbent)
    fastest = min(range(len(latencies_us)), key=lambda index: (latencies_us[index], index != default))
    others = [us for index, us in enumerate(latencies_us) if index != default]
    ratio = latencies_us[default] / min(others) if others else 1.0
    return ModelledCell(
        shape.num_reqs,
        shape.num_qo_tokens,
        shape.kv_tokens,
        fastest,
        bool(others) and 1 / (1 + band) < ratio < 1 + band,
        tuple(significant(us) for us in latencies_us),
    )


def _grid(table: Table, max_context: int, num_reqs: int) -> list[Shape]:
    """Powers of two inside the measured range that a forward of so many requests can have."""
    queries, contexts = (
        [1 << octave for octave in range(63) if low <= 1 << octave <= high]
        for low, high in (table.measured.num_qo_tokens, table.measured.kv_tokens)
    )
    return [
        Shape(num_reqs, qo, kv) for qo in queries for kv in contexts if num_reqs <= qo <= kv <= max_context * num_reqs
    ]
