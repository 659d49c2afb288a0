"""The commands where an engine's kernels run around attention: refused without them, fitted and explained with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mla_tune.policy.codec import load_policy
from mla_tune.sites.provider import Provider
from mla_tune.sites.site import Conditions
from mla_tune.store.export import write_export
from mla_tune.store.measurement import Measurement, Role
from tests.cli.conftest import SWEEP
from tests.command import run
from tests.fit.synthetic import C4A, ENVIRONMENT, World, fit_shapes, held_out_shapes

PROVIDER = Provider("sglang", "0.5.23", "0.4.10")


def test_a_sweep_with_an_engines_kernels_needs_that_engine_and_says_so_in_one_line(tmp_path: Path) -> None:
    if importlib.util.find_spec("sglang") is not None:
        pytest.skip("sglang is installed")
    result = run(tmp_path, *SWEEP, "--provider", "sglang")
    assert result.returncode == 1
    assert (
        "--provider sglang needs SGLang's kernels: the package sglang is not installed; accepted: sglang 0.5.17"
        in result.stderr
    )
    assert result.stderr.count("\n") == 1


def test_a_policy_of_an_engines_kernels_is_fitted_explained_and_shown_with_them(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    rows = [row for provider in (None, PROVIDER) for row in provided_rows(provider)]
    write_export(tmp_path / "db" / "nvidia-h200.sglang.jsonl", ENVIRONMENT, rows)
    fit = run(tmp_path, "fit", "--gpu", "h200", "--provider", "sglang")
    assert (fit.returncode, fit.stderr) == (0, "")
    file = tmp_path / "policies" / "nvidia-h200.sglang.yaml"
    policy = load_policy(file)
    assert policy.provider == PROVIDER.key
    assert policy.source.command.endswith(f"--provider {PROVIDER.key}")
    place = ("--policy", str(file), "--model", "deepseek-v4-flash", "--layer", "c4a")
    explained = run(tmp_path, "explain", "--gpu", "h200", *place, "64", "1048576").stdout
    assert "kernel of" in explained
    assert {"topk_transform", "sglang 0.5.23"} <= {part.strip() for part in explained.replace("│", "\n").splitlines()}
    assert f"kernels of {PROVIDER.key}" in run(tmp_path, "policy", "show", "--policy", str(file)).stdout.replace(
        "\n", " "
    )


def provided_rows(provider: Provider | None) -> list[Measurement]:
    """Made-up measurements of one c4a site with these kernels."""
    site, world = Conditions(provider=provider).at(C4A), World()
    return [*world.measure(site, fit_shapes()), *world.measure(site, held_out_shapes(), Role.HELD_OUT)]
