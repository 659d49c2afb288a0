"""SGLang's real classes, hooked by the real plugin, on a machine without a GPU: scripts/engine-env makes the environment.

What a constructor of SGLang needs a GPU for is set by hand; the methods that decide are the wheel's own.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mla_tune.integrations.sglang.sglang_state import RELEASES, V4_RELEASES
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

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
elif importlib.util.find_spec("torchvision") is None:
    sys.path.append(str(STUBS))
if not collect_ignore_glob and version("sglang") not in V4_RELEASES and version("sglang") in RELEASES:
    # Earlier releases have no choice of V4's attention to test, and none of the kernels of 0.5.23 to compare with.
    collect_ignore_glob = [
        f"test_{name}.py" for name in ("v4", "stages", "oracle", "scripts", "decision_cost", "processes")
    ]


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
    from sglang.srt import runtime_context, utils
    from sglang.srt.runtime_context import get_parallel

    from mla_tune.integrations.sglang.sglang_state import PROCESS

    for name in ("MODE", "ALLOW_MODELLED", "RANKS", "RECORD"):
        monkeypatch.delenv(f"MLA_TUNE_{name}", raising=False)
    for name in ("OPT_FLASHMLA_SPARSE_PREFILL", "DSV4_Q8KV8_PREFILL", "OPT_USE_JIT_INDEXER_METADATA"):
        monkeypatch.delenv(f"SGLANG_{name}", raising=False)
    use_policy(monkeypatch, tmp_path, mixed_policy())
    monkeypatch.setattr(PROCESS, "service", None)
    monkeypatch.setattr(PROCESS, "announced", set())
    caplog.set_level(logging.INFO, logger="mla_tune")
    ranks = {"attn_tp_size": 1, "attn_tp_rank": 0, "attn_cp_size": 1, "attn_cp_rank": 0, "attn_dcp_size": 1}
    # Earlier releases ask for the GPU by functions of their own.
    monkeypatch.setattr(utils, "get_device_sm", lambda: 90, raising=False)
    monkeypatch.setattr(utils, "is_blackwell", lambda: False, raising=False)
    platform = getattr(runtime_context, "override_platform", lambda **_: nullcontext())
    with get_parallel().override(**ranks), platform(is_sm120=False):
        yield monkeypatch


def use_policy(monkeypatch: pytest.MonkeyPatch, folder: Path, policy: Policy) -> Path:
    """Serve ``policy`` from a file that MLA_TUNE_POLICY names."""
    path = folder / "policy.yaml"
    write_policy(path, policy)
    monkeypatch.setenv("MLA_TUNE_POLICY", str(path))
    return path


def batch(*requests: tuple[int, int], mode: str = "EXTEND", padding: int = 0, **changes: Any) -> Any:
    """SGLang's own ``ForwardBatch``: ``(prefix, new)`` tokens of each request, and ``padding`` empty requests."""
    import torch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    padded = [*requests, *[(0, 0)] * padding]
    lens = torch.tensor([prefix + new for prefix, new in padded])
    nothing = torch.zeros(0, dtype=torch.int64)
    return ForwardBatch(
        **{
            "forward_mode": ForwardMode[mode],
            "batch_size": len(padded),
            "input_ids": nothing,
            "req_pool_indices": nothing,
            "out_cache_loc": nothing,
            "seq_lens": lens,
            "seq_lens_cpu": lens,
            "seq_lens_sum": int(lens.sum()),
            "extend_seq_lens_cpu": [new for _, new in padded],
            "extend_prefix_lens_cpu": [prefix for prefix, _ in padded],
            "extend_num_tokens": sum(new for _, new in padded),
            "rids": [str(number) for number in range(len(requests))],
            **changes,
        }
    )


def made_up_batches(*requests: tuple[int, int]) -> dict[str, Any]:
    """Batches of ``requests`` that no user sent, in the forms that SGLang gives them."""
    return {
        "warm-up or capture": batch(*requests, rids=None),
        "idle rank": batch(*requests, rids=[], sampling_info=Sampling()),
        "replayed idle rank": batch(*requests, rids=None, sampling_info=Sampling()),
    }


class Sampling(list[int]):
    """SGLang's sampling parameters, as far as they are asked for their number."""


def wrapper_of(owner: Any, name: str) -> Any:
    """Our wrapper of a function of SGLang's: ``(wrapped, instance, args, kwargs)``."""
    return inspect.getattr_static(owner, name)._self_wrapper


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
    return constructed(module.DeepseekV4AttnBackend, model_runner or runner(), attributes | changes)


def constructed(kind: Any, model_runner: Any, attributes: dict[str, Any]) -> Any:
    """An object of ``kind`` whose own constructor, which needs a GPU, sets ``attributes``; our wrapper runs around it."""
    backend = object.__new__(kind)
    wrapper_of(kind, "__init__")(lambda *_: backend.__dict__.update(attributes), backend, (model_runner,), {})
    return backend
