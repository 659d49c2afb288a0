"""The plugin as vLLM runs it: in every process, spawned ones too, unguarded; and a vLLM that it does not know."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SPAWN = """
import inspect
import multiprocessing
import sys

BACKENDS = ("vllm.v1.attention.backends.mla.flashmla_sparse", "vllm.models.deepseek_v4.nvidia.flashmla")


def child(results):
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # the first thing that vLLM's worker process does
    early = any(name in sys.modules for name in BACKENDS)
    import importlib

    sparse, v4 = map(importlib.import_module, BACKENDS)
    results.put((early, *(inspect.getattr_static(owner, name)._self_wrapper.__module__ for owner, name in (
        (sparse.FlashMLASparseMetadataBuilder, "build"), (v4.DeepseekV4FlashMLAAttention, "_forward_prefill")))))


if __name__ == "__main__":
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    before = sorted(name for name in sys.modules if name.startswith("mla_tune"))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=child, args=(results,))
    process.start()
    print("child", *results.get(timeout=240))
    process.join()
    print("parent", *before)
"""


def test_spawned_children_get_the_hooks_and_a_process_without_a_backend_only_what_waits_for_one(
    installed: Path, tmp_path: Path
) -> None:
    path = tmp_path / "script.py"
    path.write_text(SPAWN)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLA_TUNE_")}
    environment["PYTHONPATH"] = str(installed)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", path],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    child, parent = done.stdout.strip().split("\n")[-2:]
    assert child == "child False mla_tune.integrations.vllm.mixed_batch_hooks mla_tune.integrations.vllm.prefill_hooks"
    assert set(parent.split()[1:]) <= {
        *("mla_tune", "mla_tune.errors", "mla_tune.runtime", "mla_tune.runtime.switches"),
        *("mla_tune.integrations", "mla_tune.integrations.seams", "mla_tune.integrations.vllm"),
        *("mla_tune.sites", *(f"mla_tune.sites.{name}" for name in ("candidates", "provider", "site", "stages"))),
    }


@pytest.mark.parametrize("variable", ["MLA_TUNE_MODE", "MLA_TUNE_POLICY"])
def test_off_means_that_nothing_waits_for_a_backend(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mla_tune.integrations import vllm

    waits_for: list[str] = []
    monkeypatch.setattr(vllm, "after_import", lambda name, _: waits_for.append(name))
    monkeypatch.delenv("MLA_TUNE_MODE", raising=False)
    monkeypatch.delenv("MLA_TUNE_POLICY", raising=False)
    vllm.plugin()
    assert waits_for == [vllm.SPARSE_BACKEND, vllm.V4_BACKEND, *vllm.RUNNERS]
    waits_for.clear()
    monkeypatch.setenv(variable, "off")
    vllm.plugin()
    assert waits_for == []


def test_an_error_of_the_plugin_never_reaches_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mla_tune.integrations import vllm

    monkeypatch.delenv("MLA_TUNE_MODE", raising=False)
    monkeypatch.delenv("MLA_TUNE_POLICY", raising=False)
    monkeypatch.setattr(vllm, "after_import", lambda *_: 1 / 0)
    vllm.plugin()
    assert [record.levelname for record in caplog.records] == ["ERROR"]


class Builder:
    """The methods that the hooks replace, of a vLLM that is as expected."""

    def __init__(self, kv_cache_spec: object, layer_names: object, vllm_config: object, device: object) -> None: ...

    def build(self, common_prefix_len: int, common_attn_metadata: object, fast_build: bool = False) -> None: ...
    def _build_fp8_separate_prefill_decode(self, common_attn_metadata: object, metadata: object) -> None: ...
    def _build_fp8_mixed_decode_prefill(self) -> None: ...


class OtherBuilder(Builder):
    """One whose decision takes something else."""

    __init__, build = Builder.__init__, Builder.build

    def _build_fp8_separate_prefill_decode(self, metadata: object) -> None:  # type: ignore[override]
        ...


class LesserBuilder(Builder):
    """One that has lost the other way to build."""

    __init__, build = Builder.__init__, Builder.build
    _build_fp8_separate_prefill_decode = Builder._build_fp8_separate_prefill_decode
    _build_fp8_mixed_decode_prefill = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kind", "release", "said"),
    [
        (Builder, "0.33.0+cu130", None),
        (
            Builder,
            "0.34.0",
            "vllm 0.34.0 is not a release that it is made for; this is vllm 0.34.0, tested with 0.31.0, 0.32.0, 0.33.0",
        ),
        (OtherBuilder, "0.33.0", "its FlashMLASparseMetadataBuilder._build_fp8_separate_prefill_decode takes"),
        (LesserBuilder, "0.33.0", "it has no FlashMLASparseMetadataBuilder._build_fp8_mixed_decode_prefill"),
    ],
)
def test_a_vllm_that_is_not_known_is_left_alone_with_one_warning(
    kind: type, release: str, said: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mla_tune.integrations import seams
    from mla_tune.integrations.vllm import mixed_batch_hooks, vllm_state

    monkeypatch.setattr(seams, "installed_version", lambda _: release)
    monkeypatch.setattr(vllm_state.PROCESS, "hooks", seams.Hooks("vllm"))
    module = ModuleType("backend")
    copied: Any = type(kind.__name__, (), dict(vars(kind)) | {"_build_fp8_mixed_decode_prefill": _mixed(kind)})
    vars(module).update(FlashMLASparseMetadataBuilder=copied, MIN_HEADS_FOR_BF16_PREFILL=32)
    before = dict(vars(copied))
    mixed_batch_hooks.hook_builder(module)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    if said is None:
        assert warnings == []
        assert copied.build.__wrapped__ is before["build"]
        return
    (warning,) = warnings
    assert said in warning
    assert dict(vars(copied)) == before


def _mixed(kind: type) -> object:
    return kind._build_fp8_mixed_decode_prefill  # type: ignore[attr-defined]
