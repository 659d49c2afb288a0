"""vLLM's builder of V3.2's metadata: the policy says per batch whether it is mixed, where vLLM can do both."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mla_tune.policy.schema import Limit
from mla_tune.sites.engines import Engine
from tests.engines.vllm.conftest import (
    CROSSOVER,
    counted,
    engine_table,
    made_by,
    other_kernels,
    replaced,
    use_policy,
    vllm_config,
    vllm_policy,
)

pytestmark = pytest.mark.usefixtures("serving")

DECODE_THRESHOLD = 8
"""Query tokens up to which this builder takes a request as a decode; vLLM's own is 256 for 128 heads."""


def builder(module: ModuleType, heads: int = 128, config: Any = None, **changes: Any) -> Any:
    """A builder after its hooked constructor, of which what needs a GPU is set by hand."""
    import torch

    config = config or vllm_config()
    attributes = {
        "num_heads": heads,
        "fp8_use_mixed_batch": heads < module.MIN_HEADS_FOR_BF16_PREFILL,
        "use_fp8_kv_cache": True,
        "use_hisparse": False,
        "use_pcp": False,
        "pcp_dcp_kv_gather": False,
        "dcp_world_size": 1,
        "cp_kv_cache_interleave_size": 1,
        "topk_tokens": 2048,
        "reorder_batch_threshold": DECODE_THRESHOLD,
        "mla_dims": SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=64),
        "vllm_config": config,
        "model_config": config.model_config,
        "kv_cache_spec": SimpleNamespace(block_size=64),
        "device": torch.device("cpu"),
        "req_id_per_token_buffer": torch.empty(1 << 16, dtype=torch.int32),
        "max_model_len_tensor": torch.full((64,), 163840, dtype=torch.int32),
        "dummy_block_table": torch.empty((64, 1), dtype=torch.int32),
        "topk_mask_workspace": None,
        "_prefill_backend": None,
    }

    made = object.__new__(module.FlashMLASparseMetadataBuilder)
    construct = made_by(lambda *_: made.__dict__.update(attributes | changes), made)
    construct(None, ["layer"], config, torch.device("cpu"))
    return made


def batch(*requests: tuple[int, int], **changes: Any) -> Any:
    """vLLM's description of a batch of ``(context before, new)`` tokens a request, decodes first."""
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata

    new = [count for _, count in requests]
    seq_lens = torch.tensor([before + count for before, count in requests], dtype=torch.int32)
    starts = torch.tensor([0, *new], dtype=torch.int32).cumsum(0).int()
    fields: dict[str, Any] = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": seq_lens,
        "num_reqs": len(requests),
        "num_actual_tokens": sum(new),
        "max_query_len": max(new),
        "max_seq_len": int(seq_lens.max()),
        "block_table_tensor": torch.zeros((len(requests), 4), dtype=torch.int32),
        "slot_mapping": torch.arange(sum(new)),
        "seq_lens_cpu_upper_bound": seq_lens,
    }
    return CommonAttentionMetadata(**(fields | changes))


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch, sparse: ModuleType) -> None:
    """Host memory is not pinned, and FlashMLA's empty schedule comes from its class: what the builder has of a GPU."""
    import torch

    zeros = torch.zeros

    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        return zeros(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", unpinned)
    monkeypatch.setattr(sparse, "get_mla_metadata", lambda: (sparse.FlashMLASchedMeta(), None))


def kind(module: ModuleType, made: Any, common: Any) -> str:
    """What vLLM's layers would run this batch with, by the metadata of the real ``build``."""
    metadata = made.build(0, common)
    mixed = isinstance(metadata.fp8_extra_metadata, module.FlashMLASparseMetadata.FP8KernelMetadata)
    assert metadata.fp8_use_mixed_batch == mixed  # the layers look at the flag, then at the rest
    return "mixed" if mixed else "separate"


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    decodes=st.lists(st.tuples(st.integers(1, 9000), st.just(1)), max_size=4),
    prefills=st.lists(st.tuples(st.integers(2048, 90000), st.integers(16, 200)), min_size=1, max_size=6),
)
@pytest.mark.parametrize("heads", [128, 64, 32, 16, 8])
def test_a_batch_with_prefills_takes_what_the_policy_says(
    heads: int, decodes: list[tuple[int, int]], prefills: list[tuple[int, int]], sparse: ModuleType
) -> None:
    made = builder(sparse, heads)
    new = sum(count for _, count in prefills)
    assert kind(sparse, made, batch(*decodes, *prefills)) == ("mixed" if new < CROSSOVER else "separate")


