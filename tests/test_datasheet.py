"""The figures that scaling rests on: all there, plausible, with a source, and of the products that mla-tune knows."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from mla_tune.errors import UsageError
from mla_tune.hardware.datasheet import DATASHEETS, SM100, Datasheet, Figure, datasheet, same_figures
from mla_tune.hardware.sku import SKUS

ALL = pytest.mark.parametrize("sheet", DATASHEETS, ids=lambda sheet: str(sheet.sku))


def figures(sheet: Datasheet) -> dict[str, Figure]:
    values = {field.name: getattr(sheet, field.name) for field in fields(sheet)}
    return {name: value for name, value in values.items() if isinstance(value, Figure)}


def test_every_known_product_has_one_datasheet_with_its_sm_count() -> None:
    assert {sheet.sku: sheet.sm_count.value for sheet in DATASHEETS} == {sku.name: sku.sm_count for sku in SKUS}
    assert len(DATASHEETS) == len(SKUS)


@ALL
def test_every_figure_is_positive_and_says_where_it_is_from(sheet: Datasheet) -> None:
    assert len(figures(sheet)) == 8
    for figure in figures(sheet).values():
        assert figure.value > 0
        assert len(figure.source) > 10


@ALL
def test_a_derived_figure_shows_its_arithmetic(sheet: Datasheet) -> None:
    for figure in figures(sheet).values():
        if "derived" in figure.source:
            assert re.search(r"\d.* / \(?\d", figure.source), figure.source


@ALL
def test_a_derived_quotient_is_the_stated_value(sheet: Datasheet) -> None:
    # "36 PFLOP/s with sparsity / 8 / 2" and "64 TB/s / 8", in the unit of the field: thousands of it
    for name in ("bf16_tflops", "fp8_tflops", "memory_bandwidth_gbps"):
        figure = figures(sheet)[name]
        if "derived" not in figure.source:
            continue
        total, divisors = re.findall(r"([\d.]+) [PT](?:FLOP|B)/s[a-z ]*((?: / \d+)+)$", figure.source)[0]
        value = float(total) * 1000
        for divisor in re.findall(r"\d+", divisors):
            value /= int(divisor)
        assert value == pytest.approx(figure.value)


@ALL
def test_fp8_is_twice_bf16(sheet: Datasheet) -> None:
    assert sheet.fp8_tflops.value == 2 * sheet.bf16_tflops.value


@ALL
def test_the_tensor_figure_is_one_that_the_clock_allows(sheet: Datasheet) -> None:
    # 4096 dense bf16 operations per clock and SM on sm90, 8192 on sm100; an H20 is cut to a quarter of that.
    per_clock = 8192 if sheet.architecture == SM100 else 4096
    peak = sheet.sm_count.value * per_clock * sheet.boost_clock_mhz.value * 1e6 / 1e12
    assert 0.2 < sheet.bf16_tflops.value / peak <= 1


@ALL
def test_products_with_the_same_figures_are_the_same_for_each_of_them(sheet: Datasheet) -> None:
    group = same_figures(sheet.sku)
    assert group[0] == sheet
    assert all(set(same_figures(other.sku)) == set(group) for other in group)


def test_an_unknown_product_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="got 'nvidia-l4'; accepted: nvidia-h20, nvidia-h100"):
        datasheet("nvidia-l4")
