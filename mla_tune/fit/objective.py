"""What a fit minimizes: whose time, whose traffic, and within which workspace.

Without wishes a table answers for shapes spread evenly over the logarithm of each axis. Recorded traffic weighs them: a
shape counts by the density of traffic around it over the density of the shapes there, so that traffic spread like the
shapes changes nothing, and :data:`UNIFORM_SHARE` of the weight stays evenly spread, so that what a server never met yet
keeps a sane answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mla_tune.errors import FitError
from mla_tune.fit.observations import Observations
from mla_tune.fit.training import IntArray, cells_of, query_counts
from mla_tune.fit.work import Array
from mla_tune.policy.evidence import TrafficWeights
from mla_tune.policy.schema import Range, Table
from mla_tune.sites.served_shapes import ServedShape, Traffic, dump_traffic
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import SiteName
from mla_tune.store.measurement import Regime

UNIFORM_SHARE = 0.1
"""Part of the weight that stays evenly spread. No optimum: with traffic at two shapes alone, the held-out points of an
H200's c4a and dsa tables lose 1.002 on average at most with 0.02, 0.1 and 0.3 alike, against 1.000 without weights."""
_WEIGHT_STEP = 1 / 1024
"""Weights are rounded to it, so that they depend neither on the order of a sum nor on a library's rounding."""

Cells = tuple[IntArray, IntArray, IntArray]
"""Bin of context tokens, column of query tokens and range of requests of each shape, as :func:`cells_of` gives them."""


@dataclass(frozen=True, slots=True)
class Objective:
    """The wishes of one fit; none of them by default."""

    regime: Regime | None = None
    """Whose time: of the GPU alone, or with the host's; None for the GPU's where it was measured."""
    traffic: Traffic | None = None
    max_workspace_bytes: int | None = None

    def stated(self) -> TrafficWeights | None:
        """What a policy says of its traffic."""
        if self.traffic is None:
            return None
        digest = hashlib.sha256(dump_traffic(self.traffic)).hexdigest()
        return TrafficWeights(traffic=digest, forwards=sum(self.traffic.forwards.values()), uniform_share=UNIFORM_SHARE)

    def recorded(self, site: SiteName, model: str) -> dict[ServedShape, int]:
        """Forwards of the traffic at one site of one model, by shape; those without a token or a request left out."""
        forwards = self.traffic.forwards if self.traffic else {}
        return {
            shape: count
            for shape, count in forwards.items()
            if (shape.site, shape.model) == (site, model) and min(shape[2:]) >= 1
        }


PLAIN = Objective()
"""No wishes: the GPU's time where it was measured, over evenly spread shapes."""


def require_regime(observations: Observations) -> None:
    """Raises :class:`FitError` where nothing was timed in the regime that was asked for."""
    if observations.regimes and observations.regime not in observations.regimes:
        accepted = ", ".join(sorted(observations.regimes))
        raise FitError(
            f"--regime must be one that was measured: got {observations.regime}, which none of {observations.measurements} "
            f"measurements has; accepted here: {accepted}; next: sweep on a machine that measures it, or leave it out"
        )


def require_traffic(objective: Objective, tables: Iterable[Table]) -> None:
    """Raises :class:`FitError` for traffic none of which lies where a row of any of ``tables`` decides."""
    if objective.traffic is None:
        return
    tables = list(tables)
    if not any(inside(objective.recorded(SiteName(t.site), t.model), t.measured) for t in tables):
        met = sorted({f"{shape.site} of {shape.model}" for shape in objective.traffic.forwards})
        raise FitError(
            f"--traffic must have a forward inside the measured ranges of a table: got {', '.join(met[:4]) or 'none'}; "
            f"accepted: {', '.join(sorted({f'{t.site} of {t.model}' for t in tables}))}; next: record another"
        )


