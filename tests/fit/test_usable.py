"""What an export holds and no fit may believe."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mla_tune.fit.usable import usable
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import LayerType, Site, SiteName
from mla_tune.store.measurement import PER_FORWARD_TOTAL, PER_LAYER_TOTAL, Measurement, Outcome, Regime, Role

SITE = Site(SiteName.PREFILL_ATTENTION, LayerType.C4A, 64, 512)
METADATA = Site(SiteName.INDEXER_METADATA, LayerType.C4A)


def timed(
    part: str, latency_us: float, site: Site = SITE, qo: int = 16, candidate: str = "with_kvcache"
) -> Measurement:
    shape = Shape(1, qo, 4096)
    return Measurement(site, shape, Role.FIT, candidate, part, Regime.GRAPH, Outcome.OK, latency_us=latency_us)


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_tune.notice._said", set())


def test_a_whole_path_of_no_time_takes_all_that_its_timer_gave_and_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = [timed(PER_LAYER_TOTAL, 0.0), timed("attention", 0.0), timed(PER_FORWARD_TOTAL, 3.0)]
    sound = [
        timed(PER_LAYER_TOTAL, 5.0, qo=32),
        timed(PER_LAYER_TOTAL, 5.0, candidate="sparse_fwd"),
        replace(timed(PER_LAYER_TOTAL, 5.0), regime=Regime.EAGER),
    ]
    for _ in range(2):
        assert usable([*broken, *sound]) == tuple(sound)
    (line,) = caplog.messages
    assert line.startswith("1 whole paths took 0 us and are left out")
    assert "prefill_attention/c4a/h64/k512 (1, 16, 4096) with_kvcache" in line


def test_a_stage_that_is_timed_as_a_difference_may_take_none(caplog: pytest.LogCaptureFixture) -> None:
    rows = (timed(PER_LAYER_TOTAL, 5.0), timed("schedule", 0.0), timed(PER_FORWARD_TOTAL, 0.0))
    assert usable(rows) == rows
    assert caplog.messages == []


def test_the_indexers_only_stage_is_a_whole_path() -> None:
    assert usable([timed(PER_FORWARD_TOTAL, 0.0, METADATA, candidate="jit")]) == ()
