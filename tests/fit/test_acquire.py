"""Where a sweep measures next, by replay of the committed measurements of an H200."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import erf, exp, pi, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.fit.acquire import SETTLED, Doubt, _expected_loss, doubts
from mla_tune.fit.costs import CostModel
from mla_tune.fit.observations import Observations, shares
from mla_tune.fit.work import work
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import MODELS, ModelConfig, Site, attention_sites
from mla_tune.store.export import Export
from mla_tune.store.measurement import Measurement, Role
from mla_tune.sweep.grid import gpu_grid, pool, seed_points
from mla_tune.sweep.preset import DEFAULT
from tests.fit.recorded import recorded

SITES = attention_sites(MODELS.values())


EVERYWHERE = ("sparse_fwd", "with_kvcache")
"""Candidates that were timed at every recorded point; the variants were at a seventh of them."""


@lru_cache(maxsize=1)
def everywhere() -> Export:
    found = recorded()
    return replace(found, measurements=tuple(m for m in found.measurements if m.candidate in EVERYWHERE))


@lru_cache(maxsize=1)
def rows_by_point() -> dict[tuple[Site, Shape], list[Measurement]]:
    found: dict[tuple[Site, Shape], list[Measurement]] = {}
    for row in everywhere().measurements:
        found.setdefault((row.site, row.shape), []).append(row)
    return found


@lru_cache(maxsize=1)
def everything() -> Observations:
    return Observations(everywhere().measurements)


def costs_of(points: set[tuple[Site, Shape]]) -> CostModel:
    rows = rows_by_point()
    return CostModel(everywhere().environment, [row for point in sorted(points, key=str) for row in rows[point]])


def seeds() -> set[tuple[Site, Shape]]:
    wanted = {
        (p.site, p.shape) for p in seed_points(gpu_grid(132), MODELS.values(), [SITE_NAME], 0) if p.role is Role.FIT
    }
    return wanted & rows_by_point().keys()


SITE_NAME = next(iter(SITES)).name


BUDGET = 217
"""Points that the default budget of 90 s has time for: 181 took 75 s on an H200."""


def replayed(most: int = BUDGET) -> set[tuple[Site, Shape]]:
    """The points of an adaptive sweep that can choose among the recorded ones only, as far as the budget reaches."""
    points = seeds()
    while True:
        costs = costs_of(points)
        added: list[Doubt] = []
        for site, model in SITES.items():
            left = [shape for shape in everything().shapes(site, Role.FIT) if (site, shape) not in points]
            added += doubts(costs, model, site, left, DEFAULT.points_per_round)
        added.sort(key=lambda doubt: -doubt.expected_loss)
        points |= {(doubt.site, doubt.shape) for doubt in added[: most - len(points)]}
        if not added or len(points) >= most:
            return points


def slowdowns(costs: CostModel, model: ModelConfig, site: Site, shapes: list[Shape]) -> list[float]:
    """Of the predicted winner at each shape where both candidates were timed."""
    share, names = shares(model, site), costs.candidates(site)
    found = []
    for shape in shapes:
        measured = [everything().cost(site, name, shape) for name in names]
        us = [cost.amortized(share) for cost in measured if cost is not None]
        if len(us) == len(names):
            load = work(site, [shape])
            predicted = [float(costs.costs(site, name).amortized_us(load, share)[0]) for name in names]
            found.append(us[predicted.index(min(predicted))] / min(us))
    return found


def test_a_few_adaptive_points_choose_right_almost_everywhere_else() -> None:
    points = replayed()
    costs = costs_of(points)
    found = []
    for site, model in SITES.items():
        found += slowdowns(costs, model, site, [s for s in everything().shapes(site) if (site, s) not in points])
    assert len(points) <= BUDGET
    assert len(found) > 900
    assert np.mean(found) <= 1.001
    assert np.percentile(found, 99) <= 1.04
    assert np.max(found) <= 1.10


def test_the_same_measurements_ask_for_the_same_points() -> None:
    costs, again = costs_of(seeds()), costs_of(seeds())
    for site, model in SITES.items():
        shapes = pool(gpu_grid(132), model, site)
        assert doubts(costs, model, site, shapes, 3) == doubts(again, model, site, shapes, 3)


@pytest.mark.parametrize("count", [1, 5])
def test_doubts_are_distinct_members_of_the_pool_and_the_largest_comes_first(count: int) -> None:
    costs = costs_of(seeds())
    for site, model in SITES.items():
        shapes = pool(gpu_grid(132), model, site)
        found = doubts(costs, model, site, shapes, count)
        assert len({doubt.shape for doubt in found}) == len(found) <= count
        assert {doubt.shape for doubt in found} <= set(shapes)
        assert all(doubt.expected_loss >= SETTLED for doubt in found)
        assert found[:1] == doubts(costs, model, site, shapes, 1)


def test_a_site_where_one_candidate_always_wins_by_far_is_settled_by_its_seeds() -> None:
    (site,) = (site for site in SITES if site.layer == "swa_only")
    assert doubts(costs_of(seeds()), SITES[site], site, pool(gpu_grid(132), SITES[site], site), 2) == []


def test_nothing_is_in_doubt_without_a_second_candidate_or_without_shapes() -> None:
    (site, model), *_ = SITES.items()
    costs = costs_of(seeds())
    assert doubts(costs, model, site, [], 3) == []
    alone = [row for row in everywhere().measurements if row.candidate == "sparse_fwd"]
    assert doubts(CostModel(everywhere().environment, alone), model, site, pool(gpu_grid(132), model, site), 3) == []


@given(st.floats(0, 5), st.floats(1e-3, 5))
def test_the_expected_loss_is_that_of_a_choice_between_two_normal_means(gain: float, sigma: float) -> None:
    z = gain / sigma
    exact = sigma * exp(-z * z / 2) / sqrt(2 * pi) - gain * (1 - erf(z / sqrt(2))) / 2
    (found,) = _expected_loss(np.array([gain]), np.array([sigma]))
    assert found == pytest.approx(exact, abs=1e-6 * (gain + sigma))
    assert found >= -1e-6 * (gain + sigma)
