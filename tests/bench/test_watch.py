"""What counts as a disturbance: rules over readings, replayed from an H200, and a real other process on a real GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.bench.interference import POWER_CAP, ClockWatch, NoWatch, NvmlReader, Reading

IDLE, FIXED_CLOCKS = 0x1, 0x2
THROTTLES = {
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
FULL = Reading(1980, 0)
# SM clock and reasons of an H200 (700 W) while it replayed V3.2's sparse_fwd with 128 heads and 8192 query tokens for a
# second, every tenth reading, and the readings of the half second of idling after that.
HEAVY = [(1965, 4), (1785, 4), (1530, 4), (1515, 4), (1500, 4), (1335, 4), (1560, 4), (1530, 4)]
RECOVERING = [(1350, 4), (1815, 4), (1965, 4), (1980, 0), (1980, 0)]


def found(readings: Iterable[Reading]) -> list[str | None]:
    """The reason of each reading's disturbance, in turn."""
    taken = list(readings)
    left = iter(taken)
    watch = ClockWatch(lambda: next(left))
    disturbances = [watch.disturbance() for _ in taken]
    return [disturbance.reason if disturbance else None for disturbance in disturbances]


@pytest.mark.parametrize("reasons", [0, IDLE, FIXED_CLOCKS, IDLE | FIXED_CLOCKS])
def test_an_idle_gpu_or_one_with_clocks_set_by_its_owner_is_not_disturbed(reasons: int) -> None:
    assert found([Reading(1980, reasons)] * 20) == [None] * 20


@pytest.mark.parametrize(("bit", "name"), THROTTLES.items())
def test_every_throttle_reason_is_named_and_is_not_the_power_cap(bit: int, name: str) -> None:
    watch = ClockWatch(lambda: Reading(1980, bit | IDLE))
    disturbance = watch.disturbance()
    assert disturbance is not None
    assert (disturbance.reason, disturbance.power_capped) == (f"throttled: {name}", False)


def test_the_power_cap_alone_says_so_and_together_with_heat_does_not() -> None:
    capped = ClockWatch(lambda: Reading(1500, POWER_CAP)).disturbance()
    assert capped is not None
    assert (capped.reason, capped.power_capped) == ("throttled: power cap", True)
    hot = ClockWatch(lambda: Reading(1500, POWER_CAP | 0x20)).disturbance()
    assert hot is not None
    assert (hot.reason, hot.power_capped) == ("throttled: power cap, thermal slowdown", False)


def test_the_recorded_power_cap_of_a_heavy_kernel_is_seen_until_the_gpu_has_recovered() -> None:
    recorded = [Reading(*reading) for reading in HEAVY + RECOVERING]
    expected = ["throttled: power cap" if reasons else None for _, reasons in HEAVY + RECOVERING]
    assert found([FULL] * 20 + recorded)[20:] == expected


@given(st.integers(1000, 2000), st.floats(0.5, 1.0))
def test_a_clock_under_nine_tenths_of_the_usual_one_is_a_disturbance(usual: int, part: float) -> None:
    now = round(usual * part)
    expected = None if now >= 0.9 * usual else f"SM clock under 90% of its usual {usual} MHz"
    assert found([Reading(usual, 0)] * 20 + [Reading(now, 0)])[-1] == expected


def test_disturbed_readings_do_not_make_a_slow_clock_usual() -> None:
    slow = [Reading(1000, 0)] * 500
    assert all(found([FULL] * 20 + slow)[20:])


def test_nothing_is_usual_before_there_are_a_few_readings() -> None:
    assert found([Reading(1980, 0), Reading(345, 0)]) == [None, None]


def test_processes_that_use_the_gpu_are_named() -> None:
    assert found([Reading(1980, 0, (482, 611))]) == ["another process used the GPU: pid 482, 611"]


def test_without_a_driver_nothing_is_reported() -> None:
    assert NoWatch().disturbance() is None


