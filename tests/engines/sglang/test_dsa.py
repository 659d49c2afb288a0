"""SGLang's ``set_dsa_prefill_impl``: the policy decides where two kernels can run, on Hopper too."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mla_tune.policy.schema import Limit
from tests.engines.sglang.conftest import Sampling, batch, constructed, made_up_batches, runner, use_policy, wrapper_of
from tests.policy.strategies import policy, table

pytestmark = pytest.mark.usefixtures("serving")

CROSSOVER = 6000
"""Query tokens from which mixed_policy's tables of V3.2 say ``sparse_fwd``; measured from 16."""


def dsa_backend(module: ModuleType, model_runner: Any = None, **changes: Any) -> Any:
    """A DSA backend of V3.2 with an FP8 cache on one H200, after its hooked constructor."""
    import torch

    attributes = {
        "dsa_prefill_impl": "flashmla_kv",
        "enable_auto_select_prefill_impl": False,
        "dsa_kv_cache_store_fp8": True,
        "dsa_index_topk": 2048,
        "dsa_index_kpool": 1,
        "num_q_heads": 128,
        "hisparse_coordinator": None,
        "_kv_shard_pool": None,
        "use_mha": False,
        "supports_mha_one_shot": True,
        "token_to_kv_pool": SimpleNamespace(dtype=torch.float8_e4m3fn),
        "_is_in_breakable_cuda_graph": lambda: False,
        "_is_in_tc_piecewise_cuda_graph": lambda: False,
        "_get_device_sm": lambda: 90,
        "_is_blackwell": lambda: False,
    }
    if model_runner is None:
        config = SimpleNamespace(num_hidden_layers=61)
        model_runner = runner(model_config=SimpleNamespace(hf_text_config=config, num_attention_heads=128))
    return constructed(module.DeepseekSparseAttnBackend, model_runner, attributes | changes)


def impl(backend: Any, forward: Any) -> str:
    """What SGLang would run this forward with."""
    backend.set_dsa_prefill_impl(forward)
    return "mha" if backend.use_mha else str(backend.dsa_prefill_impl)


