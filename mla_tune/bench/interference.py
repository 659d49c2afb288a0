"""What disturbs a timing: other work on the GPU, a throttled GPU, a fallen clock. Asked after every round of samples.

On the CPU nobody watches: there is no counterpart of the driver's management library, and the interval has to show it.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from mla_tune.notice import say_once

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

    sm_clock_mhz: int | None
    """None, as the next one, where the driver does not tell."""
    reasons: int | None
    """Bit mask of NVML's clocks event (throttle) reasons."""
    busy_pids: tuple[int, ...] = ()
    """Other processes that use this GPU, or may do so."""
    certain: bool = True
    """False where the driver does not tell whether :attr:`busy_pids` work or idle."""


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
        """See :class:`Watch`. Clocks of undisturbed readings make up what is usual.

        Where the driver fails altogether there is nothing to see, which is said once: what it was asked for belongs to no
        kernel, so it must not end the timing of one.
        """
        try:
            reading = self._read()
        except Exception as error:  # whatever its library raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            say_once(f"the driver no longer answers, and nobody watches what disturbs the samples: {reason}")
            return None
        found = self._judge(reading)
        if found is None and reading.sm_clock_mhz is not None:
            self._clocks.append(reading.sm_clock_mhz)
        return found

    def _judge(self, reading: Reading) -> Disturbance | None:
        if reading.busy_pids:
            pids = ", ".join(map(str, reading.busy_pids))
            known = "another process used the GPU" if reading.certain else "another process may have used the GPU"
            return Disturbance(f"{known}: pid {pids}")
        reasons = reading.reasons or 0
        throttles = [name for bit, name in _THROTTLES.items() if reasons & bit]
        if throttles:
            return Disturbance(f"throttled: {', '.join(throttles)}", power_capped=reasons & ~POWER_CAP == 0)
        if reading.sm_clock_mhz is None or len(self._clocks) < _CLOCKS_NEEDED:
            return None
        usual = median(self._clocks)
        if reading.sm_clock_mhz < LEAST_CLOCK * usual:
            return Disturbance(f"SM clock under {LEAST_CLOCK:.0%} of its usual {usual:.0f} MHz")
        return None


def watch_gpu(index: int = 0) -> Watch:
    """A watch of the GPU that torch calls ``index``; call it once this process has its CUDA context.

    Where the driver's library does not answer (a container without it) nothing can be watched, which is said once.
    """
    import pynvml

    try:
        return ClockWatch(NvmlReader(pynvml, index).read)
    except pynvml.NVMLError as error:
        say_once(f"the driver does not answer ({error}), and nobody watches what disturbs the samples")
    return NoWatch()


class NvmlReader:
    """Readings of one GPU. Costs about 50 us a reading, and 1.4 ms while another process has a context there (H200).

    A reading that the driver refuses, or has no function for, is said once and costs that reading only. It is asked for
    again the next time.
    """

    def __init__(self, nvml: Any, index: int, clock: Callable[[], float] = time.monotonic) -> None:
        """``nvml`` is the module ``pynvml``. Raises its ``NVMLError`` where the driver does not answer at all."""
        self._nvml, self._clock = nvml, clock
        nvml.nvmlInit()
        self._gpu = _handle(nvml, index)
        listed = self._pids()
        self._listed = set(listed)
        self._own = {os.getpid()} if os.getpid() in listed else {os.getpid(), *listed}
        self._mixed = len(self._own) > 2
        """Others were there from the start, and the driver numbers processes in a way that hides which one is this."""
        self._since: dict[int, float] = dict.fromkeys(listed - self._own, clock() - _NEWCOMER_S)
        if not listed:
            say_once(
                "the driver lists no process on this GPU, not even this one: others are not seen (containers: --pid=host)"
            )

    def read(self) -> Reading:
        """The state of the moment."""
        nvml = self._nvml
        clock = self._ask("SM clock", "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM)
        reasons = self._ask("throttle reasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        busy, certain = self._busy_pids()
        return Reading(sm_clock_mhz=clock, reasons=reasons, busy_pids=busy, certain=certain)

    def _ask(self, what: str, function: str, *arguments: Any) -> Any:
        """What a function says of this GPU; None where it fails, or is in no version of the library that is here."""
        try:
            return getattr(self._nvml, function)(self._gpu, *arguments)
        except (self._nvml.NVMLError, AttributeError) as error:
            say_once(f"the driver does not tell this GPU's {what}, which nobody watches now ({error})")
        return None

    def _pids(self) -> set[int]:
        """Pids of the processes with a context on this GPU; empty where the driver does not tell."""
        processes = self._ask("processes", "nvmlDeviceGetComputeRunningProcesses")
        return {process.pid for process in processes or ()}

    def _busy_pids(self) -> tuple[tuple[int, ...], bool]:
        """Others that are new here or did work in the last seconds, and those that may have; whether that is certain.

        Where a container numbers processes its own way, nobody can tell which of those listed at the start is this one.
        Newcomers are others then, and so is somebody as soon as two of the first ones work.
        """
        listed, now = self._pids(), self._clock()
        self._listed |= listed
        others = listed - self._own
        self._since = {pid: self._since.get(pid, now) for pid in others}
        if not others and not self._mixed:
            return (), True
        used = self._utilization()
        if used is None or not (used.keys() <= self._listed or used.keys() & {os.getpid()}):
            # Not told, or told in the numbers of another pid namespace than the list's: whoever is there may work.
            if used:
                say_once(
                    "the driver tells processes and their use of the GPU in two numberings (pid namespaces), and whether "
                    "others work is unknown: their rounds do not count; run with --pid=host, or on a GPU of its own"
                )
            return tuple(sorted(others or (listed if self._mixed else ()))), False
        first = {pid for pid in self._own if used.get(pid, 0) > 0} if self._mixed else set()
        working = {pid for pid in others if now - self._since[pid] < _NEWCOMER_S or used.get(pid, 0) > 0}
        return tuple(sorted(working | (first if len(first) > 1 else set()))), True

    def _utilization(self) -> Mapping[int, int] | None:
        """Percent of the multiprocessors by process over the last seconds; None where the driver does not tell."""
        nvml = self._nvml
        since_us = int((time.time() - _NEWCOMER_S) * 1e6)
        try:
            samples = nvml.nvmlDeviceGetProcessUtilization(self._gpu, since_us)
        except nvml.NVMLError_NotFound:  # no process did anything
            return {}
        except (nvml.NVMLError, AttributeError):
            return None
        return {sample.pid: sample.smUtil for sample in samples}


def _handle(nvml: Any, index: int) -> Any:
    """The driver's handle of the GPU that torch calls ``index``, by UUID: the two may count in different orders."""
    import torch

    uuid = str(torch.cuda.get_device_properties(index).uuid)
    return nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