def inside(recorded: Mapping[ServedShape, int], measured: Range) -> dict[ServedShape, int]:
    """Those of ``recorded`` at which a table's rows decide: outside its ranges the incumbent stays whatever they say."""
    return {
        shape: count
        for shape, count in recorded.items()
        if measured.holds(shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs)
    }


def cell_weights(recorded: Mapping[ServedShape, int], cells: Cells, tokens: Sequence[int]) -> Array:
    """(num_shapes,) weights of the shapes in ``cells``, of mean 1; all 1 where no traffic is near any of them.

    ``tokens`` are the query token counts of the columns.
    """
    there = _counted(cells, None, cells, tokens)
    near_there = _blurred(there)
    near = _near_traffic(recorded, cells, tokens)
    density = np.divide(near, near_there, out=np.zeros_like(near), where=near_there > 0)
    total = float((there * density).sum())
    if not total:
        return np.ones(len(cells[0]))
    even = UNIFORM_SHARE + (1 - UNIFORM_SHARE) * density * (len(cells[0]) / total)
    return np.asarray(np.rint(even[_at(cells, cells)] / _WEIGHT_STEP) * _WEIGHT_STEP)


def shape_weights(recorded: Mapping[ServedShape, int], shapes: Sequence[Shape], sm_count: int) -> Array:
    """(num_shapes,) the same for any shapes, on a GPU of ``sm_count`` SMs."""
    if not (recorded and shapes):
        return np.ones(len(shapes))
    tokens = query_counts(sm_count)
    return cell_weights(recorded, cells_of(shapes, tokens), tokens)


def shares_near(recorded: Mapping[ServedShape, int], shapes: Sequence[Shape], sm_count: int) -> Array:
    """(num_shapes,) share of the traffic near each shape, with nothing spread evenly: 0 where none is."""
    if not (recorded and shapes):
        return np.zeros(len(shapes))
    tokens = query_counts(sm_count)
    cells = cells_of(shapes, tokens)
    return np.asarray(_near_traffic(recorded, cells, tokens)[_at(cells, cells)])


def _near_traffic(recorded: Mapping[ServedShape, int], cells: Cells, tokens: Sequence[int]) -> Array:
    """Share of the traffic near each cell of the box that ``cells`` span; what lies beyond it counts at its edge."""
    if not recorded:
        return np.zeros(_box(cells, tokens))
    counts = np.array(list(recorded.values()), dtype=np.float64)
    return _blurred(_counted(cells_of(list(recorded), tokens), counts, cells, tokens)) / float(counts.sum())


def _box(cells: Cells, tokens: Sequence[int]) -> tuple[int, int, int]:
    bins, _, groups = cells
    return int(bins.max() - bins.min()) + 1, len(tokens), int(groups.max() - groups.min()) + 1


def _at(cells: Cells, box: Cells) -> Cells:
    """Indices of ``cells`` in the box that others span, those outside moved to its edge."""
    (bins, columns, groups), (box_bins, _, box_groups) = cells, box
    return (
        bins.clip(box_bins.min(), box_bins.max()) - box_bins.min(),
        columns,
        groups.clip(box_groups.min(), box_groups.max()) - box_groups.min(),
    )


def _counted(cells: Cells, counts: Array | None, box: Cells, tokens: Sequence[int]) -> Array:
    """How many of ``cells`` each cell of the box has, (num_bins, num_columns, num_groups)."""
    found = np.zeros(_box(box, tokens))
    np.add.at(found, _at(cells, box), 1.0 if counts is None else counts)
    return found


def _blurred(cells: Array) -> Array:
    """Half of each cell and a quarter of either neighbour, axis by axis.

    Neighbours are half an octave of context, a sixth of one of query tokens, and twice or half the requests away.
    """
    for axis in range(cells.ndim):
        padded = np.pad(cells, [(1, 1) if axis == other else (0, 0) for other in range(cells.ndim)])
        before, here, after = (np.take(padded, range(i, i + cells.shape[axis]), axis) for i in range(3))
        cells = (before + 2 * here + after) / 4
    return cells