@pytest.fixture(autouse=True)
def _started(dsa: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SGLang sets for V3.2 when it starts: dense attention up to top-k tokens of context, no context parallelism."""
    monkeypatch.setenv("SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD", "2048")
    monkeypatch.setattr(dsa, "is_dsa_enable_prefill_cp", lambda: False, raising=False)  # asks arguments, up to 0.5.21


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(st.tuples(st.integers(3000, 100_000), st.integers(16, 3000)), min_size=1, max_size=8),
    padding=st.integers(0, 3),
)
@pytest.mark.parametrize("start", ["flashmla_kv", "flashmla_auto"])
def test_a_prefill_takes_the_kernel_of_the_policy(
    start: str, requests: list[tuple[int, int]], padding: int, dsa: ModuleType
) -> None:
    backend = dsa_backend(dsa, dsa_prefill_impl=start, enable_auto_select_prefill_impl=start == "flashmla_auto")
    forward = batch(*requests, padding=padding)
    expected = "flashmla_sparse" if sum(new for _, new in requests) >= CROSSOVER else "flashmla_kv"
    assert impl(backend, forward) == expected


def test_what_one_forward_takes_does_not_outlive_it(dsa: ModuleType) -> None:
    backend = dsa_backend(dsa)
    assert impl(backend, batch((50_000, 8192))) == "flashmla_sparse"
    assert impl(backend, None) == "flashmla_kv"  # as graph capture and replay ask
    assert impl(backend, batch((50_000, 8192))) == "flashmla_sparse"
    assert impl(backend, batch((50_000, 8192), mode="DECODE")) == "flashmla_kv"


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({"dsa_kv_cache_store_fp8": False, "dsa_prefill_impl": "flashmla_sparse"}, "EXTEND"),
        ({"dsa_prefill_impl": "trtllm"}, "EXTEND"),
        ({"dsa_prefill_impl": "tilelang"}, "EXTEND"),
        ({"_kv_shard_pool": object()}, "EXTEND"),
        ({"dsa_index_kpool": 4}, "EXTEND"),
        ({"_is_in_tc_piecewise_cuda_graph": lambda: True}, "EXTEND"),
        ({"hisparse_coordinator": object()}, "EXTEND"),
        ({"dsa_index_topk": 1024}, "EXTEND"),
        ({}, "MIXED"),
        ({}, "TARGET_VERIFY"),
        ({}, "DRAFT_EXTEND_V2"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else value,
)
def test_everything_that_leaves_the_engine_one_kernel_holds_alone(
    changes: dict[str, Any], mode: str, dsa: ModuleType
) -> None:
    backend = dsa_backend(dsa, **changes)
    forward = batch((50_000, 8192), mode=mode)
    assert impl(backend, forward) == changes.get("dsa_prefill_impl", "flashmla_kv")


def test_short_contexts_stay_dense(dsa: ModuleType) -> None:
    assert impl(dsa_backend(dsa), batch((0, 1000))) == "mha"


def test_context_parallelism_and_whole_graphs_keep_the_engine_s_kernel(dsa: ModuleType) -> None:
    for field in ("attn_cp_metadata", "full_prefill_cuda_graph_capture"):
        forward = batch((50_000, 8192))
        if not hasattr(forward, field):
            continue  # no graph of a whole prefill before 0.5.22
        setattr(forward, field, True)
        backend = dsa_backend(dsa)
        assert impl(backend, forward) == "flashmla_kv"
        assert backend._mla_tune._decider.counters.fallbacks.get("engine_gate")


@pytest.mark.parametrize("named", ["flashmla_kv", "flashmla_sparse"])
def test_a_backend_that_the_user_named_wins(named: str, dsa: ModuleType) -> None:
    config = SimpleNamespace(num_hidden_layers=61)
    model = SimpleNamespace(hf_text_config=config, num_attention_heads=128)
    user = runner(model_config=model, server_args=SimpleNamespace(dsa_prefill_backend=named))
    backend = dsa_backend(dsa, user, dsa_prefill_impl=named)
    assert {impl(backend, batch((50_000, new))) for new in (64, 8192)} == {named}


def test_padding_counts_towards_a_limit_and_nothing_else(
    dsa: ModuleType, serving: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = Limit(candidate="with_kvcache", num_qo_tokens=4000)
    use_policy(serving, tmp_path, policy(table(model="deepseek-v3.2", h_q=128, layer="dsa", limits=(limit,))))
    backend = dsa_backend(dsa)
    forward = batch((50_000, 3000))
    for padded, expected in ((3000, "flashmla_kv"), (4000, "flashmla_kv"), (4001, "flashmla_sparse")):
        forward.extend_num_tokens = padded
        assert impl(backend, forward) == expected


def test_a_model_of_the_same_layers_takes_the_tables_of_the_known_one(dsa: ModuleType) -> None:
    model = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=78), num_attention_heads=64)
    backend = dsa_backend(dsa, runner(model_config=model), num_q_heads=64)
    assert impl(backend, batch((50_000, 8192))) == "flashmla_sparse"


def test_an_error_of_ours_leaves_the_engine_s_choice(dsa: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    backend = dsa_backend(dsa)
    forward = batch((50_000, 8192))
    forward.extend_prefix_lens_cpu = ["not a length"]
    for _ in range(2):
        assert impl(backend, forward) == "flashmla_kv"
    assert [record.levelname for record in caplog.records].count("ERROR") == 1


def test_batches_without_a_request_are_neither_counted_nor_recorded(dsa: ModuleType) -> None:
    backend = dsa_backend(dsa)
    counters = backend._mla_tune._decider.counters
    for name, forward in made_up_batches((50_000, 8192)).items():
        assert impl(backend, forward) == "flashmla_kv", name
    assert (counters.lookups, counters.fallbacks) == (0, {})
    replayed = batch((50_000, 8192), rids=None, sampling_info=Sampling([1]))  # of one request, in a prefill graph
    assert impl(backend, replayed) == "flashmla_sparse"
    assert counters.lookups == 1


def test_a_parameter_that_sglang_appends_reaches_its_own_method(dsa: ModuleType) -> None:
    seen: list[int] = []
    backend = dsa_backend(dsa)
    around = wrapper_of(dsa.DeepseekSparseAttnBackend, "set_dsa_prefill_impl")
    around(lambda forward, appended=0: seen.append(appended), backend, (batch((50_000, 8192)),), {"appended": 7})
    assert seen == [7]
    assert backend.dsa_prefill_impl == "flashmla_sparse"


def test_backends_of_other_heads_or_with_the_users_own_setting_have_their_own_choice(dsa: ModuleType) -> None:
    config = SimpleNamespace(num_hidden_layers=61)
    model = SimpleNamespace(hf_text_config=config, num_attention_heads=128)
    first = dsa_backend(dsa)
    second = dsa_backend(dsa, runner(model_config=model), num_q_heads=64)
    named = SimpleNamespace(dsa_prefill_backend="flashmla_kv")
    third = dsa_backend(dsa, runner(model_config=model, server_args=named))
    assert [made._mla_tune._decider.resolved.h_q for made in (first, second)] == [128, 64]
    assert [made._mla_tune._decider.serves for made in (first, second, third)] == [True, True, False]
    assert dsa_backend(dsa)._mla_tune._decider is first._mla_tune._decider, "and one of the same counts with the first"


def test_a_choice_whose_rows_find_no_memory_stays_with_the_engine(dsa: ModuleType, serving: pytest.MonkeyPatch) -> None:
    from mla_tune.integrations.sglang import dsa_hooks

    serving.setattr(dsa_hooks, "reserve", lambda most, bytes_of: 100_000)
    backend = dsa_backend(dsa)
    assert impl(backend, batch((50_000, 8192))) == "flashmla_sparse"
    assert impl(backend, batch((100_000, 8192))) == "flashmla_kv"
    assert backend._mla_tune._decider.counters.fallbacks == {"no_memory": 1}
