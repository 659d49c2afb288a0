"""The committed measurements, the policies made of them, and what README says about them agree, byte for byte."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mla_tune.cli import run
from mla_tune.fit.evaluation import overall
from mla_tune.fit.observations import Observations
from mla_tune.fit.usable import usable
from mla_tune.hardware.datasheet import same_figures
from mla_tune.hardware.sku import SKUS
from mla_tune.integrations.sglang.sglang_state import RELEASES
from mla_tune.policy.codec import digest, load_policy
from mla_tune.policy.evidence import load_evidence
from mla_tune.policy.search import policy_file
from mla_tune.sites.provider import Provider
from mla_tune.sites.site import MODELS, SiteName
from mla_tune.store.export import export_lines, export_sha256, read_export
from mla_tune.store.measurement import PER_LAYER_TOTAL, Role
from tests.rebuilt import skip_if_rebuilt

ROOT = Path(__file__).parent.parent
POLICIES = sorted((ROOT / "policies").glob("*.yaml"))
MODELLED = [path for path in POLICIES if load_policy(path).evidence == "modelled"]
MEASURED = [path for path in POLICIES if path not in MODELLED]
EXPORTS = sorted((ROOT / "db").glob("*.jsonl"))
README = (ROOT / "README.md").read_text()
H200 = ROOT / "db" / "nvidia-h200.jsonl"


def rebuilds() -> list[tuple[Path, Path]]:
    """Every committed policy with the measurements that it is made of."""
    return [(path, ROOT / load_policy(path).source.file) for path in POLICIES]


def _skus(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def test_every_policy_has_its_measurements_and_the_other_way_round() -> None:
    assert set(_skus(MEASURED)) == set(_skus(EXPORTS))
    assert {"cpu", "nvidia-h200"} <= set(_skus(MEASURED))


def test_what_sglang_is_served_by_was_measured_with_a_release_that_the_plugin_serves() -> None:
    provided = {path: load_policy(path).provider for path in POLICIES if path.stem.endswith(".sglang")}
    assert provided
    assert {Provider.parse(key or "").version for key in provided.values()} <= set(RELEASES)


def test_every_product_that_mla_tune_knows_has_a_policy() -> None:
    assert {sku.name for sku in SKUS} <= {sku for path in POLICIES for sku in load_policy(path).gpu.skus}


def test_a_product_without_a_file_of_its_own_is_served_by_one_that_names_it_and_models_the_same_figures() -> None:
    for sku in {sku.name for sku in SKUS}:
        policy = load_policy(str(policy_file(sku).path))
        assert sku in policy.gpu.skus
        if policy.evidence == "modelled":
            assert set(policy.gpu.skus) == {sheet.sku for sheet in same_figures(sku)}


@pytest.mark.parametrize("path", POLICIES, ids=_skus(POLICIES))
def test_a_committed_policy_names_an_export_as_it_is_and_a_command_that_holds_for_any_name(path: Path) -> None:
    policy = load_policy(path)
    assert policy.source.sha256 == export_sha256(ROOT / policy.source.file)
    words = policy.source.command.split()
    assert words[:2] == ["mla-tune", "model" if path in MODELLED else "fit"]
    assert "--out" not in words
    assert load_evidence(path, digest(path.read_bytes())) is not None


@pytest.mark.parametrize("path", POLICIES, ids=_skus(POLICIES))
def test_the_committed_policy_is_rebuilt_byte_for_byte_without_torch(path: Path, everything: bool) -> None:
    skip_if_rebuilt(path, ROOT / load_policy(path).source.file, everything=everything)
    words = ["fit", "--check", path.relative_to(ROOT).as_posix()]
    script = f"import sys; from mla_tune.cli import run; sys.exit(run({words}) or 'torch' in sys.modules)"
    checked = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("path", MODELLED, ids=_skus(MODELLED))
def test_a_modelled_policy_has_the_tables_of_the_measured_one_and_says_first_that_it_is_modelled(path: Path) -> None:
    modelled, measured = load_policy(path), load_policy(ROOT / "policies" / "nvidia-h200.yaml")
    assert [(t.key, t.incumbent) for t in modelled.tables] == [(t.key, t.incumbent) for t in measured.tables]
    assert path.read_text().splitlines()[2].startswith("# WARNING: modelled, not measured")
    assert modelled.scaled_from == "nvidia-h200"
    stated = load_evidence(path, digest(path.read_bytes()))
    assert stated is not None
    assert stated.modelled is not None
    assert all(entry.relative > 0 for table in stated.tables for entry in table.uncertainty)


@pytest.mark.parametrize("export", EXPORTS, ids=_skus(EXPORTS))
def test_a_committed_export_is_what_exporting_it_again_would_write_and_stays_small(export: Path) -> None:
    found = read_export(export)
    lines = export_lines(found.environment, found.measurements, found.tries, found.tuned)
    assert "".join(f"{line.rstrip()}\n" for line in lines) == export.read_text()
    assert export.stat().st_size < 5_000_000
    assert load_policy(ROOT / "policies" / f"{export.stem}.yaml").source.sha256 == export_sha256(export)


def test_the_h200_was_measured_at_both_sites_with_every_model_head_count_and_layer_type() -> None:
    tables = {(t.site, t.model, t.h_q, t.layer) for t in load_policy(ROOT / "policies" / "nvidia-h200.yaml").tables}
    for model in MODELS.values():
        for layer in (*model.site_layers(SiteName.PREFILL_ATTENTION), "forward"):
            assert {(SiteName.PREFILL_ATTENTION, model.name, h_q, layer) for h_q in model.heads} <= tables
        for layer in (*model.site_layers(SiteName.INDEXER_METADATA), "forward"):
            assert (SiteName.INDEXER_METADATA, model.name, None, layer) in tables


def test_readme_states_the_table_that_the_committed_measurements_give() -> None:
    export = read_export(H200)
    rows = usable(export.measurements, export.tuned)
    judged = overall(Observations(rows), load_policy(ROOT / "policies" / "nvidia-h200.yaml").tables)
    assert judged is not None
    table = _stated(r"<!-- overall -->\n(.*?)\n\n")
    stated = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", table, re.MULTILINE)
    expected = [
        (rule.rule, *(f"{value:.3f}" for value in (rule.geomean, rule.mean, rule.p95, rule.worst)))
        for rule in judged.slowdown
    ]
    assert stated == expected
    whole = [m for m in rows if m.part == PER_LAYER_TOTAL and m.candidate == "sparse_fwd" and m.site.h_q]
    held_out = {(m.site, m.shape) for m in whole if m.role is Role.HELD_OUT}
    assert f"{judged.points} pairs of a table and a held-out shape, over {len(held_out)} measured" in README
    assert len({(m.site, m.shape) for m in export.measurements}) == int(_stated(r"holds (\d+) points in all"))


def _stated(pattern: str) -> str:
    found = re.search(pattern, README, re.DOTALL)
    assert found, pattern
    return found.group(1)


def test_readme_shows_what_explain_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    block = _stated(r"<!-- explain -->\n```\n(.*?)```")
    command, shown = block.split("\n", 1)
    assert run(command.removeprefix("$ mla-tune ").split()) == 0
    assert capsys.readouterr().out.strip() == shown.strip()


def test_every_command_that_readme_lists_exists(capsys: pytest.CaptureFixture[str]) -> None:
    listed = re.findall(r"^\| `mla-tune ([a-z |\\]+)", README, re.MULTILINE)
    names = [name.replace("\\", "").split() for name in listed]
    assert len(names) >= 8
    for words in names:
        for last in words[-1].split("|"):
            assert run([*words[:-1], last, "--help"]) == 0
    capsys.readouterr()
