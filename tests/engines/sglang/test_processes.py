"""The plugin as it is installed: found by its entry point, in spawned children too, and free where no backend is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.engines.sglang.conftest import STUBS


def python(script: str, installed: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``script`` from a file, as a spawned child needs it, where the wheel and the engine are installed."""
    path = folder / "script.py"
    path.write_text(script)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLA_TUNE_")}
    environment |= {"PYTHONPATH": f"{installed}{os.pathsep}{STUBS}", "TRITON_INTERPRET": "1", **variables}
    return subprocess.run(
        [sys.executable, "-W", "ignore", path], env=environment, capture_output=True, text=True, cwd=folder, timeout=300
    )


SPAWN = """
import inspect
import multiprocessing
import sys

BACKEND = "sglang.srt.layers.attention.deepseek_v4_backend"


def child(results):
    from sglang.srt.plugins import load_plugins

    load_plugins()  # the first thing that SGLang's scheduler process does
    early = BACKEND in sys.modules
    import importlib

    method = inspect.getattr_static(importlib.import_module(BACKEND).DeepseekV4AttnBackend, "_use_sparse_prefill")
    results.put((early, method._self_wrapper.__module__))


if __name__ == "__main__":
    from sglang.srt.plugins import load_plugins

    load_plugins()
    before = sorted(name for name in sys.modules if name.startswith("mla_tune") or name == "yaml")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=child, args=(results,))
    process.start()
    print("child", *results.get(timeout=240))
    process.join()
    print("parent", BACKEND in sys.modules, *before)
"""


def test_spawned_children_get_the_hooks_and_a_process_without_a_backend_only_what_waits_for_one(
    installed: Path, tmp_path: Path
) -> None:
    done = python(SPAWN, installed, tmp_path)
    assert done.returncode == 0, done.stderr
    child, parent = done.stdout.strip().split("\n")[-2:]
    assert child == "child False mla_tune.integrations.sglang.v4_hooks"
    loaded = set(parent.split()[2:])
    assert parent.startswith("parent False")
    assert loaded <= {
        *("mla_tune", "mla_tune.errors", "mla_tune.runtime", "mla_tune.runtime.switches"),
        *("mla_tune.integrations", "mla_tune.integrations.seams", "mla_tune.integrations.sglang"),
        *("mla_tune.sites", *(f"mla_tune.sites.{name}" for name in ("candidates", "provider", "site", "stages"))),
        "yaml",  # the engine's
    }


LOAD = """
import importlib, logging, sys

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(name)s %(message)s")
from sglang.srt.plugins import load_plugins

load_plugins()
backend = importlib.import_module("sglang.srt.layers.attention.deepseek_v4_backend").DeepseekV4AttnBackend
print("hooked", hasattr(backend._use_sparse_prefill, "_self_wrapper"))
"""


@pytest.mark.parametrize(
    "variables", [{"MLA_TUNE_MODE": "off"}, {"MLA_TUNE_POLICY": "off"}, {"SGLANG_PLUGINS": "another"}], ids=str
)
def test_off_means_that_nothing_is_hooked(variables: dict[str, str], installed: Path, tmp_path: Path) -> None:
    done = python(LOAD, installed, tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("hooked False")
    assert ("mla-tune is off in this process" in done.stdout) == ("SGLANG_PLUGINS" not in variables)


def test_an_engine_whose_seam_has_moved_is_left_alone_with_one_warning(installed: Path, tmp_path: Path) -> None:
    """The wheel's own module, with the method's argument renamed on its way in."""
    rename = """
import importlib.machinery
real = importlib.machinery.SourceFileLoader.get_code
def moved(self, fullname):
    if fullname != "sglang.srt.layers.attention.deepseek_v4_backend":
        return real(self, fullname)
    source = self.get_source(fullname).replace("self, forward_batch: ForwardBatch, *, num_qo_tokens: int\\n    ) -> bool",
        "self, batch: ForwardBatch, *, num_qo_tokens: int\\n    ) -> bool")
    return compile(source, self.path, "exec")
importlib.machinery.SourceFileLoader.get_code = moved
"""
    done = python(rename + LOAD, installed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("hooked False")
    (warning,) = [line for line in done.stdout.split("\n") if line.startswith("WARNING mla_tune")]
    assert "takes (self, batch, num_qo_tokens), not (self, forward_batch, num_qo_tokens, ...)" in warning
    assert f"this is sglang {version('sglang')}, tested with 0.5.22, 0.5.23" in warning
