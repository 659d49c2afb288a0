"""``mla-tune model``: what it writes, what it says, and what it refuses in one line."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from mla_tune.cli import run
from mla_tune.fit.published import PUBLISHED
from mla_tune.hardware.sku import Environment
from mla_tune.policy.codec import load_policy
from mla_tune.store.export import write_export
from tests.cli.conftest import contents
from tests.cli.test_refusals import refusal
from tests.fit.synthetic import C4A, ENVIRONMENT, World, sweep

H100 = Path("policies/nvidia-h100.yaml")
LOOKUP = ("16", "1048576", "--gpu", "h100", "--model", "deepseek-v4-flash", "--layer", "c4a")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with made-up measurements of an H200, at one site."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLA_TUNE_HOME", ".")
    export("nvidia-h200", ENVIRONMENT)
    return tmp_path


def export(sku: str, environment: Environment) -> None:
    path = Path("db") / f"{sku}.jsonl"
    path.parent.mkdir(exist_ok=True)
    write_export(path, replace(environment, sku=sku), sweep(World(), [C4A]), [])


def test_a_modelled_policy_is_written_and_its_own_command_makes_the_same_bytes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["model", "--from", "nvidia-h200", "--to", "nvidia-h100"]) == 0
    out = capsys.readouterr().out
    assert f"modelled policy written to {H100}" in out
    assert "nothing was timed on nvidia-h100" in " ".join(out.split())
    written, policy = H100.read_bytes(), load_policy(H100)
    assert policy.evidence == "modelled"
    assert policy.source.file == "db/nvidia-h200.jsonl"
    H100.unlink()
    assert run(shlex.split(policy.source.command)[1:]) == 0
    assert H100.read_bytes() == written


def test_several_gpus_are_modelled_at_once_and_figures_of_them_are_checked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["model", "--to", "b200", "--to", "h20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [policy["gpu"]["sku"] for policy in found["policies"]] == ["nvidia-b200", "nvidia-h20"]
    assert [policy["path"] for policy in found["policies"]] == ["policies/nvidia-b200.yaml", "policies/nvidia-h20.yaml"]
    assert {entry["sku"] for entry in found["checks"]} == {"nvidia-b200"}
    assert len(found["checks"]) == sum(figure.sku == "nvidia-b200" for figure in PUBLISHED)


def test_products_with_the_same_figures_share_the_policy_of_the_first_that_was_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["model", "--to", "h100", "--to", "h800", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["policies"]
    assert found["gpu"] == {"sku": "nvidia-h100", "sm_count": 132, "also": ["nvidia-h800"]}
    assert load_policy(H100).gpu.skus == ("nvidia-h100", "nvidia-h800")
    assert not Path("policies/nvidia-h800.yaml").exists()


def test_check_alone_prints_every_published_figure_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    assert run(["model", "--check"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for figure in PUBLISHED:
        assert f"{figure.published_ms:.3f}" in out
        assert figure.source in out
    assert "not covered by a stage" in out
    assert contents(folder) == before


def test_a_measured_policy_replaces_a_modelled_one_and_never_the_other_way_round(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["model", "--to", "h100"]) == 0
    export("nvidia-h100", ENVIRONMENT)
    assert run(["fit", "--gpu", "h100"]) == 0
    assert load_policy(H100).evidence == "measured"
    code, line = refusal(capsys, folder, "model", "--to", "h100")
    assert code == 1
    assert line.startswith(f"a modelled policy never replaces a measured one: {H100} is measured")


def test_a_measured_policy_of_another_schema_is_kept_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    H100.parent.mkdir()
    H100.write_text("schema: 99\nevidence: measured\n")
    code, line = refusal(capsys, folder, "model", "--to", "h100")
    assert (code, "never replaces a measured one" in line) == (1, True)


def test_a_modelled_choice_is_looked_up_shown_and_explained_by_the_scaled_costs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["model", "--to", "h100"]) == 0
    capsys.readouterr()
    named = ["--policy", str(H100)]
    assert run(["lookup", *LOOKUP, *named]) == 0
    printed = capsys.readouterr().out
    assert "modelled for nvidia-h100" in printed.splitlines()[0]
    assert "\nchoice: with_kvcache, " in printed
    assert run(["policy", "show", *named]) == 0
    assert "not judged" in capsys.readouterr().out
    assert run(["explain", *LOOKUP, *named, "--json"]) == 0
    explained = json.loads(capsys.readouterr().out)
    assert explained["decision"]["candidate"] == "with_kvcache"
    assert [entry["measured_us"] for entry in explained["candidates"]] == [None, None]
    # The H100 has 3.35 of the H200's 4.8 TB/s: what is dequantized takes that much longer than it was measured to.
    stage_us = {line["stage"]: line["latency_us"] for entry in explained["candidates"] for line in entry["stages"]}
    rows = 1048576 // 4
    assert stage_us["dequantize_compressed"] == pytest.approx(3 + 4.5e-4 * rows * 4.8 / 3.35, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--to", "h300"], 2, "--to must be a GPU whose datasheet mla-tune has: got 'h300'; accepted: h20, h100"),
        (["--to", "cpu"], 2, "got 'cpu'; accepted: h20, h100"),
        (["--to", "h100", "--from", "l4"], 2, "--from must be a GPU whose datasheet mla-tune has: got 'l4'"),
        (["--to", "h200"], 2, "--to must be another GPU than --from: got nvidia-h200 for both; accepted: h20, h100"),
        ([], 2, "--to must name the GPU to model: got none; accepted: h20, h100, h800"),
        (["--to", "h20", "--to", "h100", "--out", "p.yaml"], 2, "--out must be the file of one policy: got 2 GPUs"),
        (["--check", "--out", "p.yaml"], 2, "--out must be the file of one policy: got 0 GPUs"),
        (["--to", "h100", "--from", "b200"], 1, "cannot read db/nvidia-b200.jsonl: No such file"),
        (["--to", "h100", "--measurements", "no.jsonl"], 1, "cannot read no.jsonl: No such file"),
        (
            ["--to", "h20", "--from", "h100", "--measurements", "db/nvidia-h200.jsonl"],
            1,
            "db/nvidia-h200.jsonl was measured on nvidia-h200, not on nvidia-h100",
        ),
        (["--to", "h100", "--out", "db"], 1, "Is a directory"),
    ],
)
def test_what_cannot_be_modelled_is_said_in_one_line_and_nothing_is_touched(
    arguments: list[str], code: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got, line = refusal(capsys, folder, "model", *arguments)
    assert got == code
    assert said in line
