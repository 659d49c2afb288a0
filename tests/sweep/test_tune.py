"""Tuning with a real worker, whose kernels run in Triton's interpreter where there is no GPU."""

from pathlib import Path

import pytest
import torch

from mla_tune.bench.sampling import Effort
from mla_tune.bench.timing import WallTimer
from mla_tune.kernels import cases
from mla_tune.kernels.binding import Device
from mla_tune.kernels.inputs import InputBuilder
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, KERNELS, MetadataConfig, SizeClass, parameters
from mla_tune.store.database import Database
from mla_tune.store.measurement import Outcome
from mla_tune.sweep.tuning.study import open_search, study_storage
from mla_tune.sweep.tuning.trial import KernelTrials
from mla_tune.sweep.tuning.tuner import ClassReport, Tuner, targets
from mla_tune.sweep.worker.messages import Trial
from tests.conftest import HAS_CUDA
from tests.store.strategies import ENVIRONMENT, timing

INTERPRETED = "tests.sweep.interpreted_kernels"
# As in that module, which only a worker imports: it changes the kernel that it is imported beside.
DEADLY, WRONG = MetadataConfig(64, 16, 4), MetadataConfig(128, 32, 4)
SIZES = {
    "dequantize_v4": 40,
    "dequantize_dsa": 40,
    "slot_ids": 700,
    "combine_topk": 3,
    "combine_all": 2,
    "metadata": 400,
    "prepare": 30,
    "select": 2,
}
interpreter_only = pytest.mark.skipif(HAS_CUDA, reason="the GPU compiles these kernels, so the interpreter is off")


def size_of(found: SizeClass) -> int:
    return 300


def set_up(path: Path) -> Path:
    with Database.open(path) as database:
        database.record(ENVIRONMENT, [timing()])
    return path


def metadata_target() -> list[tuple[object, SizeClass]]:
    return list(targets(["metadata"]))[:1]  # type: ignore[return-value]


def run(tuner: Tuner, path: Path, budget_s: float) -> list[ClassReport]:
    return tuner.run(path, metadata_target(), budget_s, 0, lambda _: None, lambda _: None)  # type: ignore[arg-type]


@interpreter_only
@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_every_kernel_has_a_case_whose_default_is_right_and_is_timed(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "_K", 16)  # sizes for an interpreter
    monkeypatch.setattr(cases, "_PREPARED_TOKENS", 1)
    trials = KernelTrials(Device("cpu", 0, 3), InputBuilder(torch.device("cpu")), WallTimer(), Effort(seconds=0.01))
    default = DEFAULT_LAUNCHES.config(kernel, 0)
    tried = trials.run(Trial(kernel, SIZES[kernel], default, default, 6))
    assert (tried.outcome, tried.detail) == (Outcome.OK, "")
    assert len(tried.samples_us) == len(tried.default_us) == 6


@interpreter_only
def test_a_budget_of_seconds_tunes_stores_and_goes_on_the_next_time(tmp_path: Path) -> None:
    path = set_up(tmp_path / "a.db")
    with Tuner("cpu", added=INTERPRETED, size_of=size_of) as tuner:
        (first,) = run(tuner, path, 6.0)
        (second,) = run(tuner, path, 6.0)
        environment = tuner.environment.id
    assert first.tuned is not None
    assert second.tuned is not None
    assert second.tuned.trials > first.tuned.trials >= 1
    assert second.left < first.left
    assert first.tuned.launch.kernel == "metadata"
    with study_storage(path) as storage:
        search = open_search(storage, environment, "metadata", 0, 0)
        assert len(search.tried) == second.tuned.trials


@interpreter_only
def test_a_configuration_that_kills_or_misleads_costs_its_own_trial_only(tmp_path: Path) -> None:
    path = set_up(tmp_path / "a.db")
    with Tuner("cpu", added=INTERPRETED, size_of=size_of) as tuner:
        found = metadata_target()[0][1]
        with study_storage(path) as storage:
            search = open_search(storage, tuner.environment.id, "metadata", 0, 0)
            for config in (DEADLY, WRONG, MetadataConfig(64, 16, 8)):
                search.study.enqueue_trial(parameters(config), skip_if_exists=True)
            pid = tuner.worker_pid
            reasons = {}
            for _ in range(4):
                asked = search.ask()
                assert asked is not None
                reasons[asked.launch.config] = tuner._try(search, asked, found)
            assert reasons[DEADLY] == "crash: worker ended with exit code 7"
            assert (reasons[WRONG] or "").startswith("wrong_result: row 1 differs")
            assert reasons[MetadataConfig(64, 16, 8)] is None
            assert tuner.worker_pid != pid


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "found"), targets(), ids=lambda value: getattr(value, "name", None))
def test_every_default_is_right_and_timed_at_the_size_that_it_is_tuned_at(kernel: object, found: SizeClass) -> None:
    from mla_tune.sweep.worker.point_measurer import PointMeasurer

    measurer = PointMeasurer("cuda")
    name = kernel.name  # type: ignore[attr-defined]
    tried = KernelTrials(measurer.device, *measurer.gpu_time).run(
        Trial(name, found.tuned_at, found.default, found.default, 6)
    )
    assert (tried.outcome, tried.detail) == (Outcome.OK, "")
