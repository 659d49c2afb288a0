"""Published figures against the committed measurements: what each covers, and that a miss is told as one."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from mla_tune.fit.costs import CostModel
from mla_tune.fit.published import PUBLISHED, Published
from mla_tune.fit.published_check import Checked, check
from mla_tune.fit.work import work

PREFILL = [figure for figure in PUBLISHED if "5 chunks" in figure.what]


@pytest.fixture(scope="module")
def checked(h200_costs: CostModel) -> tuple[Checked, ...]:
    """Every figure, by the committed H200 measurements."""
    return check(h200_costs, PUBLISHED)


def figure(word: str) -> Published:
    (found,) = (entry for entry in PUBLISHED if word in entry.what)
    return found


def test_every_figure_names_its_source_and_what_was_assumed() -> None:
    assert Counter(entry.source.split("#")[0] for entry in PUBLISHED) == {
        "sgl-project/sglang": 8,
        "vllm-project/vllm": 2,
        "InternLM/lmdeploy": 2,
    }
    for entry in PUBLISHED:
        assert entry.published_ms > 0
        assert entry.assumed


@pytest.mark.parametrize(
    ("word", "count"),
    [
        ("with_kvcache attention", 215),
        ("with_kvcache metadata", 15),
        ("sparse_fwd attention", 215),
        (": dequantize", 420),
        ("window ids", 5),
        ("top-k transform on the with_kvcache", 0),
    ],
)
def test_five_chunks_launch_each_stage_as_often_as_the_profile_says(word: str, count: int) -> None:
    (found,) = (entry for entry in PREFILL if word in entry.what)
    assert sum(launch.count for launch in found.launches) == pytest.approx(count)


def test_a_figure_that_a_stage_covers_is_predicted_and_the_others_are_not(checked: tuple[Checked, ...]) -> None:
    assert len(checked) == len(PUBLISHED)
    for entry in checked:
        assert (entry.predicted_ms is not None) == bool(entry.published.launches)
        if entry.ratio is not None and entry.predicted_ms is not None:
            assert entry.ratio == pytest.approx(entry.predicted_ms / entry.published.published_ms)
            assert entry.uncertainty > 0


def test_on_the_measured_gpu_itself_the_prediction_is_the_measured_curve(
    h200_costs: CostModel, checked: tuple[Checked, ...]
) -> None:
    own = [entry for entry in checked if entry.published.sku == "nvidia-h200"]
    assert len(own) == 2
    for entry in own:
        (launch,) = entry.published.launches
        ((_, curve),) = (
            (stage, curve)
            for stage, curve in h200_costs.costs(launch.site, launch.candidate.name).paths[0].stages
            if stage.name == launch.stage
        )
        us = float(curve.latency_us(work(launch.site, [launch.shape]))[0])
        assert entry.predicted_ms == pytest.approx(us / 1e3)


def test_a_prediction_grows_with_the_launches_and_a_miss_is_told(h200_costs: CostModel) -> None:
    base = figure("512 query tokens")
    twice = replace(base, launches=(*base.launches, *base.launches))
    far = replace(base, published_ms=base.published_ms * 100)
    one, two, missed = check(h200_costs, [base, twice, far])
    assert one.predicted_ms is not None
    assert two.predicted_ms == pytest.approx(2 * one.predicted_ms)
    assert missed.inside is False
    assert missed.off == pytest.approx(abs(math.log((one.ratio or 0) / 100)))


def test_a_figure_of_a_stage_that_was_not_measured_is_not_predicted(h200_costs: CostModel) -> None:
    base = figure("512 query tokens")
    unknown = replace(base, launches=tuple(replace(launch, stage="no such stage") for launch in base.launches))
    (entry,) = check(h200_costs, [unknown])
    assert (entry.predicted_ms, entry.ratio, entry.inside, entry.off) == (None, None, None, 0.0)
