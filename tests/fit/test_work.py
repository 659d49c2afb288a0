"""The variables of the curves, and the grid that a table is learned on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.fit.training import bin_start, training_grid
from mla_tune.fit.work import work
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import MODELS, SWA_WINDOW, LayerType, Site, SiteName
from tests.fit.synthetic import attention_sites

SITES = [*attention_sites(), *attention_sites(MODELS["deepseek-v3.2"])]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    num_reqs = draw(st.integers(1, 5))
    tokens = draw(st.integers(num_reqs, 40))
    return Shape(num_reqs, tokens, draw(st.integers(tokens, 4000)))


def _attended(site: Site, position: int) -> int:
    """Entries that the query at ``position`` (from 1) attends to, by the definition."""
    window = min(position, SWA_WINDOW) if site.layer.has_window else 0
    if site.layer is LayerType.SWA_ONLY:
        return window
    rows = position // site.layer.compress_ratio
    return window + (rows if site.topk is None else min(rows, site.topk))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SITES), shapes())
def test_attended_entries_are_those_counted_query_by_query(site: Site, shape: Shape) -> None:
    counted = [
        _attended(site, position)
        for extend, seq in zip(shape.extend_lens(), shape.seq_lens(), strict=True)
        for position in range(seq - extend + 1, seq + 1)
    ]
    assert work(site, [shape]).attended[0] == pytest.approx(sum(counted) / len(counted))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SITES), st.lists(shapes(), min_size=1, max_size=4))
def test_columns_keep_the_order_of_the_shapes(site: Site, many: list[Shape]) -> None:
    together = work(site, many)
    apart = [work(site, [shape]) for shape in many]
    assert together.rows.tolist() == [one.rows[0] for one in apart]
    assert together.index_width.tolist() == [one.index_width[0] for one in apart]


def test_every_shape_of_the_training_grid_is_in_its_cell() -> None:
    grid = training_grid(163840, 132)
    for shape, bin_index, column in zip(grid.shapes, grid.bins, grid.columns, strict=True):
        assert shape.num_qo_tokens == grid.tokens[column]
        assert bin_start(int(bin_index)) <= shape.kv_tokens < bin_start(int(bin_index) + 1)
    assert max(shape.context for shape in grid.shapes) == 163840


def test_shapes_outside_what_was_swept_are_not_trained_on() -> None:
    grid = training_grid(163840, 132)
    inside = grid.inside([Shape(1, 16, 4096), Shape(4, 256, 65536)])
    kept = [shape for shape, keep in zip(grid.shapes, inside, strict=True) if keep]
    assert kept
    assert all(s.num_reqs <= 4 and 16 <= s.num_qo_tokens <= 256 and 4096 <= s.context <= 16384 for s in kept)


def test_heads_do_not_change_the_work() -> None:
    grid = training_grid(163840, 132)
    model = MODELS["deepseek-v3.2"]
    few, many = (grid.work(model.site(SiteName.PREFILL_ATTENTION, LayerType.DSA, h_q)) for h_q in (64, 128))
    assert np.array_equal(few.attended, many.attended)