@pytest.mark.parametrize(("heads", "own"), [(128, "separate"), (32, "separate"), (31, "mixed"), (8, "mixed")])
def test_what_no_policy_decides_stays_as_vllm_has_it(
    heads: int, own: str, sparse: ModuleType, serving: pytest.MonkeyPatch
) -> None:
    decodes = [(500, 1)] * 40
    for common in (
        batch(*decodes),
        batch(*[(500, 4)] * 3),
        batch((500, 1), (500, 1), (4000, 0)),  # padded, as a captured batch of decodes is
        batch(*decodes, (5000, 20)),  # mostly decodes
        batch((90000, 40_000)),  # beyond what was measured
        batch((5000, 20), seq_lens_cpu_upper_bound=None) if heads < 32 else batch(*decodes),
    ):
        if common.seq_lens_cpu_upper_bound is None:  # vLLM's own separate path could not run either
            assert builder(sparse, heads)._mla_tune.mixed(common, SimpleNamespace(num_prefills=1)) is (own == "mixed")
            continue
        assert kind(sparse, builder(sparse, heads), common) == own


def test_a_parameter_that_vllm_appends_reaches_its_own_method(sparse: ModuleType) -> None:
    seen: list[int] = []
    made = builder(sparse)
    kind = sparse.FlashMLASparseMetadataBuilder
    metadata = SimpleNamespace(num_prefills=0)  # vLLM's to decide
    for name in ("build", "_build_fp8_separate_prefill_decode"):
        around = inspect.getattr_static(kind, name)._self_wrapper
        around(lambda *_, appended=0: seen.append(appended), made, (0, metadata), {"appended": 7})
    assert seen == [7, 7]


def test_dense_attention_of_short_contexts_is_not_decided(sparse: ModuleType) -> None:
    made = builder(sparse)
    common = batch((5000, 50))
    metadata = SimpleNamespace(
        num_prefills=1, num_decodes=0, num_decode_tokens=0, prefill=SimpleNamespace(use_dense_mha=True)
    )
    assert made._mla_tune.mixed(common, metadata) is False
    assert counted() == ({}, {"engine_gate": 1})
    metadata.prefill.use_dense_mha = False
    assert made._mla_tune.mixed(common, metadata) is True


def test_a_builder_is_as_it_was_after_every_build(sparse: ModuleType) -> None:
    for heads in (128, 16):
        made = builder(sparse, heads)
        before = made.fp8_use_mixed_batch
        for new in (20, 2000):
            made.build(0, batch((5000, new)))
            assert made.fp8_use_mixed_batch is before
        with pytest.raises(AttributeError):
            made.build(0, None)
        assert made.fp8_use_mixed_batch is before


CP = SimpleNamespace(decode_context_parallel_size=2, prefill_context_parallel_size=1)
PCP = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=2)


