"""vLLM's V4 layer: both ways to prefill give the reference's answer through vLLM's own metadata and kernels."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mla_tune.bench.numerics import BF16_ATTENTION, mismatch
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import MODELS, LayerType, SiteName
from tests.engines.vllm.conftest import counted, made_by, other_kernels, use_policy, v4_config, vllm_config

pytestmark = pytest.mark.usefixtures("serving")

RATIOS = {LayerType.SWA_ONLY: 1, LayerType.C4A: 4, LayerType.C128A: 128}
FLASH = MODELS["deepseek-v4-flash"]


ATTRIBUTES = (
    *("compress_ratio", "padded_heads", "window_size", "max_image_tokens", "max_num_batched_tokens"),
    *("scale", "attn_sink", "topk_indices_buffer"),
)


def layer(module: ModuleType, layer_type: LayerType, config: Any = None, **changes: Any) -> Any:
    """A layer of V4-Flash after its hooked constructor; what that would load and allocate is left out."""
    import torch

    attributes = {
        "compress_ratio": RATIOS[layer_type],
        "padded_heads": 64,
        "window_size": 128,
        "max_image_tokens": 0,
        "max_num_batched_tokens": 64,
        "scale": 512**-0.5,
        "attn_sink": None,
        "topk_indices_buffer": torch.full((64, 512), -1, dtype=torch.int32),
    }

    assert set(attributes) == set(ATTRIBUTES)
    made = object.__new__(module.DeepseekV4FlashMLAAttention)

    def construct(**_: Any) -> None:
        torch.nn.Module.__init__(made)
        for name, value in (attributes | changes).items():
            setattr(made, name, value)

    made_by(construct, made)(vllm_config=config or vllm_config())
    return made


class Workspaces:
    """vLLM's workspace, which a worker makes."""

    def get_simultaneous(self, *specs: Any) -> list[Any]:
        import torch

        return [torch.empty(shape, dtype=dtype) for shape, dtype in specs]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, v4: ModuleType) -> list[str]:
    """The kernels that ran, in order; FlashMLA's two are answered in torch."""
    import importlib

    from tests.kernels.flash_mla_stand_in import Recorder, stand_in

    flash_mla: Any = stand_in(False, Recorder())
    ran: list[str] = []

    def answer(name: str) -> Any:
        def kernel(*args: Any, out: Any, **kwargs: Any) -> Any:
            found = getattr(flash_mla, name)(*args, **kwargs)
            out.copy_(found[0])
            ran.append(name.removeprefix("flash_mla_"))
            return found

        return kernel

    for name in ("flash_mla_sparse_fwd", "flash_mla_with_kvcache"):
        monkeypatch.setattr(v4, name, answer(name))
    for module in ("vllm.v1.attention.ops.flashmla", "vllm.v1.attention.backends.mla.sparse_swa"):
        monkeypatch.setattr(importlib.import_module(module), "get_mla_metadata", flash_mla.get_mla_metadata)
    monkeypatch.setattr(v4, "current_workspace_manager", Workspaces)
    return ran


