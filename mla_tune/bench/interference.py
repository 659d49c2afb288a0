"""What disturbs a timing: other work on the GPU, a throttled GPU, a fallen clock. Asked after every round of samples.

On the CPU nobody watches: there is no counterpart of the driver's management library, and the interval has to show it.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

LEAST_CLOCK = 0.9
"""Part of its usual clock below which the GPU counts as slowed."""
POWER_CAP = 0x4
"""NVML's SW power cap: the GPU lowers its clocks to stay inside its power limit (nvml.h, clocks event reasons)."""
_THROTTLES = {
    POWER_CAP: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Reasons of NVML that mean a throttled GPU; the rest say that it is idle or was given fixed clocks."""
_CLOCKS_KEPT = 101
_CLOCKS_NEEDED = 10
"""Readings before their median counts as usual."""
_NEWCOMER_S = 2.0
"""How long a process that just appeared counts as busy: the driver's utilization lags by up to a second."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of the GPU at one moment, as its driver tells it."""

    sm_clock_mhz: int
    reasons: int
    """Bit mask of NVML's clocks event (throttle) reasons."""
    busy_pids: tuple[int, ...] = ()
    """Other processes that use this GPU."""


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Why the samples of a round are not to be trusted."""

    reason: str
    """One line. Readings of one kind have one reason, so that their samples can be kept together."""
    power_capped: bool = False
    """The power cap alone: what a sustained heavy kernel meets however often it is timed."""


class Watch(Protocol):
    """Looks for disturbances since it was last asked."""

    def disturbance(self) -> Disturbance | None:
        """What disturbed the samples since the last call; None if nothing did."""
        ...


class NoWatch:
    """Nothing can be seen, so nothing is reported."""

    def disturbance(self) -> Disturbance | None:
        """Always None."""
        return None


class ClockWatch:
    """Judges readings of a GPU: the rules, apart from where the readings come from."""

    def __init__(self, read: Callable[[], Reading]) -> None:
        self._read = read
        self._clocks: deque[int] = deque(maxlen=_CLOCKS_KEPT)

    def disturbance(self) -> Disturbance | None:
        """See :class:`Watch`. Clocks of undisturbed readings make up what is usual."""
        reading = self._read()
        found = self._judge(reading)
        if found is None:
            self._clocks.append(reading.sm_clock_mhz)
        return found

    def _judge(self, reading: Reading) -> Disturbance | None:
        if reading.busy_pids:
            return Disturbance(f"another process used the GPU: pid {', '.join(map(str, reading.busy_pids))}")
        throttles = [name for bit, name in _THROTTLES.items() if reading.reasons & bit]
        if throttles:
            return Disturbance(f"throttled: {', '.join(throttles)}", power_capped=reading.reasons & ~POWER_CAP == 0)
        if len(self._clocks) < _CLOCKS_NEEDED:
            return None
        usual = median(self._clocks)
        if reading.sm_clock_mhz < LEAST_CLOCK * usual:
            return Disturbance(f"SM clock under {LEAST_CLOCK:.0%} of its usual {usual:.0f} MHz")
        return None


def watch_gpu(index: int = 0) -> Watch:
    """A watch of the GPU that torch calls ``index``; call it once this process has its CUDA context.

    Where the driver does not answer (a container without its management library) nothing can be watched.
    """
    import pynvml

    with suppress(pynvml.NVMLError):
        return ClockWatch(NvmlReader(pynvml, index).read)
    return NoWatch()


class NvmlReader:
    """Readings of one GPU. Costs about 50 us a reading, and 1.4 ms while another process has a context there (H200)."""

    def __init__(self, nvml: Any, index: int, clock: Callable[[], float] = time.monotonic) -> None:
        """``nvml`` is the module ``pynvml``. Raises its ``NVMLError`` where the driver does not answer."""
        self._nvml, self._clock = nvml, clock
        nvml.nvmlInit()
        self._gpu = _handle(nvml, index)
        self._own = self._own_pids()
        self._since: dict[int, float] = dict.fromkeys(self._pids() - self._own, clock() - _NEWCOMER_S)
        self.read()  # raises here, not in the middle of a measurement, where the driver does not support it

    def read(self) -> Reading:
        """The state of the moment."""
        nvml = self._nvml
        return Reading(
            sm_clock_mhz=nvml.nvmlDeviceGetClockInfo(self._gpu, nvml.NVML_CLOCK_SM),
            reasons=nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._gpu),
            busy_pids=self._busy_pids(),
        )

    def _own_pids(self) -> set[int]:
        """Pids under which the driver lists this process.

        Where a container numbers processes its own way nobody can tell which of those listed now it is: all of them
        count as its own then, and only newcomers as others.
        """
        listed = self._pids()
        return {os.getpid()} if os.getpid() in listed else {os.getpid(), *listed}

    def _pids(self) -> set[int]:
        return {process.pid for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._gpu)}

    def _busy_pids(self) -> tuple[int, ...]:
        """Others that have a context here and are new, or did work in the last seconds, or of whom nothing is known."""
        others = self._pids() - self._own
        now = self._clock()
        self._since = {pid: self._since.get(pid, now) for pid in others}
        if not others:
            return ()
        used = self._utilization()
        return tuple(
            sorted(
                pid for pid in others if now - self._since[pid] < _NEWCOMER_S or used is None or used.get(pid, 0) > 0
            )
        )

    def _utilization(self) -> Mapping[int, int] | None:
        """Percent of the multiprocessors by process over the last seconds; None where the driver does not tell."""
        nvml = self._nvml
        since_us = int((time.time() - _NEWCOMER_S) * 1e6)
        try:
            samples = nvml.nvmlDeviceGetProcessUtilization(self._gpu, since_us)
        except nvml.NVMLError_NotFound:  # no process did anything
            return {}
        except nvml.NVMLError:
            return None
        return {sample.pid: sample.smUtil for sample in samples}


def _handle(nvml: Any, index: int) -> Any:
    """The driver's handle of the GPU that torch calls ``index``, by UUID: the two may count in different orders."""
    import torch

    uuid = str(torch.cuda.get_device_properties(index).uuid)
    return nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
