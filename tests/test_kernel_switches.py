"""Where FlashMLA's SM100 kernels change with the width of a selection."""

from __future__ import annotations

import pytest

from mla_tune.hardware.datasheet import SM90, SM100, architecture
from mla_tune.sites.engines import Engine, launched_site
from mla_tune.sites.kernel_switches import has_schedule, switch_contexts
from mla_tune.sites.shape import Shape, workload
from mla_tune.sites.site import DEEPSEEK_V3_2, DEEPSEEK_V4_FLASH, DEEPSEEK_V4_PRO, LayerType, ModelConfig, SiteName

_K = 1024


@pytest.mark.parametrize(
    ("model", "layer", "context", "scheduled"),
    [
        (DEEPSEEK_V4_FLASH, LayerType.SWA_ONLY, 1 << 20, False),
        (DEEPSEEK_V4_FLASH, LayerType.C4A, 1 << 20, False),
        (DEEPSEEK_V4_FLASH, LayerType.C128A, 64 * _K, False),
        (DEEPSEEK_V4_FLASH, LayerType.C128A, 72 * _K, True),
        (DEEPSEEK_V4_PRO, LayerType.C4A, 2 * _K, True),
        (DEEPSEEK_V3_2, LayerType.DSA, 2 * _K, True),
    ],
)
def test_on_sm100_a_query_of_at_most_640_entries_is_not_split(
    model: ModelConfig, layer: LayerType, context: int, scheduled: bool
) -> None:
    site = model.site(SiteName.PREFILL_ATTENTION, layer)
    assert has_schedule(site, SM100, context) is scheduled
    assert has_schedule(site, SM90, context)
    assert has_schedule(site, None, context)  # any other GPU is taken to do as Hopper does


@pytest.mark.parametrize(("h_q", "switches"), [(64, 1), (128, 2)])
def test_switch_contexts_are_pairs_right_below_and_above_a_change(h_q: int, switches: int) -> None:
    site = DEEPSEEK_V4_PRO.site(SiteName.PREFILL_ATTENTION, LayerType.C128A, h_q)
    contexts = switch_contexts(site, SM100)
    assert len(contexts) == 2 * switches
    assert [has_schedule(site, SM100, context) for context in contexts[:2]] == [False, True]
    widths = [workload(site, Shape(1, 1, context)).index_width for context in contexts]
    if switches == 2:
        assert widths[2] <= 1280 < widths[3]
    assert switch_contexts(site, SM90) == ()


@pytest.mark.parametrize(
    ("sku", "found"),
    [
        *(("nvidia-h200", SM90), ("nvidia-h100-pcie", SM90), ("nvidia-gh200-480gb", SM90), ("nvidia-b300", SM100)),
        *(("nvidia-gb200", SM100), ("nvidia-l4", None), ("nvidia-rtx-pro-6000-blackwell", None), ("cpu", None)),
    ],
)
def test_an_architecture_is_told_from_the_name_of_a_product_and_of_its_other_forms(sku: str, found: str | None) -> None:
    assert architecture(sku) == found


@pytest.mark.parametrize(("engine", "padded"), [(Engine.SGLANG, 128), (Engine.OWN, 128), (Engine.VLLM, 64)])
def test_sglang_alone_pads_v3_2_to_128_heads_for_the_workspace_path_on_sm100(engine: Engine, padded: int) -> None:
    site = DEEPSEEK_V3_2.site(SiteName.PREFILL_ATTENTION, LayerType.DSA, 64)
    assert launched_site(engine, site, "sparse_fwd", SM100).h_q == padded
    assert launched_site(engine, site, "with_kvcache", SM100) == site
    assert launched_site(engine, site, "sparse_fwd", SM90) == site
    v4 = DEEPSEEK_V4_PRO.site(SiteName.PREFILL_ATTENTION, LayerType.C4A, 64)
    assert launched_site(engine, v4, "sparse_fwd", SM100) == v4