class Forward:
    """One forward of our inputs in vLLM's terms, behind ``decodes`` requests that decode; the metadata is vLLM's own."""

    def __init__(self, layer_type: LayerType, shape: Shape, decodes: int = 0) -> None:
        import torch

        from mla_tune.kernels.inputs import InputBuilder

        self.decodes = decodes
        site = FLASH.site(SiteName.PREFILL_ATTENTION, layer_type)
        self.inputs = inputs = InputBuilder(torch.device("cpu")).attention(site, shape)
        new = [1] * decodes + shape.extend_lens()
        self.starts = torch.tensor([0, *new]).cumsum(0).int()
        self.seq_lens = torch.cat([torch.full((decodes,), 5), inputs.seq_lens]).int()
        self.swa_metadata = self._swa_metadata()
        self.attn_metadata = None if inputs.compressed is None else self._attn_metadata()

    def _tables(self, cache: Any) -> Any:
        """Block table of every request; decodes read block 0."""
        import torch

        ahead = torch.zeros((self.decodes, cache.page_table.shape[1]), dtype=torch.int32)
        return torch.cat([ahead, cache.page_table.clamp_min(0)])

    def _common(self, tables: Any) -> Any:
        import torch
        from vllm.v1.attention.backend import CommonAttentionMetadata

        count = int(self.starts[-1])
        return CommonAttentionMetadata(
            query_start_loc=self.starts,
            query_start_loc_cpu=self.starts,
            seq_lens=self.seq_lens,
            num_reqs=len(self.seq_lens),
            num_actual_tokens=count,
            max_query_len=int(self.starts.diff().max()),
            max_seq_len=int(self.seq_lens.max()),
            block_table_tensor=tables,
            slot_mapping=torch.arange(count),
            seq_lens_cpu_upper_bound=self.seq_lens,
            positions=torch.cat([torch.full((self.decodes,), 4), self.inputs.positions]).long(),
        )

    def _swa_metadata(self) -> Any:
        import torch
        from vllm.v1.attention.backends.mla.sparse_swa import DeepseekSparseSWAMetadataBuilder

        builder: Any = object.__new__(DeepseekSparseSWAMetadataBuilder)

        def ints(*size: int) -> Any:
            return torch.zeros(size, dtype=torch.int32)

        builder.__dict__ |= {
            "decode_threshold": 1,
            "window_size": 128,
            "prefill_index_width": 128,
            "max_image_tokens": 0,
            "block_size": 256,
            "max_model_len": 1 << 14,
            "max_num_batched_tokens": 64,
            "is_dspark": False,
            "noncausal_index_width": 0,
            "_layer_types": set(),
            "device": torch.device("cpu"),
            "token_to_req_indices": ints(64),
            "decode_swa_indices": ints(64, 1, 128),
            "decode_swa_lens": ints(64),
            "prefill_swa_indices": ints(64, 1, 128),
            "prefill_swa_lens": ints(64),
            "is_valid_token": torch.zeros(64, dtype=torch.bool),
            "no_replay_start": ints(64),
        }
        return builder.build(0, self._common(self._tables(self.inputs.window)))

    def _attn_metadata(self) -> Any:
        import torch
        from vllm.models.deepseek_v4.sparse_mla import build_c128a_topk_metadata

        tables = self._tables(self.inputs.compressed)
        local = None
        if self.inputs.site.layer is LayerType.C128A:
            width = 128
            common = self._common(tables)
            _, _, local = build_c128a_topk_metadata(
                common.positions,
                128,
                self.decodes,
                self.swa_metadata.token_to_req_indices,
                tables[: self.decodes],
                2,
                common.slot_mapping,
                torch.empty((64, width), dtype=torch.int32),
                torch.empty(64, dtype=torch.int32),
                torch.empty((64, width), dtype=torch.int32),
                max_compressed_tokens=width,
            )
        return SimpleNamespace(block_table=tables, block_size=256, c128a_prefill_topk_indices=local)

    def run(self, of: Any) -> Any:
        """``_forward_prefill`` of the layer ``of``, called as vLLM's ``forward_mqa`` does; its output."""
        import torch

        from mla_tune.kernels.formats import paged_view

        inputs, first = self.inputs, self.decodes
        of.attn_sink = inputs.attn_sink
        if inputs.topk_indices is not None:
            of.topk_indices_buffer[first : first + len(inputs.q)] = inputs.topk_indices
        views = [
            None if cache is None else paged_view(cache.data, cache.fmt, cache.page_size).squeeze(2)
            for cache in (inputs.compressed, inputs.window)
        ]
        output = torch.full_like(inputs.q, float("nan"))
        of._forward_prefill(
            q=inputs.q,
            positions=inputs.positions,
            compressed_k_cache=views[0],
            swa_k_cache=views[1],
            output=output,
            attn_metadata=self.attn_metadata,
            swa_metadata=self.swa_metadata,
        )
        return output

    def wrong(self, output: Any) -> str | None:
        """How ``output`` differs from the reference; None if it does not."""
        from mla_tune.kernels.reference import paged_attention_reference

        inputs = self.inputs
        expected = paged_attention_reference(inputs.q, inputs.selections(), inputs.sm_scale, inputs.attn_sink)[0]
        return mismatch(output, expected, BF16_ATTENTION)


