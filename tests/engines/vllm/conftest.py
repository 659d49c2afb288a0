"""vLLM's real classes, hooked by the real plugin, on a machine without a GPU: scripts/engine-env makes the environment.

What a constructor of vLLM needs a GPU for is set by hand. The metadata builders, the split into decodes and prefills and
the Triton kernels (in the interpreter) are the wheel's own; of FlashMLA there is a stand-in that answers in torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest

from mla_tune.policy.codec import write_policy
from mla_tune.policy.schema import Choice, Library, Policy, Row, Table
from mla_tune.policy.threshold import Threshold
from mla_tune.sites.candidates import WITH_KVCACHE_MIXED
from mla_tune.sites.engines import Engine
from tests.policy.strategies import full_policy, table

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # set and empty: vLLM then keeps Triton although it sees no GPU
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

SPARSE = "vllm.v1.attention.backends.mla.flashmla_sparse"
V4 = "vllm.models.deepseek_v4.nvidia.flashmla"
CROSSOVER = 300
"""Query tokens from which the policy below says ``sparse_fwd``."""


def rows(small: str, *, from_: int = CROSSOVER) -> tuple[Row, ...]:
    """``small`` up to ``from_`` query tokens, then ``sparse_fwd``."""
    later = Choice(threshold=Threshold.level(from_), candidate="sparse_fwd")
    return (Row(choices=(Choice(candidate=small), later)),)


def vllm_policy(**changes: Any) -> Policy:
    """A policy of the kernels that detection finds in this vLLM; every table crosses over at :data:`CROSSOVER`."""
    from mla_tune.bench.environment import kernel_libraries

    (found,) = (library for library in kernel_libraries() if library.name == "vllm")

    def changed(of: Table) -> Table:
        if of.site != "prefill_attention":
            return msgspec.structs.replace(of, candidate_builds=())
        small = "with_kvcache" if of.engine in (Engine.SGLANG, Engine.OWN) else WITH_KVCACHE_MIXED.name
        return msgspec.structs.replace(of, rows=rows(small), builds=(f"{found.name}=={found.version}",))

    whole = full_policy()
    library = Library(name=found.name, version=found.version, sha256=found.sha256)
    environment = msgspec.structs.replace(whole.environment, libraries=(library,))
    tables = tuple(changed(of) for of in whole.tables)
    return msgspec.structs.replace(whole, environment=environment, tables=tables, **changes)


def other_kernels() -> Policy:
    """The same, measured with another build of the kernels."""
    builds = full_policy().tables[0].builds
    measured = vllm_policy()
    tables = (msgspec.structs.replace(of, builds=builds if of.builds else ()) for of in measured.tables)
    return msgspec.structs.replace(measured, environment=full_policy().environment, tables=tuple(tables))


def replaced(policy: Policy, *tables: Table) -> Policy:
    """``policy`` with ``tables`` in place of its own of the same key."""
    keys = {(t.site, t.model, t.h_q, t.layer, t.engine) for t in tables}
    kept = [t for t in policy.tables if (t.site, t.model, t.h_q, t.layer, t.engine) not in keys]
    return msgspec.structs.replace(policy, tables=(*kept, *tables))


def use_policy(monkeypatch: pytest.MonkeyPatch, folder: Path, policy: Policy) -> Path:
    """Serve ``policy`` from a file that MLA_TUNE_POLICY names."""
    path = folder / "policy.yaml"
    write_policy(path, policy)
    monkeypatch.setenv("MLA_TUNE_POLICY", str(path))
    return path


@pytest.fixture(scope="session")
def _hooked() -> None:
    """The plugin's hooks on the installed release, whichever it is: scripts/engine-env may have made one of the newest."""
    from importlib.metadata import version

    from mla_tune.integrations.vllm import plugin, vllm_state

    release = version("vllm").partition("+")[0]
    if release not in vllm_state.RELEASES:  # before a hook is imported, which reads it
        vllm_state.RELEASES = (*vllm_state.RELEASES, release)
    plugin()


