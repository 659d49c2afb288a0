"""SGLang's ``_use_sparse_prefill``: the policy decides, and everything that SGLang rules out stays out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mla_tune.policy.schema import Limit
from tests.engines.sglang.conftest import (
    RATIOS,
    attention,
    batch,
    made_up_batches,
    mixed_policy,
    runner,
    use_policy,
    v4_backend,
    without_windows,
    wrapper_of,
)
from tests.policy.strategies import policy

pytestmark = pytest.mark.usefixtures("serving")

LAYERS = {0: 0, 4: 300, 128: 2000}
"""From how many query tokens each compress ratio is sparse in :func:`mixed_policy`, which is measured from 16 to 32768."""


def answer(backend: Any, forward: Any, num_qo_tokens: int | None = None, ratio: int | None = None) -> bool:
    """What a layer of ``ratio`` gets, or the snapshot; asked as SGLang asks, through ``_forward_attention``."""
    count = sum(forward.extend_seq_lens_cpu) if num_qo_tokens is None else num_qo_tokens
    if ratio is None:
        return bool(backend._use_sparse_prefill(forward, num_qo_tokens=count))
    asked: list[bool] = []

    class Metadata:
        late_layer_tail = None

        @property
        def core_attn_metadata(self) -> None:
            """The first thing that a layer reads; the test asks there and stops."""
            asked.append(backend._use_sparse_prefill(forward, num_qo_tokens=count))
            raise StopIteration

    before, backend.forward_metadata, backend.mtp_enabled = backend.forward_metadata, Metadata(), False
    key = object()
    try:
        with pytest.raises(StopIteration):
            backend._forward_attention(None, key, key, SimpleNamespace(layer_id=0), forward, compress_ratio=ratio)
    finally:
        backend.forward_metadata = before
    return asked[0]


def platform() -> dict[str, Any]:
    """What SGLang is told of the machine."""
    from sglang.srt.runtime_context import get_platform

    overrides: dict[str, Any] = get_platform()._overrides
    return overrides


requests = st.lists(st.tuples(st.integers(0, 200_000), st.integers(1, 3000)), min_size=1, max_size=12)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=requests, padding=st.integers(0, 3), extra=st.integers(0, 64))
def test_each_layer_type_follows_its_table_and_the_snapshot_any_of_them(
    requests: list[tuple[int, int]], padding: int, extra: int, v4: ModuleType
) -> None:
    backend = v4_backend(v4)
    forward = batch(*requests, padding=padding)
    num_qo_tokens = sum(new for _, new in requests)
    kv_tokens = num_qo_tokens + sum(prefix for prefix, _ in requests)
    measured = 16 <= num_qo_tokens <= 32768 and 2048 <= kv_tokens <= 1 << 26
    expected = {ratio: num_qo_tokens >= start if measured else True for ratio, start in LAYERS.items()}
    padded = num_qo_tokens + extra
    assert answer(backend, forward, padded) == any(expected.values())
    for count in (num_qo_tokens, padded):  # padded in the snapshot and in some runners, real in others
        assert {ratio: answer(backend, forward, count, ratio) for ratio in LAYERS} == expected
    assert answer(backend, forward, padded) == any(expected.values())


def test_where_a_layer_type_has_no_table_the_whole_forward_is_one_choice(
    v4: ModuleType, serving: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_policy(serving, tmp_path, without_windows(mixed_policy()))
    backend = v4_backend(v4)
    for new, expected in ((5999, False), (6000, True)):  # where the forward table crosses over
        forward = batch((100_000, new))
        assert {answer(backend, forward, None, ratio) for ratio in (None, *LAYERS)} == {expected}


def has_gate(module: ModuleType, text: str) -> bool:
    """Whether this release's own method asks for it: 0.5.22 asks neither for another kernel nor for a late tail there."""
    return text in inspect.getsource(module.DeepseekV4AttnBackend._use_sparse_prefill.__wrapped__)


@pytest.mark.parametrize(
    ("closed", "mode"),
    [
        (lambda backend, patch: setattr(backend, "trtllm_attn", True), "EXTEND"),
        (lambda backend, patch: setattr(backend.forward_metadata, "late_layer_tail", object()), "EXTEND"),
        (lambda backend, patch: patch.setitem(platform(), "is_sm120", True), "EXTEND"),
        (lambda backend, patch: patch.setattr(f"{type(backend).__module__}.is_cp_active", lambda _: True), "EXTEND"),
        (lambda backend, patch: None, "DECODE"),
        (lambda backend, patch: None, "TARGET_VERIFY"),
        (lambda backend, patch: None, "DRAFT_EXTEND_V2"),
        (lambda backend, patch: None, "IDLE"),
    ],
    ids=["trtllm", "late tail", "sm120", "context parallel", "decode", "verify", "draft extend", "idle"],
)  # fmt: skip
def test_every_hard_condition_of_the_engine_holds_alone(
    closed: Callable[[Any, Any], None], mode: str, v4: ModuleType, serving: pytest.MonkeyPatch
) -> None:
    backend = v4_backend(v4)
    assert answer(backend, batch((0, 8192))) is True
    closed(backend, serving)
    if (backend.trtllm_attn and not has_gate(v4, "trtllm_attn")) or (
        backend.forward_metadata.late_layer_tail is not None and not has_gate(v4, "late_layer_tail")
    ):
        pytest.skip("this release has no such condition in its method")
    forward = batch((0, 8192), mode=mode)
    assert answer(backend, forward) is False
    assert answer(backend, forward, 20_000) is False
    counters = backend._mla_tune._counters
    assert counters.fallbacks == {"engine_gate": 1}