@pytest.mark.parametrize("decodes", [0, 2])
@pytest.mark.parametrize("layer_type", RATIOS)
@pytest.mark.parametrize("path", ["with_kvcache", "sparse_fwd"])
def test_either_path_gives_the_references_answer(
    path: str, layer_type: LayerType, decodes: int, v4: ModuleType, calls: list[str], serving: pytest.MonkeyPatch
) -> None:
    serving.setenv("MLA_TUNE_MODE", f"pin:{path}")
    forward = Forward(layer_type, Shape(2, 4, 300), decodes)
    output = forward.run(layer(v4, layer_type))
    assert set(calls) == {path}
    assert forward.wrong(output) is None


def test_a_prefill_takes_what_the_policy_says_for_its_layer_type(
    v4: ModuleType, calls: list[str], serving: pytest.MonkeyPatch
) -> None:
    expected = {LayerType.SWA_ONLY: "sparse_fwd", LayerType.C4A: "with_kvcache"}
    layers = {layer_type: layer(v4, layer_type) for layer_type in expected}
    # 20 query tokens lie below the crossover of every table; what is swept there is at least 2048 context tokens.
    for layer_type, context in ((LayerType.SWA_ONLY, 2000), (LayerType.C4A, 2100)):
        forward = Forward(layer_type, Shape(1, 20, context))
        calls.clear()
        assert forward.wrong(forward.run(layers[layer_type])) is None
        assert set(calls) == {expected[layer_type]}


def test_layers_of_a_type_share_one_decision_one_schedule_and_what_selects_alike(
    v4: ModuleType, calls: list[str], serving: pytest.MonkeyPatch
) -> None:
    schedules: list[Any] = []
    selections: list[int] = []
    kernel, select = v4.flash_mla_with_kvcache, v4.compute_global_topk_indices_and_lens

    def watched_kernel(**arguments: Any) -> Any:
        schedules.append(arguments["tile_scheduler_metadata"])
        return kernel(**arguments)

    def watched_selection(*arguments: Any) -> Any:
        selections.append(1)
        return select(*arguments)

    serving.setattr(v4, "flash_mla_with_kvcache", watched_kernel)
    serving.setattr(v4, "compute_global_topk_indices_and_lens", watched_selection)
    for layer_type, expected in ((LayerType.C4A, 3), (LayerType.C128A, 1)):
        schedules.clear()
        selections.clear()
        forward = Forward(layer_type, Shape(1, 20, 2100))
        before = counted()[0].get("with_kvcache", 0) if layer_type is LayerType.C128A else 0
        for _ in range(3):
            assert forward.wrong(forward.run(layer(v4, layer_type))) is None
        assert len({id(schedule) for schedule in schedules}) == 1
        assert len(selections) == expected
        assert counted()[0]["with_kvcache"] - before == 1