@pytest.fixture(scope="session")
def sparse(_hooked: None) -> ModuleType:
    """vLLM's sparse backend module, imported after the plugin was called, as a worker does."""
    return importlib.import_module(SPARSE)


@pytest.fixture(scope="session")
def v4(_hooked: None) -> ModuleType:
    """vLLM's module of the V4 attention layer, hooked."""
    return importlib.import_module(V4)


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> pytest.MonkeyPatch:
    """A fresh process as far as the plugin goes: no MLA_TUNE_* but a policy, one rank, nothing loaded yet."""
    from mla_tune.integrations.vllm import prefill_hooks
    from mla_tune.integrations.vllm.vllm_state import PROCESS

    for name in ("MODE", "ALLOW_MODELLED", "RANKS", "RECORD"):
        monkeypatch.delenv(f"MLA_TUNE_{name}", raising=False)
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    use_policy(monkeypatch, tmp_path, vllm_policy())
    monkeypatch.setattr(PROCESS, "service", None)
    monkeypatch.setattr(PROCESS, "announced", set())
    monkeypatch.setattr(prefill_hooks, "_choices", {})
    caplog.set_level(logging.INFO, logger="mla_tune")
    return monkeypatch


def v4_config(ratios: list[int], topk: int) -> Any:
    """What this vLLM makes of a checkpoint's config.json: a class of its own up to 0.32, transformers' since."""
    try:
        kind = importlib.import_module("vllm.transformers_utils.configs.deepseek_v4").DeepseekV4Config
    except ImportError:
        kind = importlib.import_module("transformers").DeepseekV4Config
    # A multi-token prediction has a ratio of its own at the end, which is no layer.
    return kind(compress_ratios=[*ratios, 0], num_hidden_layers=len(ratios), index_topk=topk)


def vllm_config(**changes: Any) -> Any:
    """A ``VllmConfig`` as far as the hooks look at it: V3.2 with an FP8 cache, and V4-Flash's layers."""
    base = {
        "cache_config": SimpleNamespace(cache_dtype="fp8_ds_mla"),
        "parallel_config": SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        "attention_config": SimpleNamespace(hisparse_config=None, sparse_mla_prefill_workspace_factor=5),
        "model_config": SimpleNamespace(
            max_model_len=163840,
            hf_text_config=SimpleNamespace(num_hidden_layers=61),
            hf_config=v4_config([0, 0, *([4, 128] * 20), 4], 512),
        ),
    }
    return SimpleNamespace(**(base | changes))


def engine_table(engine: Engine, h_q: int, **changes: Any) -> Table:
    """A V3.2 table of ``engine``."""
    return table(
        model="deepseek-v3.2",
        layer="dsa",
        h_q=h_q,
        engine=engine,
        incumbent="sparse_fwd",
        candidates=("sparse_fwd", WITH_KVCACHE_MIXED.name),
        rows=rows(WITH_KVCACHE_MIXED.name),
        **changes,
    )


def counted() -> tuple[dict[str, int], dict[str, int]]:
    """What this process's deciders chose, and why they fell back, all together."""
    from mla_tune.integrations.vllm.vllm_state import PROCESS

    assert PROCESS.service is not None
    chosen: dict[str, int] = {}
    fallbacks: dict[str, int] = {}
    for decider in PROCESS.service.deciders:
        for target, counts in ((chosen, decider.counters.choices), (fallbacks, decider.counters.fallbacks)):
            for name, count in counts.items():
                if count:
                    target[name] = target.get(name, 0) + count
    return chosen, fallbacks


def made_by(construct: Any, made: Any) -> Any:
    """Our wrapper of the constructor of ``made``, around ``construct`` in place of vLLM's own, which needs a GPU."""
    import inspect

    wrapper = inspect.getattr_static(type(made), "__init__")._self_wrapper
    return lambda *args, **kwargs: wrapper(construct, made, args, kwargs)