@pytest.mark.parametrize(
    ("said", "config", "changes"),
    [
        ("HiSparse", {}, {"use_hisparse": True}),
        ("context parallelism", {"parallel_config": CP}, {}),
        ("context parallelism", {"parallel_config": PCP}, {}),
        ("nvfp4_ds_mla", {"cache_config": SimpleNamespace(cache_dtype="nvfp4_ds_mla")}, {}),
        ("bfloat16", {"cache_config": SimpleNamespace(cache_dtype="bfloat16")}, {}),
        ("512 + 0", {}, {"mla_dims": SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=0)}),
        ("no known model", {}, {"topk_tokens": 512}),
    ],
)
def test_each_gate_alone_keeps_vllms_own_choice_and_is_named(
    said: str, config: dict[str, Any], changes: dict[str, Any], sparse: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    made = builder(sparse, config=vllm_config(**config), **changes)
    assert "_mla_tune" not in vars(made)
    assert said in caplog.messages[-1]
    assert kind(sparse, made, batch((5000, 20))) == "separate"


def test_the_start_is_one_line_that_says_who_decides(sparse: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        builder(sparse)
    (line,) = [message for message in caplog.messages if message.startswith("mla-tune ")]
    assert "prefill_attention of deepseek-v3.2 with 128 heads, by dsa: policy" in line
    assert "FlashMLASparseMetadataBuilder.build" in line.partition("hooked: ")[2]


@pytest.mark.parametrize("setting", ["VLLM_BATCH_INVARIANT", "MIN_HEADS_FOR_BF16_PREFILL", "MLA_TUNE_MODE"])
def test_a_users_own_setting_wins(setting: str, sparse: ModuleType, serving: pytest.MonkeyPatch) -> None:
    if setting == "MIN_HEADS_FOR_BF16_PREFILL":
        serving.setattr(sparse, setting, 200)
    else:
        serving.setenv(setting, "off" if setting == "MLA_TUNE_MODE" else "1")
    own = "mixed" if setting == "MIN_HEADS_FOR_BF16_PREFILL" else "separate"
    made = builder(sparse)
    assert [kind(sparse, made, batch((5000, new))) for new in (20, 2000)] == [own, own]
    assert counted() == ({}, {"off" if setting == "MLA_TUNE_MODE" else "engine_setting": 2})


def test_a_pin_decides_every_shape_up_to_its_limit(
    sparse: ModuleType, serving: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = Limit(candidate="with_kvcache_mixed", num_qo_tokens=20_000)
    use_policy(serving, tmp_path, replaced(vllm_policy(), engine_table(Engine.VLLM, 128, limits=(limit,))))
    serving.setenv("MLA_TUNE_MODE", "pin:with_kvcache_mixed")
    made = builder(sparse)
    answers = [kind(sparse, made, batch((5000, new))) for new in (20, 2000, 20_000, 20_001)]
    assert answers == ["mixed", "mixed", "mixed", "separate"]


def test_past_the_mixed_kernels_limit_decodes_count_too(
    sparse: ModuleType, serving: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = Limit(candidate="with_kvcache_mixed", num_qo_tokens=100)
    use_policy(serving, tmp_path, replaced(vllm_policy(), engine_table(Engine.VLLM, 128, limits=(limit,))))
    made = builder(sparse)
    assert kind(sparse, made, batch(*[(9, 1)] * 20, (5000, 80))) == "mixed"
    assert kind(sparse, made, batch(*[(9, 1)] * 21, (5000, 80))) == "separate"
    assert counted()[1] == {"past_limit": 1}


def test_tables_of_sglang_are_never_taken_for_vllms(
    sparse: ModuleType, serving: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import msgspec

    whole = vllm_policy()
    theirs = tuple(table for table in whole.tables if table.engine is Engine.SGLANG)
    use_policy(serving, tmp_path, msgspec.structs.replace(whole, tables=theirs))
    made = builder(sparse)
    assert kind(sparse, made, batch((5000, 20))) == "separate"
    assert counted() == ({}, {"no_table": 1})


def test_a_mistake_of_ours_costs_one_line_and_no_batch(
    sparse: ModuleType, serving: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = builder(sparse)
    serving.setattr(type(made._mla_tune), "_of_shape", lambda *_: 1 / 0)
    assert [kind(sparse, made, batch((5000, 20))) for _ in range(3)] == ["separate"] * 3
    assert [record.levelname for record in caplog.records].count("ERROR") == 1


def test_kernels_that_were_not_measured_serve_only_a_policy_that_the_user_names(
    sparse: ModuleType, serving: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = use_policy(serving, tmp_path, other_kernels())
    assert kind(sparse, builder(sparse), batch((5000, 20))) == "mixed"
    said = "sgl-flash-mla must be 1.0.0: vLLM runs the flash_mla of its own wheel"
    assert any("although" in line and said in line for line in caplog.messages)

    from mla_tune.hardware.nvml import GpuIdentity
    from mla_tune.integrations.vllm.vllm_state import PROCESS

    serving.setattr(PROCESS, "service", None)
    serving.delenv("MLA_TUNE_POLICY")
    shipped = path.rename(path.with_name("nvidia-h200.yaml"))
    h200 = GpuIdentity("NVIDIA H200", "nvidia-h200", 132, "580.1")
    serving.setattr("mla_tune.hardware.nvml.detect_gpu", lambda: h200)
    serving.setattr("mla_tune.policy.search._shipped_files", lambda: [shipped])
    caplog.clear()
    assert kind(sparse, builder(sparse), batch((5000, 20))) == "separate"
    assert any(": 0 of " in line and "tables serve vllm" in line and said in line for line in caplog.messages)