def test_a_kernel_that_finds_no_memory_costs_that_forward_alone_since_other_ranks_know_nothing_of_it(
    v4: ModuleType, calls: list[str], serving: pytest.MonkeyPatch
) -> None:
    import torch

    def full(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    serving.setenv("MLA_TUNE_MODE", "pin:with_kvcache")
    kernel = v4.flash_mla_with_kvcache
    made = layer(v4, LayerType.C4A)
    serving.setattr(v4, "flash_mla_with_kvcache", full)
    forward = Forward(LayerType.C4A, Shape(1, 6, 300))
    assert forward.wrong(forward.run(made)) is None
    assert calls == ["sparse_fwd"]
    serving.setattr(v4, "flash_mla_with_kvcache", kernel)
    for count in (6, 5):
        calls.clear()
        forward = Forward(LayerType.C4A, Shape(1, count, 300))
        assert forward.wrong(forward.run(made)) is None
        assert calls == ["with_kvcache"]
    assert counted()[1] == {"no_memory": 1}


def test_what_the_kernel_needs_is_asked_for_while_vllm_measures_its_memory(
    v4: ModuleType, serving: pytest.MonkeyPatch
) -> None:
    import torch

    from mla_tune.integrations.vllm import prefill_hooks

    asked: list[int] = []
    serving.setattr(prefill_hooks, "reserve", lambda most, bytes_of: asked.append(bytes_of(most)))
    serving.setattr(v4, "get_forward_context", lambda: SimpleNamespace(attn_metadata=None))
    serving.setattr(v4, "current_workspace_manager", Workspaces)
    made = layer(v4, LayerType.C4A, max_model_len=4096)
    query = torch.zeros((64, 64, 512), dtype=torch.bfloat16)
    made.forward_mqa(query, query, torch.zeros(64), torch.empty_like(query))
    assert asked[0] >= 64 * 64 * 513 * 4, "a float32 partial result of every head of every query"


def test_forwards_of_vllms_own_making_are_neither_counted_nor_recorded(v4: ModuleType) -> None:
    from mla_tune.integrations.vllm import vllm_state

    made = layer(v4, LayerType.C4A)
    metadata = Forward(LayerType.C4A, Shape(1, 20, 2100)).swa_metadata
    assert vllm_state._around_dummy_run(lambda _: made._mla_tune.plan(metadata), None, (8,), {}) is None
    assert counted() == ({}, {})
    assert made._mla_tune.plan(metadata) is not None


def test_the_runners_whose_dummy_forwards_are_marked_have_that_method() -> None:
    import importlib.util

    from mla_tune.integrations.vllm import RUNNERS

    for name in RUNNERS:
        source = Path(str(importlib.util.find_spec(name).origin)).read_text()  # type: ignore[union-attr]
        assert "class GPUModelRunner" in source
        assert "def _dummy_run(\n        self,\n        num_tokens: int," in source


def test_a_parameter_that_vllm_appends_reaches_its_own_method(v4: ModuleType, serving: pytest.MonkeyPatch) -> None:
    from mla_tune.integrations.vllm import vllm_state

    seen: list[int] = []

    def theirs(*_: Any, appended: int = 0, **__: Any) -> None:
        seen.append(appended)

    serving.setattr(v4, "get_forward_context", lambda: SimpleNamespace(attn_metadata=object()))
    made, kind = layer(v4, LayerType.C4A), v4.DeepseekV4FlashMLAAttention
    metadata = Forward(LayerType.C4A, Shape(1, 20, 2100)).swa_metadata
    metadata.num_prefill_tokens = 0  # vLLM's to decide
    for name in ("_forward_prefill", "forward_mqa"):
        around = inspect.getattr_static(kind, name)._self_wrapper
        around(theirs, made, (), {"swa_metadata": metadata, "appended": 7})
    vllm_state._around_dummy_run(theirs, None, (8,), {"appended": 7})
    assert seen == [7, 7, 7]


def test_a_second_model_in_the_process_has_tables_of_its_own(v4: ModuleType) -> None:
    layer(v4, LayerType.C4A)
    config = vllm_config()
    config.model_config.hf_config = v4_config([128, *([4, 128] * 30)], 1024)
    found = layer(v4, LayerType.C4A, config, padded_heads=128)._mla_tune._decider.resolved
    assert (found.model, found.h_q) == ("deepseek-v4-pro", 128)


def test_a_mistake_of_ours_costs_one_line_and_no_forward(
    v4: ModuleType, calls: list[str], serving: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serving.setenv("MLA_TUNE_MODE", "pin:with_kvcache")
    serving.setattr(v4, "flash_mla_with_kvcache", lambda **_: 1 / 0)
    made = layer(v4, LayerType.SWA_ONLY)
    for _ in range(2):
        forward = Forward(LayerType.SWA_ONLY, Shape(1, 4, 200))
        assert forward.wrong(forward.run(made)) is None
    assert calls == ["sparse_fwd"] * 2
    assert [record.levelname for record in caplog.records].count("ERROR") == 1


def test_what_the_hook_reads_of_a_layer_is_what_this_release_sets(v4: ModuleType) -> None:
    """Its constructor needs a GPU, so that :func:`layer` sets attributes by hand: here they are held against it."""
    sources = [inspect.getsource(kind) for kind in v4.DeepseekV4FlashMLAAttention.__mro__ if "vllm" in kind.__module__]
    code = "\n".join(sources)
    for name in (*ATTRIBUTES, "max_model_len"):
        assert re.search(rf"\bself\.{name}\b\s*[:=]", code), name
    assert "def _uses_fp8_ds_mla_layout(self" in code


CP = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=2)


@pytest.mark.parametrize(
    ("said", "config", "changes"),
    [
        ("images", {}, {"max_image_tokens": 64}),
        ("window is 128", {}, {"window_size": 64}),
        ("fp8_ds_mla layout", {}, {"_uses_fp8_ds_mla_layout": lambda: False}),
        ("context parallelism", {"parallel_config": CP}, {}),
    ],
)
def test_each_gate_alone_keeps_vllms_own_path_and_is_named(
    said: str, config: dict[str, Any], changes: dict[str, Any], v4: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    assert "_mla_tune" not in vars(layer(v4, LayerType.C4A, vllm_config(**config), **changes))
    assert said in caplog.messages[-1]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("num_prefill_tokens", 0, "no_tokens"),
        ("prefill_seq_lens_cpu", None, "no_host_lengths"),
        ("prefill_swa_indices", None, "no_host_lengths"),
        ("cache_slot_mapping", "gathered", "engine_gate"),
        ("num_prefill_tokens", 40_000, "past_limit"),
    ],
)
def test_each_condition_of_a_forward_alone_keeps_vllms_own_path(
    field: str, value: Any, reason: str, v4: ModuleType
) -> None:
    made = layer(v4, LayerType.C4A)
    forward = Forward(LayerType.C4A, Shape(1, 20, 2100))
    if not hasattr(forward.swa_metadata, field):
        pytest.skip("this release has no such field")
    setattr(forward.swa_metadata, field, value)
    assert made._mla_tune.plan(forward.swa_metadata) is None
    assert counted() == ({}, {reason: 1})