def test_a_count_of_zero_is_answered_with_no_so_that_page_indices_are_written(v4: ModuleType) -> None:
    assert answer(v4_backend(v4), batch((0, 8192)), 0) is False


def test_a_padded_count_past_the_limit_of_the_paged_kernel_is_the_engine_s_to_answer(
    v4: ModuleType, serving: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = Limit(candidate="with_kvcache", num_qo_tokens=250)
    tables = [attention(layer, (0, "with_kvcache"), limits=(limit,)) for layer in ("swa_only", "c4a", "c128a")]
    use_policy(serving, tmp_path, policy(*tables))
    backend = v4_backend(v4)
    forward = batch((100_000, 200))
    assert answer(backend, forward, 200) is False
    assert answer(backend, forward, 250) is False
    assert answer(backend, forward, 251) is True  # SGLang's own choice


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True)])
def test_the_user_s_own_switch_wins(
    value: str, expected: bool, v4: ModuleType, serving: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serving.setenv("SGLANG_OPT_FLASHMLA_SPARSE_PREFILL", value)
    backend = v4_backend(v4)
    forwards = [batch((100_000, 64)), batch((100_000, 8192))]
    assert [answer(backend, forward, None, ratio) for forward in forwards for ratio in (None, 4)] == [expected] * 4
    assert backend._mla_tune._counters.fallbacks == {"engine_setting": 2}
    assert f"SGLANG_OPT_FLASHMLA_SPARSE_PREFILL={value} is the user's own setting" in caplog.text


@pytest.mark.parametrize("chosen", ["flashmla_sparse_q8", "flashmla_sparse"])
def test_a_prefill_backend_that_the_user_named_wins(chosen: str, v4: ModuleType) -> None:
    assert answer(v4_backend(v4, dsv4_prefill_backend=chosen), batch((100_000, 64)), None, 4) is True


@pytest.mark.parametrize(("pinned", "expected"), [("sparse_fwd", True), ("with_kvcache", False)])
def test_a_pin_decides_for_every_shape_and_layer(
    pinned: str, expected: bool, v4: ModuleType, serving: pytest.MonkeyPatch
) -> None:
    serving.setenv("MLA_TUNE_MODE", f"pin:{pinned}")
    backend = v4_backend(v4)
    for new in (1, 64, 5000, 60_000):
        assert {answer(backend, batch((70_000, new)), None, ratio) for ratio in (None, *LAYERS)} == {expected}


def test_without_lengths_on_the_host_the_engine_decides(v4: ModuleType) -> None:
    backend = v4_backend(v4)
    forward = batch((100_000, 64))
    forward.extend_seq_lens_cpu = None
    assert backend._use_sparse_prefill(forward, num_qo_tokens=64) is True
    assert backend._mla_tune._counters.fallbacks == {"no_host_lengths": 1}


def test_a_graph_that_captures_the_whole_prefill_gets_the_engine_s_own_choice(v4: ModuleType) -> None:
    backend = v4_backend(v4)
    forward = batch((100_000, 64))
    forward.full_prefill_cuda_graph_capture = True
    assert answer(backend, forward, None, 4) is True


def test_an_error_of_ours_is_logged_once_counted_and_leaves_the_engine_s_choice(
    v4: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    backend = v4_backend(v4)
    forward = batch((100_000, 64))
    forward.extend_prefix_lens_cpu = ["not a length"]
    assert backend._use_sparse_prefill(forward, num_qo_tokens=64) is True
    assert backend._use_sparse_prefill(forward, num_qo_tokens=64) is True
    assert backend._mla_tune._counters.fallbacks["error"] == 2
    assert backend._use_sparse_prefill(batch((100_000, 64)), num_qo_tokens=64) is True  # windows alone are sparse
    assert answer(backend, batch((100_000, 64)), None, 4) is False, "no rank switches a choice off alone"
    assert [record.levelname for record in caplog.records].count("ERROR") == 1


def test_an_error_of_the_engine_s_own_method_is_the_engine_s(v4: ModuleType, serving: pytest.MonkeyPatch) -> None:
    backend = v4_backend(v4)
    serving.setattr(v4, "is_cp_active", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backend._use_sparse_prefill(batch((0, 64)), num_qo_tokens=64)


def test_a_forward_is_counted_once_although_every_layer_asks(v4: ModuleType) -> None:
    backend = v4_backend(v4)
    for new in (64, 64, 4000):
        forward = batch((100_000, new))
        for ratio in (None, *RATIOS):
            answer(backend, forward, None, ratio)
    counted = {decider.resolved.layer: decider.counters.choices for decider in backend._mla_tune._serving.values()}
    assert counted["c4a"] == {"sparse_fwd": 1, "with_kvcache": 2}
    assert counted["swa_only"] == {"sparse_fwd": 3, "with_kvcache": 0}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (SimpleNamespace(compress_ratios=[1, 2, 4], num_hidden_layers=3), "compress ratios [1, 2], as DeepSeek-V4.1"),
        (SimpleNamespace(compress_ratios=[0, 4], num_hidden_layers=2), None),
        (SimpleNamespace(compress_ratios=[4, 128], num_hidden_layers=2, topk=64), "no known model has layers"),
    ],
    ids=["V4.1", "a pruned model", "another top-k"],
)
def test_a_model_of_other_layers_is_left_alone_and_a_pruned_one_is_not(
    model: Any, reason: str | None, v4: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    heads = SimpleNamespace(hf_text_config=model, num_attention_heads=64)
    backend = v4_backend(v4, runner(model_config=heads), index_topk=getattr(model, "topk", 512))
    assert answer(backend, batch((100_000, 64)), None, 4) is (reason is not None)
    assert reason is None or reason in caplog.text


def test_a_draft_model_s_backend_is_left_alone(v4: ModuleType) -> None:
    assert "_mla_tune" not in vars(v4_backend(v4, runner(is_draft_worker=True)))


def test_batches_without_a_request_are_neither_counted_nor_recorded(v4: ModuleType) -> None:
    backend = v4_backend(v4)
    deciders = backend._mla_tune._serving.values()
    for name, forward in made_up_batches((100_000, 64)).items():
        assert {answer(backend, forward, None, ratio) for ratio in (None, *LAYERS)} == {True}, name
    assert [(of.counters.lookups, of.counters.fallbacks) for of in deciders] == [(0, {})] * 3
    assert answer(backend, batch((100_000, 64)), None, 4) is False
    assert {of.counters.lookups for of in deciders} == {1}


def test_a_parameter_that_sglang_appends_reaches_its_own_method(v4: ModuleType) -> None:
    seen: list[int] = []
    backend = v4_backend(v4)

    def theirs(*_: Any, appended: int = 0, **__: Any) -> bool:
        seen.append(appended)
        return True

    asked = {"num_qo_tokens": 64, "appended": 7}
    decide = wrapper_of(v4.DeepseekV4AttnBackend, "_use_sparse_prefill")
    assert decide(theirs, backend, (batch((100_000, 64)),), asked) is True  # windows alone are sparse
    layer = wrapper_of(v4.DeepseekV4AttnBackend, "_forward_attention")
    layer(theirs, backend, (), {"compress_ratio": 4, "appended": 7})
    assert seen == [7, 7]


def test_past_the_tokens_that_all_ranks_have_memory_for_the_engine_decides(
    v4: ModuleType, serving: pytest.MonkeyPatch
) -> None:
    from mla_tune.integrations.sglang import v4_hooks

    asked: list[int] = []

    def half(most: int, bytes_of: Callable[[int], int]) -> int:
        asked.append(bytes_of(most) // most)
        return 100

    serving.setattr(v4_hooks, "reserve", half)
    backend = v4_backend(v4)
    assert asked[0] >= 64 * 513 * 4, "a float32 partial result of every head of every query, for the largest chunk"
    assert [answer(backend, batch((100_000, new)), None, 4) for new in (100, 101)] == [False, True]


def test_one_line_says_what_decides(v4: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):  # two-batch overlap builds more backends
        v4_backend(v4)
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("mla-tune ")]
    for part in (
        "policy.yaml (named, sha256 ",
        "measured for nvidia-h200 with 132 SMs",
        "20 of 20 tables serve sglang",
        "although the GPU must be nvidia-h200 with 132 SMs: got none",
        "mode auto",
        "prefill_attention of deepseek-v4-flash with 64 heads, by swa_only, c4a, c128a: policy",
        "indexer_metadata of deepseek-v4-flash, by c4a: policy",
        "hooked: ",
        "DeepseekV4AttnBackend._use_sparse_prefill",
        "get_paged_mqa_logits_metadata",
    ):
        assert part in line


def test_a_hook_that_another_plugin_has_replaced_is_said_to_be_gone(
    v4: ModuleType, serving: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serving.setattr(v4.DeepseekV4AttnBackend, "_use_sparse_prefill", lambda self, forward_batch, **_: True)
    v4_backend(v4)
    assert "left: DeepseekV4AttnBackend._use_sparse_prefill is somebody else's" in caplog.text
