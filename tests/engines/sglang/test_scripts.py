"""The scripts that a GPU machine or a benchmark runs, as far as a machine without a GPU can say."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from mla_tune.policy.codec import load_policy

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def kit() -> ModuleType:
    """scripts/gpu_sglang_kit, in this process: SGLang is imported already."""
    path = str(ROOT / "scripts" / "gpu_sglang_kit")
    spec = spec_from_loader("gpu_sglang_kit", SourceFileLoader("gpu_sglang_kit", path))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["gpu_sglang_kit"] = module  # which its dataclasses look up
    spec.loader.exec_module(module)
    return module


def test_the_gpu_kit_finds_what_it_runs_in_the_wheel(
    kit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_sglang_kit", "--list", "--only", "mixed"])
    assert kit.main() == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "mixed-swa_only: swa_only, prefixes (0, 48, 128), new (32, 16, 64)",
        "mixed-dsa: dsa, prefixes (4096, 2304), new (32, 4)",
        "modes: engine policy policy-wide pin-sparse_fwd pin-with_kvcache",
    ]


def test_the_gpu_kit_widens_the_shipped_policy(kit: ModuleType, tmp_path: Path) -> None:
    shipped = ROOT / "policies" / "nvidia-h200.sglang.yaml"
    before, after = load_policy(shipped), load_policy(kit.widened(shipped, tmp_path))
    assert [table.rows for table in after.tables] == [table.rows for table in before.tables]
    assert {table.measured.num_qo_tokens[0] for table in after.tables} == {1}


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


def test_the_gpu_kit_refuses_a_selection_of_nothing(
    kit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_sglang_kit", "--only", "nothing"])
    with pytest.raises(SystemExit) as ended:
        kit.main()
    assert ended.value.code == 2
    assert "--only must leave a case: got 'nothing'; accepted: part of c4a-8" in capsys.readouterr().err