def test_during_capture_vllms_own_path_stays(v4: ModuleType, serving: pytest.MonkeyPatch) -> None:
    import torch

    made = layer(v4, LayerType.C4A)
    serving.setattr(torch.cuda, "is_available", lambda: True)
    serving.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert made._mla_tune.plan(Forward(LayerType.C4A, Shape(1, 20, 2100)).swa_metadata) is None
    assert counted() == ({}, {"engine_gate": 1})


def test_kernels_that_were_not_measured_are_not_trusted_with_more_entries_than_old_ones_took(
    v4: ModuleType, serving: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for policy, most in ((None, 32768), (other_kernels(), 11622)):
        if policy is not None:
            from mla_tune.integrations.vllm import prefill_hooks
            from mla_tune.integrations.vllm.vllm_state import PROCESS

            use_policy(serving, tmp_path, policy)
            serving.setattr(PROCESS, "service", None)
            serving.setattr(prefill_hooks, "_choices", {})
        assert layer(v4, LayerType.C4A)._mla_tune._limit == most


def test_the_start_is_one_line_for_all_layers(v4: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    for layer_type in (*RATIOS, *RATIOS):
        layer(v4, layer_type)
    (line,) = [message for message in caplog.messages if message.startswith("mla-tune ")]
    assert "prefill_attention of deepseek-v4-flash with 64 heads, by swa_only, c4a, c128a: policy" in line
    assert "DeepseekV4FlashMLAAttention._forward_prefill" in line.partition("hooked: ")[2]
