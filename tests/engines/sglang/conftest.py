"""SGLang's real classes, hooked by the real plugin, on a machine without a GPU: scripts/engine-env makes the environment.

What a constructor of SGLang needs a GPU for is set by hand; the methods that decide are the wheel's own.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mla_tune.policy.codec import write_policy
from mla_tune.policy.schema import Choice, Policy, Row, Table
from mla_tune.policy.threshold import Threshold
from tests.policy.strategies import full_policy, table

STUBS = Path(__file__).parents[1] / "stubs"
V4 = "sglang.srt.layers.attention.deepseek_v4_backend"
DSA = "sglang.srt.layers.attention.dsa_backend"
SCHEDULES = "sglang.kernels.ops.attention.dsv4"
RATIOS = [0, 0, *([4, 128] * 20), 4, 0]
"""V4-Flash's compress ratios, with its multi-token-prediction layer behind them."""

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
elif importlib.util.find_spec("torchvision") is None:
    sys.path.append(str(STUBS))


def rows(*choices: tuple[int, str]) -> tuple[Row, ...]:
    """One row with ``(from query tokens, candidate)`` choices."""
    found = (Choice(threshold=Threshold.level(start), candidate=name) for start, name in choices)
    return (Row(choices=tuple(found)),)


def attention(layer: str, *choices: tuple[int, str], **changes: Any) -> Table:
    """A V4-Flash table of one layer type."""
    return table(layer=layer, rows=rows(*choices), **changes)


def mixed_policy() -> Policy:
    """Each layer type of V4-Flash crosses over elsewhere, a whole forward and V3.2 at 6000 query tokens."""
    late = ((0, "with_kvcache"), (6000, "sparse_fwd"))
    changed = (
        attention("swa_only", (0, "sparse_fwd")),
        attention("c4a", (0, "with_kvcache"), (300, "sparse_fwd")),
        attention("c128a", (0, "with_kvcache"), (2000, "sparse_fwd")),
        attention("forward", *late),
        *(attention("dsa", *late, model="deepseek-v3.2", h_q=heads) for heads in (64, 128)),
    )
    whole = full_policy()
    kept = [t for t in whole.tables if (t.site, t.model, t.layer) not in _keys(changed)]
    return _with(whole, (*kept, *changed))


def without_windows(policy: Policy) -> Policy:
    """The same with nothing said about layers that only have a window: whole forwards remain."""
    return _with(policy, tuple(t for t in policy.tables if t.layer != "swa_only"))


def _keys(tables: Any) -> set[tuple[str, str, str]]:
    return {(t.site, t.model, t.layer) for t in tables}


def _with(policy: Policy, tables: Sequence[Table]) -> Policy:
    import msgspec

    return msgspec.structs.replace(policy, tables=tuple(tables))


@pytest.fixture(scope="session")
def v4() -> ModuleType:
    """SGLang's V4 backend module, imported after the plugin was called, as a scheduler does."""
    from mla_tune.integrations.sglang import plugin

    plugin()
    import importlib

    importlib.import_module(SCHEDULES)
    return importlib.import_module(V4)


@pytest.fixture(scope="session")
def dsa(v4: ModuleType) -> ModuleType:
    """SGLang's DSA backend module, hooked."""
    import importlib

    return importlib.import_module(DSA)


@pytest.fixture
def serving(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[pytest.MonkeyPatch]:
    """A fresh process as far as the plugin goes: no MLA_TUNE_* but a policy, one rank, nothing loaded yet."""
    from sglang.srt.runtime_context import get_parallel, override_platform

    from mla_tune.integrations.sglang.sglang_process import PROCESS

    for name in ("MODE", "ALLOW_MODELLED", "RANKS", "RECORD"):
        monkeypatch.delenv(f"MLA_TUNE_{name}", raising=False)
    for name in ("OPT_FLASHMLA_SPARSE_PREFILL", "DSV4_Q8KV8_PREFILL", "OPT_USE_JIT_INDEXER_METADATA"):
        monkeypatch.delenv(f"SGLANG_{name}", raising=False)
    use_policy(monkeypatch, tmp_path, mixed_policy())
    monkeypatch.setattr(PROCESS, "service", None)
    monkeypatch.setattr(PROCESS, "announced", False)
    caplog.set_level(logging.INFO, logger="mla_tune")
    ranks = {"attn_tp_size": 1, "attn_tp_rank": 0, "attn_cp_size": 1, "attn_cp_rank": 0, "attn_dcp_size": 1}
    with get_parallel().override(**ranks), override_platform(is_sm120=False):
        yield monkeypatch


def use_policy(monkeypatch: pytest.MonkeyPatch, folder: Path, policy: Policy) -> Path:
    """Serve ``policy`` from a file that MLA_TUNE_POLICY names."""
    path = folder / "policy.yaml"
    write_policy(path, policy)
    monkeypatch.setenv("MLA_TUNE_POLICY", str(path))
    return path


@dataclass
class Batch:
    """What the hooks read of a ``ForwardBatch``, with its names and types."""

    forward_mode: Any
    extend_seq_lens_cpu: list[int] | None
    extend_prefix_lens_cpu: list[int] | None
    seq_lens_cpu: Any = None
    seq_lens_sum: int | None = None
    extend_num_tokens: int | None = None
    full_prefill_cuda_graph_capture: bool = False
    attn_cp_metadata: Any = None

    def get_max_chunk_capacity(self) -> int:
        return 131072


def batch(*requests: tuple[int, int], mode: str = "EXTEND", padding: int = 0) -> Batch:
    """``(prefix, new)`` tokens of each request; ``padding`` requests without tokens behind them."""
    import torch
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    padded = [*requests, *[(0, 0)] * padding]
    lens = [prefix + new for prefix, new in padded]
    return Batch(
        forward_mode=ForwardMode[mode],
        extend_seq_lens_cpu=[new for _, new in padded],
        extend_prefix_lens_cpu=[prefix for prefix, _ in padded],
        seq_lens_cpu=torch.tensor(lens),
        seq_lens_sum=sum(lens),
        extend_num_tokens=sum(new for _, new in padded),
    )


def runner(**changes: Any) -> Any:
    """A ``ModelRunner`` of V4-Flash, as far as the hooks look at it."""
    config = SimpleNamespace(compress_ratios=RATIOS, num_hidden_layers=43)
    model = SimpleNamespace(hf_text_config=config, num_attention_heads=64)
    base = {"model_config": model, "is_draft_worker": False, "server_args": SimpleNamespace(dsa_prefill_backend=None)}
    return SimpleNamespace(**(base | changes))


def v4_backend(module: ModuleType, model_runner: Any = None, **changes: Any) -> Any:
    """A V4 backend after its hooked constructor."""
    attributes = {
        "index_topk": 512,
        "trtllm_attn": False,
        "dsv4_prefill_backend": "auto",
        "forward_metadata": SimpleNamespace(late_layer_tail=None),
    }
    return constructed(
        module.DeepseekV4AttnBackend, "mla_tune.integrations.sglang.v4_hooks", model_runner, attributes | changes
    )


def constructed(kind: Any, hooks: str, model_runner: Any, attributes: dict[str, Any], *more: Any) -> Any:
    """An object of ``kind`` whose own constructor is replaced by setting ``attributes``; ours runs around it."""
    import importlib

    def construct(self: Any, model_runner: Any) -> None:
        self.__dict__.update(attributes)

    backend = object.__new__(kind)
    importlib.import_module(hooks)._around_init(construct, *more)(backend, model_runner or runner())
    return backend