def test_a_driver_that_fails_in_the_middle_is_said_once_and_belongs_to_no_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mla_tune.notice._said", set())
    readings = [FULL] * 20 + [Reading(500, 0)]

    def read() -> Reading:
        if len(readings) in (3, 4):  # it comes back
            readings.pop(0)
            raise RuntimeError("Unknown Error")
        return readings.pop(0)

    watch = ClockWatch(read)
    assert [watch.disturbance() for _ in range(20)] == [None] * 20
    assert watch.disturbance() is not None
    (line,) = caplog.messages
    assert "nobody watches what disturbs the samples: RuntimeError: Unknown Error" in line


@given(st.lists(st.sampled_from([FULL, Reading(None, 0), Reading(1980, None), Reading(None, None)]), max_size=40))
def test_a_reading_without_a_part_is_judged_by_the_others(readings: list[Reading]) -> None:
    assert found(readings) == [None] * len(readings)
    assert found([*readings, Reading(None, 0x20)])[-1] == "throttled: thermal slowdown"
    assert found([FULL] * 20 + [*readings, Reading(900, None)])[-1] is not None
    assert found([*readings, Reading(None, None, (5,))])[-1] == "another process used the GPU: pid 5"


class Driver:
    """The calls of ``pynvml`` that a reader makes, over processes and utilization as told."""

    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    class NVMLError_NotFound(NVMLError):  # noqa: N801, N818  -- the driver's name
        pass

    def __init__(self, pids: list[int]) -> None:
        self.pids = pids
        self.used: dict[int, int] | None = {}
        self.used_s_ago = 0.0
        self.broken: set[str] = set()

    def answer(self, function: str, value: Any) -> Any:
        if function in self.broken:
            raise self.NVMLError("Not Supported")
        return value

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetClockInfo(self, gpu: object, kind: int) -> int:  # noqa: N802
        return int(self.answer("clock", 1980))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: object) -> int:  # noqa: N802
        return int(self.answer("reasons", 0))

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: object) -> list[SimpleNamespace]:  # noqa: N802
        return list(self.answer("processes", [SimpleNamespace(pid=pid) for pid in self.pids]))

    def nvmlDeviceGetProcessUtilization(self, gpu: object, since_us: int) -> list[SimpleNamespace]:  # noqa: N802
        if self.used is None:
            raise self.NVMLError("not supported")
        at_us = (time.time() - self.used_s_ago) * 1e6
        if not self.used or at_us <= since_us:  # as the driver does: it gives what is younger
            raise self.NVMLError_NotFound("no samples")
        return [SimpleNamespace(pid=pid, smUtil=percent) for pid, percent in self.used.items()]


@pytest.fixture
def seconds() -> list[float]:
    """The time of the reader's clock, to be moved on."""
    return [0.0]


