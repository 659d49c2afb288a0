"""What a prediction claims to be off by: by points that it had not seen, and more the farther it goes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.fit.bases import Chip, basis
from mla_tune.fit.costs import CostModel
from mla_tune.fit.curves import fit_curve
from mla_tune.fit.observations import group
from mla_tune.fit.prediction_error import FOLDS, PredictionError, folds, prediction_error
from mla_tune.fit.usable import usable
from mla_tune.fit.work import work
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Conditions, Site
from mla_tune.sites.stages import Law
from mla_tune.store.export import read_export
from mla_tune.store.measurement import PER_FORWARD_TOTAL, PER_LAYER_TOTAL, Role
from tests.fit.recorded import EXPORTS, Exported
from tests.fit.synthetic import C4A, ENVIRONMENT, fit_shapes, stage_us


def model_of(exported: Exported) -> CostModel:
    found = read_export(exported.path)
    conditions = Conditions(provider=exported.provider(found.measurements))
    return CostModel(found.environment, usable(found.measurements, found.tuned, conditions), found.tries)


def claimed_over_shown(costs: CostModel, site: Site, candidate: str) -> tuple[float, float] | None:
    """Of the path that dominates: its mean error, and its error at the held-out points, over what these show."""
    observations = costs.observations
    name = PER_LAYER_TOTAL if group(site, candidate, PER_LAYER_TOTAL) else PER_FORWARD_TOTAL
    held_out = {
        shape: observations.part(site, candidate, shape, name) for shape in observations.shapes(site, Role.HELD_OUT)
    }
    measured = {shape: part.latency_us for shape, part in held_out.items() if part is not None and part.latency_us}
    if not measured:
        return None
    load = work(site, list(measured))
    found = costs.costs(site, candidate)
    path = found.paths[0]
    predicted_us = path.factor(load) * sum(us for _, us in path.latencies_us(load))
    shown = float(np.abs(np.log(predicted_us / np.array(list(measured.values())))).mean())
    return found.error / shown, float(found.error_at(load).mean()) / shown


MISSED = pytest.mark.xfail(
    strict=True, reason="331 points of an H100, on which nothing was chosen: claimed over shown is 1.49 at the median"
)


@pytest.mark.parametrize(
    "exported",
    [pytest.param(e, id=str(e), marks=MISSED if str(e) == "nvidia-h100.sglang" else ()) for e in EXPORTS],
)
def test_what_is_claimed_is_what_held_out_points_show_at_the_median(exported: Exported) -> None:
    costs = model_of(exported)
    sites = costs.observations.sites
    pairs = [(site, name) for site in sites for name in costs.candidates(site)]
    ratios = [ratio for pair in pairs if (ratio := claimed_over_shown(costs, *pair)) is not None]
    assert len(ratios) >= 16
    everywhere, there = np.median(np.array(ratios), axis=0)
    assert 0.8 <= everywhere <= 1.25
    assert 0.8 <= there <= 1.25


points = st.lists(st.floats(0, 20), min_size=3, max_size=30, unique=True)


def made_of(where: list[float], errors: list[float]) -> PredictionError:
    left_out = folds(len(where))
    return prediction_error([np.array(where)], np.array(errors[: len(where)]), left_out)


@given(points, st.lists(st.floats(1e-3, 1), min_size=30, max_size=30), st.floats(1, 1e6))
def test_far_from_every_point_the_error_grows_and_never_falls_to_nothing(
    where: list[float], errors: list[float], away: float
) -> None:
    found = made_of(where, errors)
    far = max(where) + 60
    nearer, farther = found.at([np.array([far, far + away])])
    assert farther >= nearer > 0
    assert found.at([np.array([far + 1e9])])[0] > 10 * nearer
    assert farther >= min(errors[: len(where)]) / 10


@given(points, st.floats(1e-3, 1))
def test_where_every_point_was_off_by_the_same_so_is_a_prediction_at_them(where: list[float], error: float) -> None:
    found = made_of(where, [error] * 30)
    assert found.mean == pytest.approx(error)
    assert (found.at([np.array(where)]) <= error * 4).all()


@given(st.integers(2, 200))
def test_every_point_is_left_out_once_and_beside_kept_ones(count: int) -> None:
    masks = folds(count)
    assert len(masks) == min(FOLDS, count)
    assert (np.sum(masks, axis=0) == 1).all()
    assert all((~mask).any() for mask in masks)


def test_a_single_point_says_nothing_of_the_error() -> None:
    found = made_of([3.0], [0.0])
    assert found.mean == 1.0
    assert found.at([np.array([3.0, 30.0])])[0] >= 0.5


def test_doubt_is_added_everywhere() -> None:
    found = made_of([0.0, 1.0, 5.0], [0.1, 0.2, 0.3])
    doubted = found.plus(0.25)
    anywhere = [np.array([0.0, 3.0, 40.0])]
    assert doubted.mean == pytest.approx(found.mean + 0.25)
    assert doubted.at(anywhere) == pytest.approx(found.at(anywhere) + 0.25)


def test_a_point_that_is_left_out_changes_law_and_correction_alike() -> None:
    shapes = fit_shapes()
    measured = np.array([stage_us(C4A, "sparse_fwd", "attention", shape) for shape in shapes])
    load = work(C4A, shapes)
    curve = fit_curve(basis(C4A, Law.WORKSPACE_ATTENTION, Chip(ENVIRONMENT.sm_count)), load, measured)
    spoiled, index = measured.copy(), 7
    spoiled[index] *= 3
    mask = np.zeros(len(shapes), dtype=bool)
    mask[index] = True
    here = work(C4A, [shapes[index], Shape(1, 300, 131072)])
    assert curve.without(load, measured, mask).latency_us(here) == pytest.approx(
        curve.without(load, spoiled, mask).latency_us(here)
    )
