"""``doctor`` names what would mislead, with its mend, and leaves what is merely absent a note."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mla_tune.cli import run
from mla_tune.cli.doctoring import Diagnosis, Health, diagnoses
from mla_tune.errors import EnvironmentMismatchError
from mla_tune.hardware.nvml import GpuIdentity
from mla_tune.integrations.sglang.sglang_state import RELEASES

PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("MLA_TUNE")}


def troubles(**variables: str) -> list[Diagnosis]:
    return [of for of in diagnoses({**PLAIN, **variables}) if of.health is Health.TROUBLE]


def install(site: Path, name: str, version: str, entry_points: str = "") -> None:
    """What a distribution leaves of itself in ``site``, without its code."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of distributions before all others, on a machine without a GPU."""
    monkeypatch.setattr("mla_tune.cli.doctoring.detect_gpu", lambda: None)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("site")
def test_a_machine_that_merely_lacks_things_has_nothing_to_mend() -> None:
    assert troubles() == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MLA_TUNE_POLCY", "MLA_TUNE_POLICY"),
        ("MLA_TUNE_ALOW_MODELLED", "MLA_TUNE_ALLOW_MODELLED"),
        ("mla_tune_mode", "MLA_TUNE_MODE"),
        ("MLA_TUNE_RECORDS", "MLA_TUNE_RECORD"),
    ],
)
@pytest.mark.usefixtures("site")
def test_a_misspelt_variable_is_named_with_the_one_that_was_meant(name: str, meant: str) -> None:
    (found,) = troubles(**{name: "1"})
    assert (found.topic, found.said, found.mend) == ("variables", f"{name} is read by nobody", f"set {meant} instead")


@pytest.mark.usefixtures("site")
def test_a_value_that_no_variable_accepts_is_named_with_the_rule() -> None:
    (found,) = [of for of in troubles(MLA_TUNE_ALLOW_MODELLED="perhaps") if of.topic == "variables"]
    assert "MLA_TUNE_ALLOW_MODELLED" in found.said
    assert "perhaps" in found.said


def test_two_distributions_of_one_library_are_trouble(site: Path) -> None:
    install(site, "sgl-flash-mla", "1.0.0")
    install(site, "flash-mla", "1.0.0")
    (found,) = troubles()
    assert found.said.startswith("flash_mla comes from several distributions, one over the other: sgl-flash-mla 1.0.0")
    assert found.mend == "uninstall all of them, then install sgl-flash-mla alone"


def test_an_engine_whose_hooks_are_not_known_is_trouble_and_a_known_one_is_not(site: Path) -> None:
    install(site, "sglang", "0.1.0")
    found = [of for of in troubles() if of.topic == "sglang plugin"]
    assert [of.said for of in found][:1] == ["sglang 0.1.0 is no release whose hooks are known"]
    assert RELEASES[-1] in found[0].mend


def test_a_filter_that_leaves_the_plugin_out_is_trouble(site: Path) -> None:
    install(site, "sglang", RELEASES[-1])
    install(site, "mla-tune-points", "1", "[sglang.srt.plugins]\nmla_tune = mla_tune.integrations.sglang:plugin\n")
    assert [of for of in troubles() if of.topic == "sglang plugin"] == []
    assert [of for of in troubles(SGLANG_PLUGINS="other, mla_tune") if of.topic == "sglang plugin"] == []
    (found,) = [of for of in troubles(SGLANG_PLUGINS="other") if of.topic == "sglang plugin"]
    assert found.said == "SGLANG_PLUGINS=other keeps the plugin from loading"
    assert found.mend == "add mla_tune to SGLANG_PLUGINS, or unset it"


def test_an_engine_that_is_installed_and_served_by_nothing_is_trouble(site: Path) -> None:
    install(site, "sglang", RELEASES[-1])
    (found,) = [of for of in troubles() if of.topic == "sglang policy"]
    assert "no policy file" in found.said
    assert "mla-tune ensure" in found.mend


def test_a_gpu_that_the_driver_does_not_tell_is_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut() -> GpuIdentity:
        raise EnvironmentMismatchError("the GPU must be whole: got MIG slices")

    monkeypatch.setattr("mla_tune.cli.doctoring.detect_gpu", cut)
    (found,) = [of for of in troubles() if of.topic == "GPU"]
    assert "MIG" in found.said
    monkeypatch.setattr("mla_tune.cli.doctoring.detect_gpu", lambda: GpuIdentity("NVIDIA H200", "nvidia-h200", 0, ""))
    monkeypatch.setattr("mla_tune.cli.doctoring._other_work", lambda: iter(()))
    (found,) = [of for of in troubles() if of.topic == "GPU"]
    assert "upgrade the driver" in found.mend


@pytest.mark.usefixtures("site")
def test_the_exit_code_and_the_last_line_say_whether_there_is_anything_to_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1].startswith("verdict: nothing to mend, ")
    assert "sglang sample: deepseek-v3.2, 64 query tokens in 131072 of context: with_kvcache, by sglang itself" in (
        " ".join(text.split())
    )
    assert max(map(len, text.splitlines())) <= 80
    monkeypatch.setenv("MLA_TUNE_POLCY", "x")
    assert run(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [of["said"] for of in found if of["health"] == "trouble"] == ["MLA_TUNE_POLCY is read by nobody"]