def reader(driver: Driver, seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> NvmlReader:
    monkeypatch.setattr("mla_tune.bench.interference._handle", lambda nvml, index: object())
    return NvmlReader(driver, 0, clock=lambda: seconds[0])


def test_this_process_alone_on_its_gpu_disturbs_nobody(seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver([os.getpid()])
    driver.used = {os.getpid(): 99}
    assert reader(driver, seconds, monkeypatch).read() == Reading(1980, 0)


def test_another_process_is_busy_when_it_is_new_and_then_while_it_does_work(
    seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver([os.getpid(), 11])
    read = reader(driver, seconds, monkeypatch).read
    assert read().busy_pids == ()  # there before us and idle: a desktop, say
    driver.pids.append(22)
    assert read().busy_pids == (22,)
    seconds[0] = 10.0
    assert read().busy_pids == ()
    driver.used = {11: 0, 22: 7, os.getpid(): 90}
    assert read().busy_pids == (22,)
    driver.used = None
    assert read().busy_pids == (11, 22)
    driver.pids = [os.getpid()]
    assert read().busy_pids == ()


def test_work_of_long_ago_is_none(seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver([os.getpid(), 11])
    driver.used = {os.getpid(): 90, 11: 80}
    read = reader(driver, seconds, monkeypatch).read
    assert read().busy_pids == (11,)
    driver.used_s_ago = 10.0
    assert read().busy_pids == ()


def test_where_the_driver_numbers_processes_otherwise_newcomers_are_others_and_so_is_the_second_that_works(
    seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver([900_001, 900_002])
    driver.used = {900_001: 50}
    read = reader(driver, seconds, monkeypatch).read
    assert read().busy_pids == ()  # one of the two works: this process
    driver.used = {900_001: 50, 900_002: 50}
    assert read().busy_pids == (900_001, 900_002)
    driver.used = {900_001: 50, 900_002: 0}
    driver.pids.append(900_003)
    assert read() == Reading(1980, 0, (900_003,))


def test_alone_under_another_number_this_process_disturbs_nobody(
    seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver([900_001])
    driver.used = {900_001: 99}
    assert reader(driver, seconds, monkeypatch).read() == Reading(1980, 0)


@pytest.mark.parametrize("own", [os.getpid(), 57], ids=["its own number", "another number"])
def test_use_told_in_another_pid_namespace_than_the_processes_is_unknown_and_not_idle(
    own: int, seconds: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mla_tune.notice._said", set())
    driver = Driver([own, 11])
    driver.used = {31_337: 60, 31_399: 30}
    read = reader(driver, seconds, monkeypatch).read
    found = read()
    assert (11 in found.busy_pids, found.certain) == (True, False)
    disturbance = ClockWatch(read).disturbance()
    assert disturbance is not None
    assert disturbance.reason.startswith("another process may have used the GPU: pid ")
    (line,) = caplog.messages
    assert "whether others work is unknown" in line


def test_a_list_without_even_this_process_is_said(
    seconds: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mla_tune.notice._said", set())
    assert reader(Driver([]), seconds, monkeypatch).read() == Reading(1980, 0)
    assert ["others are not seen" in line for line in caplog.messages] == [True]


@pytest.mark.parametrize(
    ("broken", "left"),
    [
        ({"clock"}, Reading(None, 0)),
        ({"reasons"}, Reading(1980, None)),
        ({"processes"}, Reading(1980, 0)),
        ({"clock", "reasons", "processes"}, Reading(None, None)),
    ],
    ids=["clock", "reasons", "processes", "all"],
)
@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_reading_that_the_driver_refuses_costs_that_reading_and_is_said_once(
    broken: set[str],
    left: Reading,
    from_the_start: bool,
    seconds: list[float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("mla_tune.notice._said", set())
    driver = Driver([os.getpid()])
    driver.broken = broken if from_the_start else set()
    read = reader(driver, seconds, monkeypatch).read
    driver.broken = broken
    assert [read() for _ in range(3)] == [left] * 3
    refused = [line for line in caplog.messages if "(Not Supported)" in line]
    assert len(refused) == len(broken)
    driver.broken = set()
    assert read() == Reading(1980, 0)


def test_a_function_that_the_library_lacks_costs_its_reading(
    seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver([os.getpid(), 11])
    for name in ("CurrentClocksThrottleReasons", "ProcessUtilization"):
        monkeypatch.delattr(Driver, f"nvmlDeviceGet{name}")
    assert reader(driver, seconds, monkeypatch).read() == Reading(1980, None, (11,), certain=False)


BUSY_LOOP = """
import torch
a = torch.randn(4096, 4096, device="cuda")
print("started", flush=True)
while True:
    a @ a
    torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_a_real_process_that_computes_on_this_gpu_is_seen_and_its_end_too() -> None:
    import torch

    from mla_tune.bench.interference import watch_gpu

    torch.zeros(1, device="cuda")
    watch = watch_gpu()
    assert watch.disturbance() is None
    with subprocess.Popen([sys.executable, "-c", BUSY_LOOP], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        disturbance = watch.disturbance()
        other.kill()
    assert disturbance is not None
    assert f"pid {other.pid}" in disturbance.reason
    deadline = time.monotonic() + 30
    while watch.disturbance() is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert watch.disturbance() is None
