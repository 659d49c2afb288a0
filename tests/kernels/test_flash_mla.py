"""The FlashMLA adapter: either distribution gets the arguments it wants and gives the reference's answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings

from mla_tune.bench.numerics import BF16_ATTENTION, mismatch
from mla_tune.kernels import (
    binding,
    indexer,
    sparse_fwd,
    sparse_fwd_fused,
    sparse_fwd_selected,
    with_kvcache,
)
from mla_tune.kernels.adapters import flash_mla
from mla_tune.kernels.adapters.flash_mla import FlashMla
from mla_tune.kernels.inputs import AttentionInputs, InputBuilder
from mla_tune.kernels.prepared import PreparedPath
from mla_tune.kernels.reference import paged_attention_reference
from mla_tune.sites.candidates import candidate_at, names_at
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import LayerType, Site, SiteName
from tests.kernels.flash_mla_stand_in import Recorder, stand_in
from tests.shapes import every_site, shapes

attention_sites = every_site(SiteName.PREFILL_ATTENTION)


SPARSE = {
    "sparse_fwd": sparse_fwd.prepare,
    "sparse_fwd_fused": sparse_fwd_fused.prepare,
    "sparse_fwd_selected": sparse_fwd_selected.prepare,
}


def prepare(inputs: AttentionInputs, name: str, kernels: FlashMla) -> PreparedPath:
    if name in SPARSE:
        return SPARSE[name](inputs, kernels)
    return with_kvcache.prepare(inputs, kernels, candidate_at(inputs.site, name))


def reference(inputs: AttentionInputs) -> torch.Tensor:
    return paged_attention_reference(inputs.q, inputs.selections(), inputs.sm_scale, inputs.attn_sink)[0]


@settings(max_examples=3)
@given(shape=shapes(max_reqs=3, max_extend=6, max_context=900))
@example(shape=Shape(1, 1, 1))
@example(shape=Shape(2, 5, 9001))
@pytest.mark.parametrize("switch", [False, True], ids=["upstream", "with_switch"])
@pytest.mark.parametrize("site", attention_sites, ids=lambda site: site.key)
def test_both_kernels_give_the_references_answer_through_the_adapter(site: Site, switch: bool, shape: Shape) -> None:
    inputs = InputBuilder(torch.device("cpu")).attention(site, shape)
    recorder = Recorder()
    kernels = FlashMla(9, stand_in(switch, recorder))
    for name in names_at(site):
        prepared = prepare(inputs, name, kernels)
        prepared.run()
        assert prepared.result().shape == (shape.num_qo_tokens, site.h_q, 512)
        assert mismatch(prepared.result(), reference(inputs), BF16_ATTENTION) is None, name
    assert recorder.calls


@pytest.mark.parametrize("site", attention_sites, ids=lambda site: site.key)
def test_v4_passes_its_window_first_and_v3_2_its_selection_alone_and_without_lengths(site: Site) -> None:
    inputs = InputBuilder(torch.device("cpu")).attention(site, Shape(2, 5, 900))
    recorder = Recorder()
    prepare(inputs, "with_kvcache", FlashMla(9, stand_in(True, recorder))).run()
    selections = inputs.selections()
    for call in recorder.calls:
        assert call["indices"][:, 0].equal(selections[0].slot_ids)
        if site.layer is LayerType.DSA:
            assert call["topk_length"] is None
            continue
        assert call["topk_length"].equal(inputs.window_counts)
        if site.layer is LayerType.SWA_ONLY:
            assert call["extra_k_cache"] is call["extra_indices_in_kvcache"] is call["extra_topk_length"] is None
            continue
        assert call["extra_indices_in_kvcache"][:, 0].equal(selections[1].slot_ids)
        assert call["extra_topk_length"].equal(inputs.selected_counts)
        assert call["extra_k_cache"].shape[1] == site.layer.page_size


@pytest.mark.parametrize("num_qo_tokens", [1, 5])
def test_the_mixed_call_is_one_batch_entry_with_all_query_tokens(num_qo_tokens: int) -> None:
    site = next(site for site in attention_sites if site.layer is LayerType.DSA)
    inputs = InputBuilder(torch.device("cpu")).attention(site, Shape(1, num_qo_tokens, 900))
    recorder = Recorder()
    for name in ("with_kvcache", "with_kvcache_mixed"):
        prepare(inputs, name, FlashMla(9, stand_in(True, recorder))).run()
    each, one = (
        [call for call in recorder.calls if call["q"].shape[:2] == shape]
        for shape in ((num_qo_tokens, 1), (1, num_qo_tokens))
    )
    assert each
    assert one
    for call in one:
        assert call["q"].flatten(0, 1).equal(inputs.q)
        assert call["indices"].flatten(0, 1).equal(inputs.selections()[0].slot_ids)
        assert call["topk_length"] is call["cache_seqlens"] is None


@pytest.mark.parametrize("site", attention_sites, ids=lambda site: site.key)
def test_only_v3_2_has_the_mixed_call(site: Site) -> None:
    assert ("with_kvcache_mixed" in names_at(site)) == (site.layer is LayerType.DSA)


@pytest.mark.parametrize("major", [9, 10])
@pytest.mark.parametrize("layer", [LayerType.DSA, LayerType.C4A])
def test_every_call_takes_the_legacy_binary_as_sglang_does_on_both_architectures(major: int, layer: LayerType) -> None:
    site = next(site for site in attention_sites if site.layer is layer)
    inputs = InputBuilder(torch.device("cpu")).attention(site, Shape(1, 3, 300))
    recorder = Recorder()
    for name in names_at(site):
        prepare(inputs, name, FlashMla(major, stand_in(True, recorder))).run()
    kernels = {("kv" if "kv" in call else "k_cache", call["use_legacy"]) for call in recorder.calls}
    assert kernels == {("kv", True), ("k_cache", True)}


@pytest.mark.parametrize("candidate", ["with_kvcache", "with_kvcache_mixed"])
def test_the_schedule_stage_plans_anew_each_time_and_attention_reuses_one_plan(candidate: str) -> None:
    site = next(site for site in attention_sites if candidate in names_at(site))
    inputs = InputBuilder(torch.device("cpu")).attention(site, Shape(1, 3, 300))
    recorder = Recorder()
    schedule, attention = prepare(inputs, candidate, FlashMla(9, stand_in(False, recorder))).stages

    def plans(run: Callable[[], object] | None) -> list[object]:
        assert run is not None
        recorder.calls.clear()
        for _ in range(3):
            run()
        return [call["tile_scheduler_metadata"] for call in recorder.calls]

    assert len({id(plan) for plan in plans(schedule.run)}) == 3
    reused = {id(plan) for plan in [*plans(attention.run), *plans(schedule.baseline)]}
    assert len(reused) == 1
    assert attention.baseline is None


@pytest.mark.parametrize("major", [8, 12])
def test_an_architecture_without_kernels_is_named(major: int) -> None:
    reason = FlashMla(major, stand_in(False, Recorder())).unsupported(64)
    assert reason == f"FlashMLA has kernels for sm90 and sm100; this GPU is sm{major}0"


@pytest.mark.parametrize("h_q", [0, 16, 32, 65, 256])
def test_head_counts_that_the_kernels_lack_are_named_with_what_to_do(h_q: int) -> None:
    reason = FlashMla(9, stand_in(False, Recorder())).unsupported(h_q)
    assert reason == f"FlashMLA takes 64 or 128 query heads, not {h_q}: pad them"


@pytest.mark.parametrize("major", [9, 10])
@pytest.mark.parametrize(("legacy", "lacking"), [(None, False), (True, False), (False, True)])
def test_a_build_without_its_legacy_binary_serves_no_site(legacy: bool | None, lacking: bool, major: int) -> None:
    reason = FlashMla(major, stand_in(legacy is not None, Recorder(), legacy)).unsupported(64)
    lacks = "this sgl-flash-mla was built without its legacy kernels (sm90, V3.2 and V4 cache formats)"
    assert reason == (lacks if lacking else None)


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in ("flash_mla", "deep_gemm"):
        monkeypatch.setitem(sys.modules, module, None)
    binding.flash_mla_missing.cache_clear()
    indexer.deep_gemm_missing.cache_clear()
    yield
    binding.flash_mla_missing.cache_clear()
    indexer.deep_gemm_missing.cache_clear()


@pytest.mark.usefixtures("no_libraries")
@pytest.mark.parametrize("site", every_site(), ids=lambda site: site.key)
def test_without_the_libraries_a_gpu_says_which_package_is_missing_and_how_to_get_it(site: Site) -> None:
    gpu = binding.Device("cuda", 9, 132)
    for name in names_at(site):
        reason = binding.unsupported(site, name, gpu)
        if name == "jit":
            assert reason is None
            continue
        package = "deep_gemm" if name == "deep_gemm" else "flash_mla"
        assert reason is not None
        assert reason.startswith(f"{package} cannot be imported (")
        assert reason.endswith(": pip install 'mla-tune[gpu]'")
        assert "\n" not in reason


def test_a_library_that_does_not_load_is_missing_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_mla.py").write_text("raise OSError('libcudart.so.13: cannot open\\nsecond line')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_mla", raising=False)
    reason = flash_mla.missing()
    assert reason == "flash_mla cannot be imported (libcudart.so.13: cannot open): pip install 'mla-tune[gpu]'"
