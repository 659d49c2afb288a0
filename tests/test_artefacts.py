"""The committed measurements, the policies made of them, and what the documents say about them agree, byte for byte."""

from __future__ import annotations

import json
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
from mla_tune.sites.engines import Engine, model_incumbent
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
README = ROOT / "README.md"
DB_README = ROOT / "db" / "README.md"
FIT_README = ROOT / "mla_tune" / "fit" / "README.md"
KERNELS_README = ROOT / "mla_tune" / "kernels" / "README.md"
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


NAMES = {"V3.2": "deepseek-v3.2", "V4-Flash": "deepseek-v4-flash", "V4-Pro": "deepseek-v4-pro"}


def _cells(document: Path, mark: str) -> dict[tuple[str, int], list[str]]:
    """The cells of the table behind a mark, by model and heads."""
    table = _stated(document, rf"<!-- {mark} -->\n(.*?)\n\n")
    stated = re.findall(r"^\| ([\w.-]+), (\d+) \| (.+?) \|$", table, re.MULTILINE)
    return {(NAMES[model], int(heads)): cells.split(" | ") for model, heads, cells in stated}


def test_the_documents_state_what_the_committed_policies_win_over_sglangs_own_choice() -> None:
    judged = [_won(gpu) for gpu in ("nvidia-h200", "nvidia-h100")]
    assert _cells(FIT_README, "held out") == {key: [cell for of in judged for cell in of[key][:2]] for key in judged[0]}
    points = [{count for _, _, count in of.values()} for of in judged]
    assert points == [
        {int(_stated(FIT_README, r"(\d+) shapes a row on the H200"))},
        {int(_stated(FIT_README, r"(\d+) on the H100"))},
    ]
    readme = _cells(README, "gains")
    assert len(readme) == 3
    assert {key: cells[3:] for key, cells in readme.items()} == {key: list(judged[0][key][:2]) for key in readme}


@pytest.mark.parametrize("model", NAMES.values())
def test_readme_states_what_traffic_prints_of_agents(
    model: str, everything: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The chat trace is not ours to ship. One line in every run, the others with ``--all``."""
    commands = re.findall(
        r"^mla-tune (traffic .*--agents.*)$", (ROOT / "mla_tune/replay/README.md").read_text(), re.MULTILINE
    )
    assert len(commands) == 2
    if not everything and model != "deepseek-v4-pro":
        pytest.skip("one model in every run, the others with --all")
    h_q = MODELS[model].heads[0]
    for column, command in enumerate(commands, start=1):
        if everything or column == 2:
            assert run([*command.replace("deepseek-v3.2", model).split(), "--json"]) == 0
            (total,) = (
                of["against_incumbent"] for of in json.loads(capsys.readouterr().out)["rules"] if of["rule"] == "policy"
            )
            assert _cells(README, "gains")[model, h_q][column] == f"{100 * total or 0:.2f} %"


def _won(gpu: str) -> dict[tuple[str, int], tuple[str, str, int]]:
    """By model and heads: what SGLang's own choice and what the policy takes at held-out shapes, and how many these are."""
    path = ROOT / "policies" / f"{gpu}.sglang.yaml"
    stated = load_evidence(path, digest(path.read_bytes()))
    assert stated is not None
    found = {}
    for table in stated.tables:
        if table.site != SiteName.PREFILL_ATTENTION or table.layer != "forward" or table.held_out is None:
            continue
        assert table.h_q is not None
        own = model_incumbent(Engine.SGLANG, SiteName.PREFILL_ATTENTION, MODELS[table.model])
        by_rule = {rule.rule: f"{rule.mean:.2f} ({rule.worst:.2f})" for rule in table.held_out.slowdown}
        found[table.model, table.h_q] = (by_rule[f"always {own}"], by_rule["policy"], table.held_out.points)
    return found


def test_the_documents_state_the_table_that_the_committed_measurements_give() -> None:
    export = read_export(H200)
    rows = usable(export.measurements, export.tuned)
    judged = overall(Observations(rows), load_policy(ROOT / "policies" / "nvidia-h200.yaml").tables)
    assert judged is not None
    table = _stated(FIT_README, r"<!-- overall -->\n(.*?)\n\n")
    stated = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", table, re.MULTILINE)
    expected = [
        (rule.rule, *(f"{value:.3f}" for value in (rule.geomean, rule.mean, rule.p95, rule.worst)))
        for rule in judged.slowdown
    ]
    assert stated == expected
    whole = [m for m in rows if m.part == PER_LAYER_TOTAL and m.candidate == "sparse_fwd" and m.site.h_q]
    held_out = {(m.site, m.shape) for m in whole if m.role is Role.HELD_OUT}
    pairs = f"{judged.points} pairs of a table and a held-out shape, over {len(held_out)} measured"
    assert pairs in " ".join(FIT_README.read_text().split())


def test_the_documents_count_the_points_of_every_committed_export() -> None:
    stated = dict(re.findall(r"^\| `([\w.-]+\.jsonl)` \| (\d+) \|", DB_README.read_text(), re.MULTILINE))
    points = {path.name: {(m.site, m.shape) for m in read_export(path).measurements} for path in EXPORTS}
    assert stated == {name: str(len(found)) for name, found in points.items()}
    overlapping = [site for site, _ in points[H200.name] if site.overlap]
    assert len(overlapping) == int(_stated(DB_README, r"(\d+)\sof\s`nvidia-h200.jsonl`'s"))


def test_the_documents_state_the_limits_that_the_h200s_policy_keeps() -> None:
    policy = load_policy(ROOT / "policies" / "nvidia-h200.yaml")
    kept = {(limit.candidate, limit.num_qo_tokens) for table in policy.tables for limit in table.limits}
    table = _stated(KERNELS_README, r"\| kernel \| heads \| last that runs \|\n\| --- \| --- \| --- \|\n(.*?)\n\n")
    stated = [int(line.strip("| ").rpartition("| ")[2]) for line in table.splitlines()]
    assert len(stated) >= 6
    assert set(stated) == {count for _, count in kept}


def _stated(document: Path, pattern: str) -> str:
    found = re.search(pattern, document.read_text(), re.DOTALL)
    assert found, pattern
    return found.group(1)


def test_the_documents_state_how_far_a_modelled_policy_is_off_published_timings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["model", "--check", "--json"]) == 0
    covered = [of for of in json.loads(capsys.readouterr().out)["checks"] if of["predicted_ms"] is not None]
    table = _stated(FIT_README, r"<!-- published -->\n(.*?)\n\n")
    stated = re.findall(r"\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", table, re.MULTILINE)
    assert len(stated) == len(covered)
    for (predicted, published, ratio), of in zip(stated, covered, strict=True):
        digits = len(predicted.partition(".")[2])
        assert predicted == f"{of['predicted_ms']:.{digits}f}"
        assert float(published) == of["published_ms"]
        assert ratio == f"{of['ratio']:.2f}"


def test_the_documents_show_what_explain_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    block = _stated(FIT_README, r"<!-- explain -->\n```\n(.*?)```")
    command, shown = block.split("\n", 1)
    assert run(command.removeprefix("$ mla-tune ").split()) == 0
    assert capsys.readouterr().out.strip() == shown.strip()
