"""One point on the CPU: every part is timed, and a candidate that fails costs its own row only, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mla_tune.bench.sampling import MIN_SAMPLES
from mla_tune.kernels import binding
from mla_tune.kernels.inputs import AttentionInputs, InputBuilder
from mla_tune.kernels.prepared import PreparedPath
from mla_tune.sites.candidates import names_at, stages
from mla_tune.sites.shape import RaggedShape, Shape
from mla_tune.sites.site import SiteName
from mla_tune.sites.stages import Amortization
from mla_tune.store.measurement import PER_FORWARD_TOTAL, PER_LAYER_TOTAL, Measurement, Outcome, Regime, Role, fault
from mla_tune.sweep.grid import Point
from mla_tune.sweep.worker.messages import TIMING, Task
from mla_tune.sweep.worker.point_measurer import PointMeasurer, _available_bytes, parts
from tests.shapes import every_site

SHAPE = Shape(2, 3, 300)
POINT = Point(next(site for site in every_site() if site.topk == 512), SHAPE, Role.HELD_OUT)
HEALTHY = "with_kvcache"


@pytest.fixture(scope="module")
def measurer() -> PointMeasurer:
    return PointMeasurer("cpu")


def rows_of(measurer: PointMeasurer, task: Task) -> tuple[list[Measurement], list[str]]:
    """Rows of a task, and the candidates that were announced on the way."""
    entered: list[str] = []
    rows = list(measurer.measure(task, entered.append))
    assert [fault(row) for row in rows if task.timed] == [None] * (len(rows) if task.timed else 0)
    return rows, entered


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[PreparedPath], PreparedPath]) -> None:
    """Let ``sparse_fwd`` be prepared as it is, and then changed."""
    prepare = binding.prepare_attention

    def prepare_spoiled(inputs: AttentionInputs, name: str, device: binding.Device) -> PreparedPath:
        prepared = prepare(inputs, name, device)
        return change(prepared) if name == "sparse_fwd" else prepared

    monkeypatch.setattr(binding, "prepare_attention", prepare_spoiled)


def with_last_stage(prepared: PreparedPath, after: Callable[[torch.Tensor], object]) -> PreparedPath:
    """The candidate with something done to its output behind its last stage."""
    *others, last = prepared.stages

    def run() -> None:
        last.run()
        after(prepared.result())

    return replace(prepared, stages=(*others, replace(last, run=run)))


@pytest.mark.parametrize("site", [site for site in every_site() if site.h_q != 128], ids=lambda site: site.key)
def test_every_stage_and_both_totals_of_every_candidate_are_timed(site: object, measurer: PointMeasurer) -> None:
    point = replace(POINT, site=site)  # type: ignore[arg-type]
    rows, entered = rows_of(measurer, Task(point, names_at(point.site)))
    assert entered == [*names_at(point.site), TIMING]
    for name in names_at(point.site):
        mine = [row for row in rows if row.candidate == name]
        expected = {stage.name for stage in stages(point.site, name)}
        kinds = {stage.amortization is Amortization.PER_LAYER for stage in stages(point.site, name)}
        expected |= {PER_LAYER_TOTAL if per_layer else PER_FORWARD_TOTAL for per_layer in kinds}
        assert sorted(row.part for row in mine) == sorted(expected)
        assert len({(row.first_call_s, row.workspace_bytes) for row in mine}) == 1
    for row in rows:
        assert (row.site, row.shape, row.role, row.regime) == (point.site, SHAPE, Role.HELD_OUT, Regime.EAGER)
        assert row.outcome is Outcome.OK
        assert row.num_samples == len(row.samples_us) >= MIN_SAMPLES


def test_a_total_of_one_stage_is_that_stages_timing() -> None:
    inputs = InputBuilder(torch.device("cpu")).attention(POINT.site, SHAPE)
    prepared = binding.prepare_attention(inputs, "with_kvcache", binding.Device.current("cpu"))
    assert set(parts(prepared)) == {"schedule", "attention"}
    prepared = binding.prepare_attention(inputs, "sparse_fwd", binding.Device.current("cpu"))
    assert {PER_LAYER_TOTAL, PER_FORWARD_TOTAL} <= set(parts(prepared))


def raises(error: Exception) -> Callable[[PreparedPath], PreparedPath]:
    def run(output: torch.Tensor) -> None:
        raise error

    return lambda prepared: with_last_stage(prepared, run)


class CompilationError(Exception):
    """As Triton's is called."""


