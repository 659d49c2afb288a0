"""Comparison with a reference: rounding passes; a wrong, swapped, NaN or unwritten row does not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.bench.numerics import BF16_ATTENTION, mismatch, poisoned_memory, unwritten

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def reference() -> torch.Tensor:
    return torch.randn(40, 4, 64, generator=torch.Generator().manual_seed(1))


@settings(max_examples=25)
@given(st.integers(0, 1 << 30), st.integers(1, 50), st.sampled_from([1e-6, 1.0, 1e6]))
def test_an_output_that_is_only_rounded_to_bf16_matches_at_any_scale(seed: int, rows: int, scale: float) -> None:
    exact = torch.randn(rows, 3, 32, generator=torch.Generator().manual_seed(seed)) * scale
    assert mismatch(exact.bfloat16(), exact, BF16_ATTENTION) is None
    assert mismatch(exact, exact, BF16_ATTENTION) is None


@pytest.mark.parametrize("fault", ["zero", "negated", "next row", "one head"])
@pytest.mark.parametrize("rows", [1, 40, 100_000])
def test_one_wrong_row_is_found_among_however_many(rows: int, fault: str) -> None:
    exact = torch.randn(rows + 1, 2, 8, generator=torch.Generator().manual_seed(1))
    output = exact.bfloat16()
    row = rows // 2
    faults = {"zero": output[row] * 0, "negated": -output[row], "next row": output[row + 1], "one head": output[row]}
    output[row] = faults[fault]
    if fault == "one head":
        output[row, 1] = 0
    reason = mismatch(output, exact, BF16_ATTENTION)
    assert reason is not None
    if rows == 100_000:  # its share of the overall error is below that bound: the bound on rows is what finds it
        assert reason.startswith(f"row {row} has relative error")


def test_a_small_error_everywhere_is_beyond_the_overall_bound(reference: torch.Tensor) -> None:
    reason = mismatch(reference * 1.02, reference, BF16_ATTENTION)
    assert reason == "relative error 2.00e-02 exceeds 1e-02"


def test_noise_in_a_row_that_is_nearly_zero_is_judged_by_the_scale_of_the_others(reference: torch.Tensor) -> None:
    reference[7] *= 1e-9
    output = reference.clone()
    output[7] = 0
    assert mismatch(output, reference, BF16_ATTENTION) is None
    assert mismatch(torch.zeros(3, 4), torch.zeros(3, 4), BF16_ATTENTION) is None


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_non_finite_values_are_counted_and_the_first_row_named(reference: torch.Tensor, value: float) -> None:
    output = reference.clone()
    output[5, 1, 3] = output[9, 0, 0] = value
    reason = mismatch(output, reference, BF16_ATTENTION)
    assert reason == "2 of 40 rows hold NaN or infinity, the first is row 5"
    assert unwritten(output) == "output has unwritten or non-finite values, the first in row 5 of 40"


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_a_reference_that_is_not_finite_confirms_nothing(reference: torch.Tensor, value: float) -> None:
    output = reference.clone()
    reference[3, 0, 0] = value
    assert mismatch(output, reference, BF16_ATTENTION) is not None


def test_another_shape_is_a_mismatch_even_with_as_many_values(reference: torch.Tensor) -> None:
    reason = mismatch(reference.flatten(1), reference, BF16_ATTENTION)
    assert reason == "shape (40, 256) differs from the reference's (40, 4, 64)"


def test_a_full_output_is_written_whatever_its_type(reference: torch.Tensor) -> None:
    assert unwritten(reference.bfloat16()) is None
    assert unwritten(torch.zeros(3, 2, dtype=torch.int32)) is None


def test_a_row_of_zeros_among_floats_is_unwritten_since_fresh_memory_is_zero(reference: torch.Tensor) -> None:
    reference[7] = 0
    assert unwritten(reference) == "output has unwritten or non-finite values, the first in row 7 of 40"
    reference[7, 2, 9] = 1e-30
    assert unwritten(reference) is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_memory_that_held_the_right_answer_shows_none_of_it_once_poisoned(device: str) -> None:
    for _ in range(8):  # so that some allocator hands the same block out again
        right = torch.randn(64, 512, device=device)
        del right
        with poisoned_memory():
            output = torch.empty(64, 512, device=device)
            indices = torch.empty_like(output, dtype=torch.int32)
        assert unwritten(output) is not None
        assert bool((indices == torch.iinfo(torch.int32).max).all())
        del output, indices
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_output_without_rows_has_nothing_to_compare() -> None:
    empty = torch.empty(0, 4, 64)
    assert mismatch(empty, empty, BF16_ATTENTION) is None
    assert unwritten(empty) is None
