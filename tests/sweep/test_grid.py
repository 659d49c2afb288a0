"""The points of a sweep: each is measured once, and none that judges a policy is also fitted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.hardware.datasheet import SM90, SM100
from mla_tune.sites.candidates import names_at, stages
from mla_tune.sites.site import MODELS, LayerType, ModelConfig, SiteName
from mla_tune.store.measurement import Role
from mla_tune.sweep.estimate import estimated_seconds
from mla_tune.sweep.grid import (
    Grid,
    Point,
    attention_flops,
    cpu_grid,
    gpu_grid,
    grid_points,
    seed_points,
    verification_points,
)
from tests.shapes import every_site

SEED = 20250
GRIDS = {"cpu": cpu_grid(), "gpu132": gpu_grid(132), "gpu78": gpu_grid(78), "gpu148": gpu_grid(148, SM100)}
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
selections = st.tuples(
    st.lists(st.sampled_from(list(MODELS.values())), min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from(SiteName), min_size=1, max_size=2, unique=True),
    st.integers(0, 1 << 40),
)


def all_points(grid: Grid, seed: int = SEED) -> list[Point]:
    return grid_points(grid, MODELS.values(), SiteName, seed)


def contexts_allowed(point: Point) -> int:
    return max(m.max_context for m in MODELS.values() if point.site.layer in m.site_layers(point.site.name))


@grids
@settings(max_examples=10)
@given(selection=selections)
def test_points_are_unique_valid_and_of_the_chosen_models_and_sites(
    grid: Grid, selection: tuple[list[ModelConfig], list[SiteName], int]
) -> None:
    chosen, names, seed = selection
    points = grid_points(grid, chosen, names, seed)
    assert len({(point.site, point.shape) for point in points}) == len(points) > 0
    allowed = {
        config.site(name, layer, h_q)
        for config in chosen
        for name in names
        for h_q in config.heads
        for layer in config.site_layers(name)
    }
    assert {point.site for point in points} == allowed
    for point in points:
        assert point.shape.context <= contexts_allowed(point)
        assert attention_flops(point.site, point.shape) <= grid.max_attention_flops
        assert all(stages(point.site, candidate) for candidate in names_at(point.site))


@grids
def test_the_same_seed_gives_the_same_plan_and_another_seed_other_held_out_shapes(grid: Grid) -> None:
    assert all_points(grid) == all_points(grid)

    def held_out(seed: int) -> set[Point]:
        return {point for point in all_points(grid, seed) if point.role is Role.HELD_OUT}

    assert held_out(1) != held_out(2)


@grids
def test_every_site_has_points_to_fit_and_others_to_judge(grid: Grid) -> None:
    roles = defaultdict(list)
    for point in all_points(grid):
        roles[point.site].append(point)
    assert set(roles) == set(every_site())
    for site, points in roles.items():
        fit, held_out = ({p.shape for p in points if p.role is role} for role in (Role.FIT, Role.HELD_OUT))
        assert len(fit) >= 5, site.key
        assert len(held_out) >= 4, site.key
        assert not fit & held_out


@settings(max_examples=10)
@given(st.integers(0, 1 << 40))
def test_all_v4_sites_are_judged_on_the_same_shapes_so_that_a_whole_forward_can_be(seed: int) -> None:
    held_out = defaultdict(set)
    for point in all_points(gpu_grid(132), seed):
        if point.role is Role.HELD_OUT and point.site.name is SiteName.PREFILL_ATTENTION:
            held_out[point.site].add(point.shape)
    v4 = [shapes for site, shapes in held_out.items() if site.layer is not LayerType.DSA]
    assert len(v4) > 5
    assert all(one == other for one, other in combinations(v4, 2))
    v3_2 = [shapes for site, shapes in held_out.items() if site.layer is LayerType.DSA]
    assert all(one == other for one, other in combinations(v3_2, 2))


@grids
def test_a_plan_for_one_model_agrees_with_the_plan_for_all(grid: Grid) -> None:
    everything = {(point.site, point.shape): point.role for point in all_points(grid)}
    for config in MODELS.values():
        for point in grid_points(grid, [config], SiteName, SEED):
            assert everything[point.site, point.shape] is point.role


@grids
def test_a_budget_that_ends_after_a_third_has_points_to_fit_and_to_judge_every_attention_site(grid: Grid) -> None:
    points = grid_points(grid, MODELS.values(), [SiteName.PREFILL_ATTENTION], SEED)
    seen = {(point.site, point.role) for point in points[: len(points) // 3]}
    assert seen == {(site, role) for site in every_site(SiteName.PREFILL_ATTENTION) for role in Role}


@grids
def test_an_adaptive_sweep_measures_all_seeds_before_anything_that_judges(grid: Grid) -> None:
    roles = [point.role for point in seed_points(grid, MODELS.values(), SiteName, SEED)]
    assert roles == sorted(roles, key=lambda role: role is Role.HELD_OUT)
    assert set(roles) == set(Role)


@grids
def test_indexer_points_for_the_fit_come_with_ascending_query_tokens(grid: Grid) -> None:
    points = grid_points(grid, MODELS.values(), [SiteName.INDEXER_METADATA], SEED)
    counts = [point.shape.num_qo_tokens for point in points if point.role is Role.FIT]
    assert counts == sorted(counts)
    assert set(counts) <= set(grid.indexer_query_tokens)


@pytest.mark.parametrize("sm_count", [78, 132, 148])
def test_gpu_points_lie_on_both_sides_of_the_first_waves(sm_count: int) -> None:
    counts = {point.shape.num_qo_tokens for point in all_points(gpu_grid(sm_count))}
    assert {n * sm_count + d for n in (1, 2, 4) for d in (-1, 0, 1)} <= counts


@pytest.mark.parametrize("points", [grid_points, seed_points])
def test_every_change_of_a_kernel_with_the_width_has_fit_points_on_both_sides_on_sm100(
    points: Callable[..., list[Point]],
) -> None:
    names = [SiteName.PREFILL_ATTENTION]
    of_c128a = defaultdict(set)
    for point in points(gpu_grid(148, SM100), MODELS.values(), names, SEED):
        if point.site.layer is LayerType.C128A and point.role is Role.FIT and point.shape.num_reqs == 1:
            of_c128a[point.site.h_q].add(point.shape.context // 1024)
    assert {64, 72} <= of_c128a[64]
    assert {64, 72, 144, 152} <= of_c128a[128]
    plain = points(gpu_grid(148), MODELS.values(), names, SEED)
    hopper = points(gpu_grid(148, SM90), MODELS.values(), names, SEED)
    assert plain == hopper
    assert not {72, 152} & {p.shape.context // 1024 for p in hopper if p.role is Role.FIT}


def test_a_slow_device_leaves_out_what_costs_too_much() -> None:
    grid = cpu_grid()
    costs = {attention_flops(point.site, point.shape) for point in all_points(grid)}
    all_costs = {
        attention_flops(point.site, point.shape)
        for point in all_points(replace(grid, max_attention_flops=float("inf")))
    }
    assert costs == {cost for cost in all_costs if cost <= grid.max_attention_flops} < all_costs


def test_no_models_or_no_sites_give_no_points() -> None:
    assert grid_points(cpu_grid(), [], SiteName, SEED) == []
    assert grid_points(cpu_grid(), MODELS.values(), [], SEED) == []


def test_verification_covers_every_site_with_one_query_and_ragged_requests() -> None:
    points = verification_points(MODELS.values(), SiteName)
    shapes = {point.shape for point in points}
    assert {(point.site, point.shape) for point in points} == {(s, shape) for s in every_site() for shape in shapes}
    assert len(points) == len(set(points))
    assert any(shape.num_qo_tokens == 1 for shape in shapes)
    assert any(shape.num_qo_tokens % shape.num_reqs and shape.kv_tokens % shape.num_reqs for shape in shapes)


@grids
def test_more_points_are_estimated_to_take_longer(grid: Grid) -> None:
    points = all_points(grid)
    for kind in ("cpu", "cuda"):
        part, whole = estimated_seconds(points[:20], kind), estimated_seconds(points, kind)
        assert 0 == estimated_seconds([], kind) < part < whole


@grids
def test_seeds_span_the_range_that_held_out_points_are_drawn_from(grid: Grid) -> None:
    """An answer outside of what was measured is the engine's default: no judge may ask there."""
    fit: dict[str, list[Point]] = defaultdict(list)
    judges: dict[str, list[Point]] = defaultdict(list)
    for point in seed_points(grid, MODELS.values(), SiteName, SEED):
        (judges if point.role is Role.HELD_OUT else fit)[point.site.key].append(point)
    assert fit.keys() >= judges.keys() != set()
    for key, points in judges.items():
        for axis in ("num_reqs", "num_qo_tokens", "kv_tokens"):
            seeded = [getattr(point.shape, axis) for point in fit[key]]
            asked = [getattr(point.shape, axis) for point in points]
            assert min(seeded) <= min(asked), (key, axis)
            assert max(seeded) >= max(asked), (key, axis)
