"""A batch run in two parts gives the reference's answer, whichever requests go where, and leaves nothing unwritten."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.kernels import split_batch as split
from mla_tune.kernels.adapters.flash_mla import FlashMla
from mla_tune.kernels.binding import Device
from mla_tune.kernels.inputs import AttentionInputs, InputBuilder
from mla_tune.kernels.prepared import PreparedPath
from mla_tune.sites.candidates import split_stages
from mla_tune.sites.shape import RaggedShape
from mla_tune.sites.site import Site, SiteName
from mla_tune.sites.stages import Amortization
from mla_tune.sweep.worker.correctness import AttentionJudge
from tests.kernels.flash_mla_stand_in import Recorder, stand_in
from tests.shapes import every_site, ragged_shapes

CPU = torch.device("cpu")
DEVICE = Device("cpu", 0, sm_count=1)
SITES = [site for site in every_site(SiteName.PREFILL_ATTENTION) if site.h_q == 64]
MIXED = RaggedShape(((2, 2900), (9, 9), (1, 700), (3, 140)))
LAYERS = ("swa_only", "c4a", "c128a", "dsa")


def site_of(layer: str) -> Site:
    return next(site for site in SITES if site.layer == layer)


def judged(inputs: AttentionInputs, prepared: PreparedPath) -> str | None:
    """The judge's verdict on every row, after two runs over poisoned memory."""
    judge = AttentionJudge(inputs, DEVICE, rows=inputs.q.shape[0])
    for _ in range(2):
        judge.poison()
        prepared.poison()
        prepared.run()
    return judge.verdict(prepared.result())


@st.composite
def batches(draw: st.DrawFn) -> tuple[RaggedShape, set[int]]:
    """A forward of two to four requests, and some of them, but not all."""
    shape = draw(ragged_shapes(4, 8, 1200).filter(lambda shape: shape.num_reqs > 1))
    chosen = draw(st.permutations(range(shape.num_reqs)))
    return shape, set(chosen[: draw(st.integers(1, shape.num_reqs - 1))])


@settings(max_examples=12)
@given(batches())
@example((MIXED, {0, 2, 3}))  # the fresh prompt is the host; the other part's rows do not lie together
@example((MIXED, {2, 3}))  # they do
@example((MIXED, {1, 3}))  # no fresh prompt for the workspace, and no part lies together
@example((MIXED, {0, 1}))  # no fresh prompt, both lie together
@pytest.mark.parametrize("layer", LAYERS)
def test_a_split_batch_gives_the_references_answer(layer: str, batch: tuple[RaggedShape, set[int]]) -> None:
    shape, cached = batch
    inputs = InputBuilder(CPU).attention(site_of(layer), shape)
    assert judged(inputs, split.prepare(inputs, sorted(cached), None)) is None


@pytest.mark.parametrize("cached", [{0, 2, 3}, {2, 3}, {1, 3}], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_split_batch_calls_flash_mla_by_its_rules(layer: str, cached: set[int]) -> None:
    recorder = Recorder()
    inputs = InputBuilder(CPU).attention(site_of(layer), MIXED)
    kernels = FlashMla(9, stand_in(True, recorder))
    assert judged(inputs, split.prepare(inputs, sorted(cached), kernels)) is None
    sparse = next(call for call in recorder.calls if "kv" in call)
    in_place = 1 not in cached
    others = sum(extend for i, (extend, _) in enumerate(MIXED.requests) if i not in cached)
    assert sparse["q"].shape[0] == (MIXED.num_qo_tokens if in_place else others)
    if in_place:  # the rows of the other part attend to one entry each
        assert int((sparse["topk_length"] == 1).sum()) >= MIXED.num_qo_tokens - others


@pytest.mark.parametrize("layer", LAYERS)
def test_a_part_dequantizes_the_rows_of_its_own_requests_only(layer: str) -> None:
    inputs = InputBuilder(CPU).attention(site_of(layer), MIXED)
    prepared = split.prepare(inputs, [0, 2, 3], None)
    workspace, *_ = prepared.scratch
    assert 0 < workspace.shape[0] <= 2 * 9


def test_a_wrong_part_is_found() -> None:
    inputs = InputBuilder(CPU).attention(site_of("c4a"), MIXED)
    prepared = split.prepare(inputs, [0, 2, 3], None)
    prepared.run()
    judge = AttentionJudge(inputs, DEVICE, rows=inputs.q.shape[0])
    assert judge.verdict(prepared.result()) is None
    prepared.result()[-1] *= 2
    assert judge.verdict(prepared.result()) is not None


def test_stages_carry_their_candidates_names_and_amortization_and_the_merge_is_last() -> None:
    inputs = InputBuilder(CPU).attention(site_of("c4a"), MIXED)
    bound = split.prepare(inputs, [0, 2, 3], None).stages
    kinds = {entry.stage.name: entry.stage.amortization for entry in bound}
    assert len(kinds) == len(bound)
    assert [entry.stage for entry in bound] == list(split_stages(site_of("c4a")))
    assert [*kinds][-1] == "merge"
    assert kinds["sparse_fwd.window_ids"] is Amortization.PER_FORWARD
    assert kinds["with_kvcache.schedule"] is Amortization.PER_LAYER_TYPE
    assert kinds["gather"] is kinds["merge"] is Amortization.PER_LAYER
    together = split.prepare(inputs, [2, 3], None).stages
    assert "gather" not in [entry.stage.name for entry in together]


@pytest.mark.parametrize("cached", [[], [0, 1, 2, 3], [4], [-1]], ids=str)
def test_a_part_without_requests_is_refused_in_one_line(cached: list[int]) -> None:
    inputs = InputBuilder(CPU).attention(site_of("swa_only"), MIXED)
    with pytest.raises(UsageError, match="a split needs requests in both parts") as caught:
        split.prepare(inputs, cached, None)
    assert "\n" not in str(caught.value)
