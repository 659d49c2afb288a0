"""Splits are measured as a sweep measures: right first, and a wrong one has its reason instead of a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from mla_tune.kernels import binding
from mla_tune.kernels import split_batch as split
from mla_tune.kernels.inputs import AttentionInputs, InputBuilder
from mla_tune.kernels.prepared import PreparedPath
from mla_tune.sites.candidates import split_stages
from mla_tune.sites.shape import RaggedShape
from mla_tune.sites.site import Site
from mla_tune.store.measurement import PER_LAYER_TOTAL, Measurement, Outcome, Regime, fault
from mla_tune.sweep.splitting import SplitMeasurer
from tests.shapes import every_site

BATCH = RaggedShape(((2, 900), (6, 6), (1, 300)))
SINGLES = ("sparse_fwd", "with_kvcache")
C4A = next(site for site in every_site() if site.layer == "c4a" and site.h_q == 64)


def of_split(rows: Sequence[Measurement]) -> list[Measurement]:
    return [row for row in rows if row.candidate == split.NAME]


@pytest.mark.parametrize("site", [s for s in every_site() if s.h_q == 64], ids=lambda site: site.key)
def test_both_paths_and_the_split_are_timed_in_every_stage(site: Site) -> None:
    rows = SplitMeasurer("cpu", 0).measure(site, BATCH, [0, 2], SINGLES)
    assert {row.candidate for row in rows} == {*SINGLES, split.NAME}
    assert [fault(row) for row in rows] == [None] * len(rows)
    assert {(row.shape, row.regime, row.outcome) for row in rows} == {(BATCH.evened(), Regime.EAGER, Outcome.OK)}
    parts = {row.part for row in of_split(rows)}
    assert {stage.name for stage in split_stages(site)} | {PER_LAYER_TOTAL} <= parts


def test_a_wrong_split_is_not_timed_and_the_single_paths_are(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = split.prepare

    def spoiled(inputs: AttentionInputs, cached: Sequence[int], kernels: object, launches: object) -> PreparedPath:
        prepared = prepare(inputs, cached, None)
        *others, merge = prepared.stages

        def run() -> None:
            merge.run()
            prepared.result()[0] *= 2

        return replace(prepared, stages=(*others, replace(merge, run=run)))

    monkeypatch.setattr(split, "prepare", spoiled)
    rows = SplitMeasurer("cpu", 0).measure(C4A, BATCH, [0, 2], SINGLES)
    (wrong,) = of_split(rows)
    assert (wrong.outcome, wrong.latency_us) == (Outcome.WRONG_RESULT, None)
    assert "relative error" in wrong.detail
    assert {row.candidate for row in rows if row.outcome is Outcome.OK} == set(SINGLES)


def test_a_split_of_nothing_is_an_outcome_of_its_own() -> None:
    (failed,) = of_split(SplitMeasurer("cpu", 0).measure(C4A, BATCH, [], SINGLES))
    assert failed.outcome is Outcome.RUNTIME_ERROR
    assert "a split needs requests in both parts" in failed.detail


def test_the_workspace_covers_its_own_requests_and_the_queries_of_all() -> None:
    inputs = InputBuilder(torch.device("cpu")).attention(C4A, BATCH)
    prepared = binding.prepare_split(inputs, [0, 2], binding.Device.current("cpu"))
    prepared.run()
    lengths = next(b for b in prepared.scratch if b.dim() == 1 and len(b) == BATCH.num_qo_tokens and b.min() > 0)
    own = [1, 2, 3, 4 + 1, 5 + 1, 6 + 1]  # the window, and one compressed row from the fourth token on
    assert lengths.tolist() == [1, 1, *own, 1]
