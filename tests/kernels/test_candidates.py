"""Both candidates of every site give the reference's answer on the CPU, in the stages that the fit adds up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mla_tune.kernels import binding
from mla_tune.kernels.formats import page_parts
from mla_tune.kernels.inputs import AttentionInputs, InputBuilder
from mla_tune.kernels.prepared import PreparedPath
from mla_tune.sites.candidates import names_at, stages
from mla_tune.sites.shape import AnyShape, RaggedShape, Shape
from mla_tune.sites.site import Site, SiteName
from mla_tune.sites.stages import Amortization
from mla_tune.sweep.worker.correctness import AttentionJudge, IndexerJudge, Judge
from tests.shapes import every_site, ragged_shapes, shapes

CPU = torch.device("cpu")
DEVICE = binding.Device("cpu", 0, sm_count=7)  # seven unequal shares of the indexer's schedule
NAN_BYTE = 0xFF
FILLS_A_BUFFER = {
    *("dequantize_compressed", "dequantize_window", "combine", "prepare"),
    *("mark", "compact", "dequantize_selected"),
}
attention_sites = every_site(SiteName.PREFILL_ATTENTION)


def judge_of(site: Site, shape: AnyShape) -> Judge:
    builder = InputBuilder(CPU)
    if site.name is SiteName.INDEXER_METADATA:
        return IndexerJudge(site, builder.context_lens(site, shape), DEVICE)
    return AttentionJudge(builder.attention(site, shape), DEVICE, rows=shape.num_qo_tokens)


def poison_what_no_query_attends_to(inputs: AttentionInputs) -> int:
    """Turn those cache rows into NaN and give their number."""
    poisoned = 0
    for part in inputs.selections():
        unused = torch.ones(part.cache.shape[0] * part.page_size, dtype=torch.bool)
        unused[part.slot_ids[part.slot_ids >= 0].long()] = False
        pages = unused.view(-1, part.page_size)
        parts = page_parts(part.cache, part.fmt, part.page_size)
        for view in (parts.nope, parts.scales, parts.rope):
            view[pages] = NAN_BYTE
        poisoned += int(unused.sum())
    return poisoned


@settings(max_examples=5)
@given(shape=shapes(max_reqs=4, max_extend=6, max_context=1200) | ragged_shapes(4, 6, 1200))
@example(shape=Shape(1, 1, 1))  # nothing to select, a window of one
@example(shape=Shape(1, 5, 100))  # shorter than the window
@example(shape=Shape(3, 3, 400))  # one query a request, as in decoding; requests of different lengths
@example(shape=Shape(2, 7, 7))  # no context but the new tokens
@example(shape=Shape(1, 2, 9000))  # more rows than top-k
@example(shape=RaggedShape(((1, 2900), (9, 9), (2, 130))))  # a short extend, a fresh prompt, one in between
@pytest.mark.parametrize("site", every_site(), ids=lambda site: site.key)
def test_every_candidate_gives_the_references_answer(site: Site, shape: AnyShape) -> None:
    judge = judge_of(site, shape)
    for name in names_at(site):
        assert binding.unsupported(site, name, DEVICE) is None
        prepared = judge.prepare(name)
        judge.poison()
        prepared.run()
        assert judge.verdict(prepared.result()) is None, name


@settings(max_examples=4)
@given(shape=shapes(max_reqs=3, max_extend=6, max_context=1500))
@example(shape=Shape(3, 5, 9001))
@pytest.mark.parametrize("site", attention_sites, ids=lambda site: site.key)
def test_cache_rows_that_no_query_attends_to_do_not_matter(site: Site, shape: Shape) -> None:
    inputs = InputBuilder(CPU).attention(site, shape)
    judge = AttentionJudge(inputs, DEVICE, rows=shape.num_qo_tokens)
    before = {}
    for name in names_at(site):
        prepared = judge.prepare(name)
        prepared.run()
        before[name] = prepared.result().clone()
    assume(poison_what_no_query_attends_to(inputs) > 0)  # not so where pages happen to be full of what is attended to
    for name, output in before.items():
        prepared = judge.prepare(name)
        prepared.run()
        assert prepared.result().equal(output), name


@pytest.mark.parametrize("site", attention_sites, ids=lambda site: site.key)
def test_a_cache_row_that_is_attended_to_does_matter(site: Site) -> None:
    inputs = InputBuilder(CPU).attention(site, Shape(2, 6, 900))
    judge = AttentionJudge(inputs, DEVICE)
    for cache in (inputs.window, inputs.compressed):
        if cache is not None:
            cache.data.fill_(NAN_BYTE)
    for name in names_at(site):
        prepared = judge.prepare(name)
        prepared.run()
        assert judge.verdict(prepared.result()) is not None, name


@pytest.mark.parametrize("site", every_site(), ids=lambda site: site.key)
def test_bound_stages_are_those_of_the_shared_list_in_its_order(site: Site) -> None:
    judge = judge_of(site, Shape(2, 5, 300))
    for name in names_at(site):
        prepared = judge.prepare(name)
        assert prepared.candidate == name
        assert tuple(bound.stage for bound in prepared.stages) == stages(site, name)
        assert [*prepared.per_forward(), *prepared.per_layer()] == list(prepared.stages)
        assert all(bound.stage.amortization is Amortization.PER_LAYER for bound in prepared.per_layer())


@pytest.mark.parametrize("site", attention_sites, ids=lambda site: site.key)
def test_a_layer_can_be_run_again_without_what_its_forward_ran_once(site: Site) -> None:
    judge = judge_of(site, Shape(2, 5, 700))
    for name in names_at(site):
        prepared = judge.prepare(name)
        prepared.run()
        first = prepared.result().clone()
        for _ in range(2):
            for bound in prepared.per_layer():
                bound.run()
        assert prepared.result().equal(first), name


@pytest.mark.parametrize("site", attention_sites, ids=lambda site: site.key)
def test_kept_buffers_are_counted(site: Site) -> None:
    judge = judge_of(site, Shape(2, 5, 700))
    for name in names_at(site):
        prepared = judge.prepare(name)
        assert prepared.buffer_bytes() == sum(buffer.nbytes for buffer in prepared.buffers)
        assert (prepared.buffer_bytes() == 0) == name.startswith("with_kvcache")


@pytest.mark.parametrize("site", attention_sites, ids=lambda site: site.key)
def test_what_a_stage_leaves_of_the_poison_is_a_wrong_result(site: Site) -> None:
    judge = judge_of(site, Shape(2, 5, 700))
    for name in names_at(site):
        prepared = judge.prepare(name)
        prepared.poison()
        prepared.run()
        assert judge.verdict(prepared.result()) is None
        for skipped in {bound.stage.name for bound in prepared.stages} & FILLS_A_BUFFER:
            prepared.poison()
            for bound in prepared.stages:
                if bound.stage.name != skipped:
                    bound.run()
            assert judge.verdict(prepared.result()) is not None, (name, skipped)
            prepared.run()  # a run that was cut short may leave marks behind


def test_a_result_before_the_first_run_is_refused() -> None:
    prepared: PreparedPath = judge_of(attention_sites[0], Shape(1, 1, 1)).prepare("sparse_fwd")
    with pytest.raises(RuntimeError, match="sparse_fwd has not run yet"):
        prepared.result()


@pytest.mark.parametrize("site", attention_sites, ids=lambda site: site.key)
def test_the_judge_names_a_wrong_and_an_unwritten_row(site: Site) -> None:
    judge = judge_of(site, Shape(2, 5, 700))
    prepared = judge.prepare("sparse_fwd")
    prepared.run()
    for value, said in ((float("nan"), "unwritten"), (7.0, "relative error")):
        output = prepared.result().clone()
        output[3] = value
        assert said in (judge.verdict(output) or "")


@settings(max_examples=20)
@given(st.integers(0, 1 << 30))
def test_the_indexers_judge_refuses_a_schedule_with_one_entry_moved(seed: int) -> None:
    judge = judge_of(every_site(SiteName.INDEXER_METADATA)[0], Shape(2, 40, 90000))
    prepared = judge.prepare("jit")
    prepared.run()
    output = prepared.result().clone()
    assert judge.verdict(output) is None
    entry = seed % output.shape[0]
    output[entry, seed % 2] += 2  # by one, two SMs may only have changed their shares
    assert judge.verdict(output) is not None
    assert "differs from the reference's" in (judge.verdict(output[:-1]) or "")
