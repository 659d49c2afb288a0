"""The work of many shapes at once, as columns: what the cost curves are functions of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from mla_tune.sites.shape import AnyShape, workload
from mla_tune.sites.site import Site

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One entry per shape in every column, all of shape (num_shapes,); see :class:`mla_tune.sites.shape.Workload`."""

    num_reqs: Array
    num_qo_tokens: Array
    kv_tokens: Array
    compressed_rows: Array
    window_rows: Array
    selected: Array
    window: Array
    selection_width: Array
    index_width: Array
    distinct_rows: Array

    @property
    def attended(self) -> Array:
        """Entries that one query attends to, mean over the queries."""
        return self.selected + self.window

    @property
    def rows(self) -> Array:
        """Rows of the bf16 workspace."""
        return self.compressed_rows + self.window_rows

    def where(self, mask: Mask) -> Work:
        """The entries of ``mask`` (num_shapes,) alone."""
        return Work(**{field.name: getattr(self, field.name)[mask] for field in fields(self)})


def work(site: Site, shapes: Sequence[AnyShape]) -> Work:
    """Columns for ``shapes`` in their order."""
    loads = [workload(site, shape) for shape in shapes]
    return Work(
        num_reqs=_column([s.num_reqs for s in shapes]),
        num_qo_tokens=_column([s.num_qo_tokens for s in shapes]),
        kv_tokens=_column([s.kv_tokens for s in shapes]),
        compressed_rows=_column([w.compressed_rows for w in loads]),
        window_rows=_column([w.window_rows for w in loads]),
        selected=_column([w.selected for w in loads]),
        window=_column([w.window for w in loads]),
        selection_width=_column([w.selection_width for w in loads]),
        index_width=_column([w.index_width for w in loads]),
        distinct_rows=_column([w.distinct_rows for w in loads]),
    )


def _column(values: Sequence[float]) -> Array:
    return np.array(values, dtype=np.float64)
