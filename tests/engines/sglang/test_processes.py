"""The plugin as it is installed: found by its entry point, in spawned children too, and free where no backend is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.engines.sglang.conftest import STUBS


def python(script: str, installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``script`` from a file, as a spawned child needs it, where the wheel and the engine are installed."""
    path = folder / "script.py"
    path.write_text(script)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLA_TUNE_")}
    environment |= {"PYTHONPATH": f"{installed}{os.pathsep}{STUBS}", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", str(path), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, timeout=300)


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


FORKS = """
import json, os, sys
from importlib import import_module

BACKEND = "sglang.srt.layers.attention.deepseek_v4_backend"
for name in ("sglang.srt.layers.attention.dsa_backend", "sglang.srt.layers.attention.dsv4.indexer",
             "sglang.srt.models.deepseek_v2", "sglang.kernels.ops.attention.dsv4"):
    import_module(name)
assert BACKEND not in sys.modules and "mla_tune" not in sys.modules


def moved():
    # The wheel's own module, with the method's argument renamed on its way in.
    import importlib.machinery

    real = importlib.machinery.SourceFileLoader.get_code

    def get_code(self, fullname):
        if fullname != BACKEND:
            return real(self, fullname)
        source = self.get_source(fullname).replace(
            "self, forward_batch: ForwardBatch, *, num_qo_tokens: int\\n    ) -> bool",
            "self, batch: ForwardBatch, *, num_qo_tokens: int\\n    ) -> bool")
        return compile(source, self.path, "exec")

    importlib.machinery.SourceFileLoader.get_code = get_code


def run(scenario):
    import logging

    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(name)s %(message)s", force=True)
    if scenario["moved"]:
        moved()
    from sglang.srt import plugins

    for _ in range(scenario["loads"]):
        plugins._plugins_loaded = False
        plugins.load_plugins()
    method = import_module(BACKEND).DeepseekV4AttnBackend._use_sparse_prefill
    depth = 0
    while hasattr(method, "_self_wrapper"):
        method, depth = method.__wrapped__, depth + 1
    print("wrappers", depth)


for scenario in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            out = os.open(scenario["name"], os.O_WRONLY | os.O_CREAT)
            os.dup2(out, 1), os.dup2(out, 2)
            os.environ.update(scenario["variables"])
            run(scenario)
            sys.stdout.flush()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, open(scenario["name"]).read()
"""


def scenario(name: str, *, loads: int = 1, moved: bool = False, **variables: str) -> dict[str, object]:
    """One process of SGLang: how it is started, and what is odd about it."""
    return {"name": name, "loads": loads, "moved": moved, "variables": variables}


@pytest.fixture(scope="module")
def said(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each of several processes printed. They are forks of one that has imported SGLang but no V4 backend."""
    folder = tmp_path_factory.mktemp("forks")
    scenarios = (
        scenario("as it is"),
        scenario("loaded twice", loads=2),
        scenario("mode off", MLA_TUNE_MODE="off"),
        scenario("policy off", MLA_TUNE_POLICY="off"),
        scenario("another plugin", SGLANG_PLUGINS="another"),
        scenario("moved seam", moved=True),
    )
    done = python(FORKS, installed, folder, json.dumps(scenarios))
    assert done.returncode == 0, done.stderr
    return {str(one["name"]): (folder / str(one["name"])).read_text().splitlines() for one in scenarios}


def test_a_plugin_that_is_loaded_twice_wraps_once(said: dict[str, list[str]]) -> None:
    assert said["as it is"][-1] == said["loaded twice"][-1] == "wrappers 1"


@pytest.mark.parametrize("name", ["mode off", "policy off", "another plugin"])
def test_off_means_that_nothing_is_hooked(name: str, said: dict[str, list[str]]) -> None:
    assert said[name][-1] == "wrappers 0"
    told = any("mla-tune is off in this process" in line for line in said[name])
    assert told == (name != "another plugin")


def test_an_engine_whose_seam_has_moved_is_left_alone_with_one_warning(said: dict[str, list[str]]) -> None:
    assert said["moved seam"][-1] == "wrappers 0"
    (warning,) = [line for line in said["moved seam"] if line.startswith("WARNING mla_tune")]
    assert "takes (self, batch, num_qo_tokens), not (self, forward_batch, num_qo_tokens, ...)" in warning
    assert f"this is sglang {version('sglang')}, tested with 0.5.22, 0.5.23" in warning
