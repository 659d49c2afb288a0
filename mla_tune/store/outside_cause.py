"""Failures that did not come from the candidate: a signal from outside, the driver, the disk, a compiler, memory.

Such a failure says nothing about what a kernel can do. A sweep retries it, reports it and stores it as ``disturbed``, so
that the next sweep measures again. What was stored before this was known is judged again where it is imported and fitted.
"""

from __future__ import annotations

import re
from dataclasses import replace

from mla_tune.store.measurement import CAPABILITY, Measurement, Outcome

_FROM_OUTSIDE = {
    1: "SIGHUP",
    2: "SIGINT",
    3: "SIGQUIT",
    9: "SIGKILL, which the kernel's OOM killer sends too",
    15: "SIGTERM",
    24: "SIGXCPU",
    30: "SIGPWR",
}
"""Signals that a kernel library does not raise by itself. A segmentation fault or an abort is the candidate's own."""
_UNKNOWN_EXIT = 255
"""What multiprocessing reports where the process that started the worker is gone, so that nobody saw the worker end."""
_EXIT = re.compile(r"worker ended with exit code (-?\d+|None)")
_TEXTS = tuple(
    (cause, re.compile(pattern, re.IGNORECASE))
    for cause, pattern in (
        ("the driver's management library failed", r"\bnvml"),
        (
            "the file system failed",
            r"no space left on device|disk quota exceeded|read-only file system|too many open files|input/output error|"
            r"stale (nfs )?file handle|device or resource busy|\bENOSPC\b|\bEDQUOT\b|\bEROFS\b|permission denied|"
            r"\b(OSError|PermissionError|FileNotFoundError|FileExistsError|BlockingIOError|BrokenPipeError): ",
        ),
        (
            "a compiler or its cache is broken",
            r"failed to find c compiler|\bCalledProcessError\b|no such file or directory|file too short|invalid elf header|"
            r"file not recognized|cannot find -l|\b(JSONDecodeError|UnpicklingError|EOFError)\b|"
            r"(nvcc|ptxas|gcc|cc1plus|cudafe\+\+)\S* (not found|was killed|died)|nvcc[^:]*: (command )?not found",
        ),
        (
            "the driver or the device failed",
            r"no cuda-capable device|cuda-capable device\(s\) is/are busy|driver shutting down|"
            r"driver version is insufficient|system (has unsupported display driver|driver mismatch)|"
            r"system (is )?not (yet )?(ready|initialized)|uncorrectable (ecc|nvlink) error|\becc error|gpu is lost|"
            r"fallen off the bus|cuda error: (initialization error|unknown error)|\bmps (client|server)\b|"
            r"cuda_error_(not_initialized|deinitialized|no_device|device_unavailable|ecc_uncorrectable|"
            r"nvlink_uncorrectable|system_not_ready|system_driver_mismatch|compat_not_supported|mps_|contained|unknown)|"
            r"cudaerror(initializationerror|nodevice|devicesunavailable|eccuncorrectable|nvlinkuncorrectable|"
            r"systemnotready|systemdrivermismatch|insufficientdriver|mps|contained|unknown)",
        ),
        (
            "memory ran out",
            r"\bMemoryError\b|can(no|')t allocate memory|out of memory|std::bad_alloc|cuda_error_out_of_memory|"
            r"cudaerrormemoryallocation|alloc_failed",
        ),
    )
)


def outside_cause(detail: str) -> str | None:
    """What else than the candidate a failure's ``detail`` names, in a few words; None where it may be the candidate's own.

    ``detail`` is a row's or a try's: how the worker ended, or the type and first line of an exception.
    """
    ended = _EXIT.search(detail)
    if ended and ended[1] in ("None", str(_UNKNOWN_EXIT)):
        return "the process that starts workers ended"
    if ended and (signal := _signal(int(ended[1]))) in _FROM_OUTSIDE:
        return f"a signal from outside ({_FROM_OUTSIDE[signal]})"
    return next((cause for cause, pattern in _TEXTS if pattern.search(detail)), None)


def _signal(exit_code: int) -> int:
    """The signal that an exit code stands for, as multiprocessing (-9) or a shell (137) has it; 0 for none."""
    return -exit_code if exit_code < 0 else exit_code - 128 if 128 < exit_code < 160 else 0


def is_own_failure(outcome: Outcome, detail: str) -> bool:
    """Whether a failure may bound what the candidate can do."""
    return outcome in CAPABILITY and outside_cause(detail) is None


def judged_again(measurement: Measurement) -> Measurement:
    """``measurement``, as ``disturbed`` where it was stored as a failure of the candidate and was not."""
    if measurement.outcome in CAPABILITY and outside_cause(measurement.detail):
        return replace(measurement, outcome=Outcome.DISTURBED)
    return measurement