@pytest.mark.parametrize(
    ("change", "outcome", "detail"),
    [
        (lambda p: with_last_stage(p, lambda out: out[1].mul_(2)), Outcome.WRONG_RESULT, "relative error"),
        (lambda p: with_last_stage(p, lambda out: out[2, 5].fill_(torch.nan)), Outcome.WRONG_RESULT, "unwritten"),
        (raises(RuntimeError("first line\nsecond line")), Outcome.RUNTIME_ERROR, "RuntimeError: first line"),
        (raises(AssertionError()), Outcome.RUNTIME_ERROR, "AssertionError"),
        (raises(CompilationError("no such type")), Outcome.COMPILE_ERROR, "CompilationError: no such type"),
        (raises(torch.OutOfMemoryError("9 GiB")), Outcome.NO_MEMORY, "OutOfMemoryError: 9 GiB"),
    ],
    ids=["wrong row", "unwritten head", "error", "error without words", "compiler", "memory"],
)
def test_a_failing_candidate_has_one_row_with_its_reason_and_the_other_is_timed(
    measurer: PointMeasurer,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[PreparedPath], PreparedPath],
    outcome: Outcome,
    detail: str,
) -> None:
    spoil(monkeypatch, change)
    rows, _ = rows_of(measurer, Task(POINT, names_at(POINT.site)))
    (failed,) = (row for row in rows if row.candidate == "sparse_fwd")
    assert (failed.outcome, failed.part) == (outcome, PER_LAYER_TOTAL)
    assert detail in failed.detail
    assert "\n" not in failed.detail
    assert {row.outcome for row in rows if row.candidate == HEALTHY} == {Outcome.OK}


def test_a_candidate_that_fails_only_when_timed_takes_no_other_down(
    measurer: PointMeasurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_from_the_second_run(prepared: PreparedPath) -> PreparedPath:
        runs: list[int] = []

        def after(output: torch.Tensor) -> None:
            runs.append(1)
            if len(runs) > 1:
                raise RuntimeError("tired")

        return with_last_stage(prepared, after)

    spoil(monkeypatch, fails_from_the_second_run)
    rows, _ = rows_of(measurer, Task(POINT, names_at(POINT.site)))
    assert [(r.outcome, r.detail) for r in rows if r.candidate == "sparse_fwd"] == [
        (Outcome.RUNTIME_ERROR, "RuntimeError: tired")
    ]
    assert {row.outcome for row in rows if row.candidate == HEALTHY} == {Outcome.OK}


def test_an_unsupported_candidate_is_not_run(measurer: PointMeasurer, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(site: object, name: str, device: object) -> str | None:
        return "no kernel for this" if name == "sparse_fwd" else None

    monkeypatch.setattr(binding, "unsupported", unsupported)
    rows, _ = rows_of(measurer, Task(POINT, names_at(POINT.site)))
    (row,) = (row for row in rows if row.candidate == "sparse_fwd")
    assert (row.outcome, row.detail) == (Outcome.UNSUPPORTED, "no kernel for this")


def test_a_point_that_cannot_fit_is_refused_before_anything_is_allocated(measurer: PointMeasurer) -> None:
    huge = replace(POINT, shape=Shape(1 << 16, 1 << 20, 1 << 46))
    rows, entered = rows_of(measurer, Task(huge, names_at(huge.site)))
    assert entered == []
    assert [(row.candidate, row.outcome) for row in rows] == [(c, Outcome.NO_MEMORY) for c in names_at(huge.site)]
    assert all("GiB, the device has" in row.detail for row in rows)


def test_a_check_compares_and_times_nothing(measurer: PointMeasurer, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, raises(RuntimeError("broken")))
    rows, entered = rows_of(measurer, Task(POINT, names_at(POINT.site), timed=False))
    assert {row.candidate: row.outcome for row in rows} == {
        name: Outcome.RUNTIME_ERROR if name == "sparse_fwd" else Outcome.OK for name in names_at(POINT.site)
    }
    assert all(row.latency_us is None for row in rows)
    assert TIMING not in entered


def test_unequal_requests_are_what_runs_and_their_three_integers_what_is_recorded(
    measurer: PointMeasurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ragged, built = RaggedShape(((1, 260), (2, 40))), []
    prepare = binding.prepare_attention

    def spy(inputs: AttentionInputs, name: str, device: binding.Device) -> PreparedPath:
        built.append(inputs.seq_lens.tolist())
        return prepare(inputs, name, device)

    monkeypatch.setattr(binding, "prepare_attention", spy)
    rows, _ = rows_of(measurer, Task(replace(POINT, ragged=ragged), names_at(POINT.site)))
    assert built == [[260, 40]] * len(names_at(POINT.site))
    assert {(row.shape, row.outcome) for row in rows} == {(Shape(2, 3, 300), Outcome.OK)}


def test_only_the_candidates_of_the_task_are_measured(measurer: PointMeasurer) -> None:
    rows, entered = rows_of(measurer, Task(POINT, (HEALTHY,)))
    assert {row.candidate for row in rows} == {HEALTHY}
    assert entered == [HEALTHY, TIMING]
    assert POINT.site.name is SiteName.PREFILL_ATTENTION


def test_memory_that_the_page_cache_holds_counts_as_available(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 8000 kB\n")
    assert _available_bytes(meminfo) == 8000 * 1024
    assert _available_bytes(tmp_path / "missing") > 2**30
