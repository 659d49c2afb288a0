"""A sweep's parent and worker must see one GPU, workers that replace each other too; what a worker warns of is said."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from mla_tune.errors import EnvironmentMismatchError
from mla_tune.hardware.nvml import GpuIdentity
from mla_tune.hardware.sku import Environment, KernelLibrary
from mla_tune.store.measurement import Regime
from mla_tune.sweep.worker.messages import Hello
from mla_tune.sweep.worker.process import WorkerProcess
from mla_tune.sweep.worker.same_gpu import require_same_gpu, require_unchanged

ENVIRONMENT = Environment("nvidia-h200", 132, 232448, "580.1", "13.0", "2.11.0", "3.6.0", (), "NVIDIA H200", 140, 700)
HERE = Hello(ENVIRONMENT, (Regime.GRAPH,), "GPU-aaaa")
SEEN = GpuIdentity("NVIDIA H200", "nvidia-h200", 132, "580.1", "GPU-aaaa", 140, 700)


@pytest.mark.parametrize("seen", [SEEN, replace(SEEN, uuid=""), replace(SEEN, sm_count=0)])
@pytest.mark.parametrize("hello", [HERE, replace(HERE, gpu_uuid="")])
def test_a_worker_on_the_gpu_that_its_parent_sees_is_taken_as_far_as_both_can_tell(
    seen: GpuIdentity, hello: Hello
) -> None:
    require_same_gpu(seen, hello)


@pytest.mark.parametrize(
    "seen",
    [
        None,
        replace(SEEN, uuid="GPU-bbbb"),
        replace(SEEN, sku="nvidia-h200-nvl", product="NVIDIA H200 NVL"),
        replace(SEEN, uuid="", sku="nvidia-h20", product="NVIDIA H20"),
        replace(SEEN, uuid="", sm_count=16),
    ],
)
def test_a_worker_on_another_gpu_is_refused_in_one_line_before_anything_is_measured(seen: GpuIdentity | None) -> None:
    with pytest.raises(EnvironmentMismatchError, match="its worker runs on NVIDIA H200") as caught:
        require_same_gpu(seen, HERE)
    assert "\n" not in str(caught.value)
    assert (seen.product if seen else "no GPU") in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"product": "NVIDIA H200 NVL"},
        {"sm_count": 78},
        {"power_limit_w": 500},
        {"libraries": (KernelLibrary("sgl-flash-mla", "1.0.0", "ab"),)},
    ],
    ids=str,
)
def test_a_worker_that_replaces_another_on_a_changed_machine_ends_the_sweep(change: dict[str, object]) -> None:
    now = replace(ENVIRONMENT, **change)  # type: ignore[arg-type]
    with pytest.raises(EnvironmentMismatchError, match=f"{next(iter(change))} was .* and is ") as caught:
        require_unchanged(ENVIRONMENT, now)
    assert "\n" not in str(caught.value)


def test_a_reading_that_one_worker_could_not_take_is_not_compared() -> None:
    unread = replace(ENVIRONMENT, driver="unknown", power_limit_w=0, memory_gib=0)
    require_unchanged(ENVIRONMENT, unread)
    require_unchanged(unread, ENVIRONMENT)


@pytest.fixture
def warning_module(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of added candidates that warns when a worker imports it."""
    folder = tmp_path_factory.mktemp("added")
    (folder / "warns_of_it.py").write_text(
        "from mla_tune.notice import say_once\nsay_once('a reading is missing')\nsay_once('a reading is missing')\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("mla_tune.notice._said", set())
    return "warns_of_it"


def test_what_workers_warn_of_is_said_once_by_the_process_that_started_them(
    warning_module: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mla_tune"):
        for _ in range(2):
            WorkerProcess("cpu", warning_module).stop()
    assert caplog.messages == ["a reading is missing"]
