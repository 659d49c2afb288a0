"""Cost curves: the law, its correction and its break."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.fit.bases import Chip, basis
from mla_tune.fit.curves import fit_correction, fit_curve, fit_nonnegative
from mla_tune.fit.work import work
from mla_tune.sites.candidates import stages
from mla_tune.sites.shape import Shape
from tests.fit.synthetic import C4A, METADATA, fit_shapes, stage_us

coefficients = st.lists(st.floats(0, 10), min_size=3, max_size=3).filter(lambda values: max(values) > 1e-3)


def _relative_error(terms: list[np.ndarray], values: tuple[float, ...], measured: np.ndarray) -> float:
    law = sum(value * term for value, term in zip(values, terms, strict=True))
    return float((((law - measured) / measured) ** 2).sum())


@settings(max_examples=30, deadline=None)
@given(coefficients)
def test_a_law_that_generated_the_points_is_found_again(values: list[float]) -> None:
    x = np.array([1.0, 2, 5, 17, 60, 300, 4000])
    terms = [np.ones_like(x), x, x**1.5]
    measured = sum(value * term for value, term in zip(values, terms, strict=True))
    found = fit_nonnegative(terms, np.asarray(measured))
    assert min(found) >= 0
    assert _relative_error(terms, found, np.asarray(measured)) < 1e-12


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=6, max_size=6))
def test_no_nonnegative_law_on_a_lattice_beats_the_fitted_one(measured: list[float]) -> None:
    x = np.array([1.0, 2, 4, 8, 16, 32])
    terms, target = [np.ones_like(x), x], np.array(measured)
    found = fit_nonnegative(terms, target)
    lattice = [0.0, *np.geomspace(0.01, 100, 25)]
    least = min(_relative_error(terms, pair, target) for pair in product(lattice, lattice))
    assert _relative_error(terms, found, target) <= least + 1e-9


def test_a_correction_meets_the_measured_points_and_fades_far_from_them() -> None:
    x = np.arange(12.0)
    ratios = 0.3 * np.sin(x / 2)
    correction = fit_correction([x], ratios)
    assert np.abs(correction.log_factor([x]) - ratios).max() < 0.05
    assert abs(correction.log_factor([np.array([1e4])])[0]) < 1e-6


def test_pure_noise_gets_less_correction_than_it_has_amplitude() -> None:
    noise = np.random.default_rng(7).normal(0, 0.01, 40)
    correction = fit_correction([np.arange(40.0)], noise)
    assert np.abs(correction.log_factor([np.arange(40.0) + 0.5])).mean() < np.abs(noise).mean()


def test_a_jump_of_the_scheduler_is_not_smeared_over_its_neighbours() -> None:
    shapes = [Shape(1, count, 131072) for count in (*(1 << n for n in range(16)), 12000, 19371, 19372, 24576, 60000)]
    stage = stages(C4A, "with_kvcache")[0]
    measured = np.array([stage_us(C4A, "with_kvcache", "schedule", shape) for shape in shapes])
    curve = fit_curve(basis(C4A, stage.law, Chip(132)), work(C4A, shapes), measured)
    between = [Shape(1, count, 131072) for count in (3000, 9000, 18000, 20000, 40000)]
    expected = [stage_us(C4A, "with_kvcache", "schedule", shape) for shape in between]
    assert curve.latency_us(work(C4A, between)) == pytest.approx(expected, rel=0.03)


def test_a_smooth_stage_has_no_break() -> None:
    shapes = [Shape(1, 1 << n, 131072) for n in range(16)]
    stage = stages(METADATA, "jit")[0]
    measured = np.array([stage_us(METADATA, "jit", "metadata", shape) for shape in shapes])
    assert fit_curve(basis(METADATA, stage.law, Chip(132)), work(METADATA, shapes), measured).break_at is None


@pytest.mark.parametrize("candidate", ["sparse_fwd", "with_kvcache"])
def test_every_stage_is_predicted_within_a_few_percent_between_its_points(candidate: str) -> None:
    between = [Shape(1, 400, 131072), Shape(3, 2000, 600000), Shape(20, 5000, 2000000), Shape(6, 100, 60000)]
    for stage in stages(C4A, candidate):
        shapes = fit_shapes()
        measured = np.array([stage_us(C4A, candidate, stage.name, shape) for shape in shapes])
        curve = fit_curve(basis(C4A, stage.law, Chip(132)), work(C4A, shapes), measured)
        expected = [stage_us(C4A, candidate, stage.name, shape) for shape in between]
        assert curve.latency_us(work(C4A, between)) == pytest.approx(expected, rel=0.08), stage.name


def test_a_single_point_makes_a_flat_curve() -> None:
    stage = stages(METADATA, "jit")[0]
    curve = fit_curve(basis(METADATA, stage.law, Chip(132)), work(METADATA, [Shape(1, 8, 512)]), np.array([7.0]))
    predicted = curve.latency_us(work(METADATA, [Shape(1, 8, 512), Shape(1, 8, 8192)]))
    assert [math.isclose(us, 7.0) for us in predicted] == [True, True]
