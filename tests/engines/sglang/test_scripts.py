"""The scripts that a GPU machine or a benchmark runs, as far as a machine without a GPU can say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.engines.sglang.conftest import STUBS

ROOT = Path(__file__).parents[3]


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of scripts/ with this Python."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{STUBS}", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_gpu_kit_finds_what_it_runs_in_the_wheel() -> None:
    done = script("gpu_sglang_kit", "--list", "--only", "mixed")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == [
        "mixed-swa_only: swa_only, prefixes (0, 48, 128), new (32, 16, 64)",
        "mixed-dsa: dsa, prefixes (4096, 2304), new (32, 4)",
        "modes: engine policy policy-wide pin-sparse_fwd pin-with_kvcache",
    ]


def test_the_gpu_kit_uses_functions_that_the_wheel_has() -> None:
    from sglang.test.kits.attention_unittest.attention_methods import dsa_attention, dsv4_attention

    source = (ROOT / "scripts" / "gpu_sglang_kit").read_text()
    for kit, function in ((dsv4_attention, "run_v4"), (dsa_attention, "run_dsa")):
        body = source.partition(f"def {function}(")[2].partition("\ndef ")[0]
        names = {
            part.split("(")[0].split(",")[0].split(")")[0].split("\n")[0].split(" ")[0]
            for part in body.split("kit.")[1:]
        }
        missing = {name for name in names if name.isidentifier() and not hasattr(kit, name)}
        assert missing == set()
        assert len(names) > 3


def test_the_gpu_kit_refuses_a_selection_of_nothing() -> None:
    done = script("gpu_sglang_kit", "--only", "nothing")
    assert done.returncode == 2
    assert "--only must leave a case: got 'nothing'; accepted: part of c4a-8" in done.stderr
