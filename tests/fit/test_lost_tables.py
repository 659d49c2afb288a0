"""A table that loses its own held-out points keeps the engine's default, is named, and fails a strict fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from mla_tune.cli import run
from mla_tune.fit.costs import CostModel
from mla_tune.fit.evaluation import LostTable, lost_table
from mla_tune.fit.scope import Scope, scope
from mla_tune.fit.table_rows import fit_table
from mla_tune.policy.decision import Decision
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Site, SiteName
from mla_tune.store.export import write_export
from tests.fit.synthetic import C4A, ENVIRONMENT, FLASH, World, fit_shapes, stage_us, sweep

SCOPE: Scope = scope(SiteName.PREFILL_ATTENTION, FLASH, str(C4A.layer), C4A.h_q)
SEEN = set(fit_shapes())


def misleading(site: Site, candidate: str, stage: str, shape: Shape) -> float:
    """At the points of the fit ``with_kvcache`` takes a third of the time, everywhere else three times as much."""
    if stage != "attention":
        return 1.0
    factor = (1 / 3 if shape in SEEN else 3.0) if candidate == "with_kvcache" else 1.0
    return stage_us(site, "sparse_fwd", "attention", shape) * factor


def test_a_table_that_loses_its_own_held_out_points_keeps_the_default_and_is_named() -> None:
    lost: list[LostTable] = []
    costs = CostModel(ENVIRONMENT, sweep(World(law=misleading), [C4A]))
    fitted = fit_table(costs, SCOPE, on_lost=lost.append)
    assert fitted is not None
    (found,) = lost
    assert (found.rule, found.incumbent) == ("always sparse_fwd", "sparse_fwd")
    assert found.factor > 1.5
    assert "next: sweep again" in str(found)
    assert "\n" not in str(found)
    for shape in [*SEEN, Shape(3, 100, 70000)]:
        assert Decision(fitted.table).choose(shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs) == "sparse_fwd"
    assert fitted.evidence.held_out is not None
    assert fitted.evidence.held_out.slowdown[0].mean == 1.0


def test_a_table_that_holds_is_not_named() -> None:
    lost: list[LostTable] = []
    fitted = fit_table(CostModel(ENVIRONMENT, sweep(World(), [C4A])), SCOPE, on_lost=lost.append)
    assert fitted is not None
    assert fitted.evidence.held_out is not None
    assert lost == []
    assert lost_table(fitted.table, fitted.evidence.held_out, fitted.evidence.noise_band) is None


@pytest.mark.parametrize(("strict", "code"), [((), 0), (("--strict",), 3)])
def test_a_strict_fit_ends_with_an_error(
    strict: tuple[str, ...], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export, policy = tmp_path / "made-up.jsonl", tmp_path / "policy.yaml"
    write_export(export, ENVIRONMENT, sweep(World(law=misleading), [C4A]))
    assert run(("fit", "--measurements", str(export), "--out", str(policy), *strict)) == code
    told = capsys.readouterr().err
    assert "it keeps sparse_fwd, the engine's default" in told
    assert ("--strict accepts no table" in told) == bool(strict)
    assert "Traceback" not in told
