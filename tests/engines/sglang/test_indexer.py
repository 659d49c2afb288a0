"""The indexer's schedule: SGLang's own kernel or DeepGEMM's, as the policy says, in the forwards that it knows."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import wrapt

from mla_tune.integrations.sglang import indexer_hooks
from tests.engines.sglang.conftest import SCHEDULES, batch, made_up_batches, mixed_policy, rows, use_policy, v4_backend
from tests.policy.strategies import table

pytestmark = pytest.mark.usefixtures("serving")


def _with_deep_gemm() -> Any:
    """mixed_policy, with DeepGEMM's schedule up to 500 rows."""
    import msgspec

    policy = mixed_policy()
    indexer = table(
        site="indexer_metadata",
        h_q=None,
        incumbent="jit",
        candidates=("deep_gemm", "jit"),
        rows=rows((0, "deep_gemm"), (500, "jit")),
    )
    kept = [t for t in policy.tables if (t.site, t.model, t.layer) != (indexer.site, indexer.model, indexer.layer)]
    return msgspec.structs.replace(policy, tables=(*kept, indexer))


@pytest.fixture
def scheduled(v4: ModuleType, serving: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Who planned each schedule, with both planners replaced by one that says so: neither runs without a GPU."""
    import torch

    use_policy(serving, tmp_path, _with_deep_gemm())
    serving.setenv("SGLANG_OPT_USE_TOPK_V2", "0")  # whose plan is a kernel too
    planned: list[str] = []

    def planner(name: str) -> Any:
        def plan(seq_lens: Any, page_size: int, num_sm: int) -> Any:
            planned.append(name)
            return torch.zeros(num_sm + 1, 2, dtype=torch.int32)

        return plan

    deep_gemm = SimpleNamespace(get_paged_mqa_logits_metadata=planner("deep_gemm"), get_num_sms=lambda: 132)
    serving.setitem(sys.modules, "deep_gemm", deep_gemm)
    dsv4 = sys.modules[SCHEDULES]
    serving.setattr(
        dsv4, "get_paged_mqa_logits_metadata", wrapt.FunctionWrapper(planner("jit"), indexer_hooks.around_schedule)
    )
    return planned


def build(row_count: int) -> None:
    """SGLang's own metadata of ``row_count`` rows, which plans their schedule, whatever this release calls its fields."""
    import torch
    from sglang.srt.layers.attention.dsv4.metadata import PagedIndexerMetadata

    lengths = torch.full((row_count,), 4096, dtype=torch.int32)
    fields = {
        "page_size": 256,
        "compressed_page_size": 64,
        "page_table": torch.zeros(row_count, 64, dtype=torch.int32),
        "c4_seq_lens": lengths,
        "compressed_seq_lens": lengths,
        "use_topk_v2": False,
    }
    accepted = inspect.signature(PagedIndexerMetadata).parameters
    PagedIndexerMetadata(**{name: value for name, value in fields.items() if name in accepted})


def prepare(backend: Any, forward: Any, row_count: int) -> None:
    """Build metadata of ``row_count`` rows for a forward, as SGLang's own method does in its middle."""
    indexer_hooks.around_prepare(lambda _: build(row_count), backend, (forward,), {})


def test_the_schedule_of_a_prefill_follows_the_policy(v4: ModuleType, scheduled: list[str]) -> None:
    backend = v4_backend(v4)
    for row_count in (64, 499, 500, 8192):
        prepare(backend, batch((100_000, row_count)), row_count)
    assert scheduled == ["deep_gemm", "deep_gemm", "jit", "jit"]


def test_rows_of_padding_count_since_the_planner_sees_them(v4: ModuleType, scheduled: list[str]) -> None:
    prepare(v4_backend(v4), batch((100_000, 490)), 512)
    assert scheduled == ["jit"]


@pytest.mark.parametrize("mode", ["DECODE", "TARGET_VERIFY", "IDLE"])
def test_other_forwards_keep_the_engine_s_planner(mode: str, v4: ModuleType, scheduled: list[str]) -> None:
    prepare(v4_backend(v4), batch((100_000, 64), mode=mode), 64)
    assert scheduled == ["jit"]


def test_batches_without_a_request_are_neither_counted_nor_planned_otherwise(
    v4: ModuleType, scheduled: list[str]
) -> None:
    backend = v4_backend(v4)
    for forward in made_up_batches((100_000, 64)).values():
        prepare(backend, forward, 64)
    assert scheduled == ["jit"] * 3
    assert backend._mla_tune_indexer._decider.counters.lookups == 0


def test_a_parameter_that_sglang_appends_reaches_its_own_function(v4: ModuleType, scheduled: list[str]) -> None:
    seen: list[int] = []

    def theirs(*_: Any, appended: int = 0) -> None:
        seen.append(appended)

    backend = v4_backend(v4)
    indexer_hooks.around_prepare(theirs, backend, (batch((100_000, 64)),), {"appended": 7})
    indexer_hooks.around_schedule(theirs, None, (None, 64, 132), {"appended": 8})
    assert seen == [7, 8]


def test_outside_a_forward_the_engine_s_planner_is_the_one(v4: ModuleType, scheduled: list[str]) -> None:
    from sglang.kernels.ops.attention.dsv4 import get_paged_mqa_logits_metadata

    backend = v4_backend(v4)
    with pytest.raises(ZeroDivisionError):  # a failing forward leaves nothing behind
        indexer_hooks.around_prepare(lambda _: 1 / 0, backend, (batch((100_000, 64)),), {})
    get_paged_mqa_logits_metadata(None, 64, 132)
    assert scheduled == ["jit"]


def test_the_user_s_own_switch_wins(v4: ModuleType, scheduled: list[str], serving: pytest.MonkeyPatch) -> None:
    serving.setenv("SGLANG_OPT_USE_JIT_INDEXER_METADATA", "1")
    prepare(v4_backend(v4), batch((100_000, 64)), 64)
    assert scheduled == ["jit"]
