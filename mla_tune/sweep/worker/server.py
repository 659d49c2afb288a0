"""The process that touches the device: one per GPU (or for the CPU), replaced when it dies.

It gets points over a pipe, says which candidate it is about to run, and sends back measurements, so that the parent knows
from the last word what a dead worker died of. When the parent is gone the worker ends by itself.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from mla_tune.bench.environment import detect_environment
from mla_tune.errors import MlaTuneError
from mla_tune.hardware.nvml import uuid_in_use
from mla_tune.kernels import binding
from mla_tune.kernels.adapters import sglang_kernels
from mla_tune.kernels.adapters.sglang_kernels import Missing
from mla_tune.sites.site import Site
from mla_tune.store.measurement import Measurement
from mla_tune.sweep.tuning.trial import KernelTrials
from mla_tune.sweep.worker.failure import DeviceLostError, one_line
from mla_tune.sweep.worker.messages import (
    Done,
    Entering,
    Hello,
    Lost,
    Notice,
    Offer,
    Refused,
    Support,
    SupportQuery,
    Task,
    Trial,
    Tried,
    Wanted,
)
from mla_tune.sweep.worker.point_measurer import PointMeasurer

_PR_SET_PDEATHSIG = 1


def serve(connection: Connection, kind: str, added: str) -> None:
    """Serve tasks until the pipe closes or the device is lost. ``kind`` is ``cpu`` or ``cuda``.

    ``added`` names a module that brings further candidates; empty for none.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _end_with_the_server()
    _ask_to_be_killed_first()
    _send_notices(connection)
    try:
        if added:
            importlib.import_module(added)
        environment = detect_environment(gpu=kind == "cuda")
        measurer = PointMeasurer(kind)
        trials = KernelTrials(measurer.device, *measurer.gpu_time)
    except (MlaTuneError, ImportError, RuntimeError) as error:  # RuntimeError: torch's, for a driver or device problem
        connection.send(Refused(str(error).strip().splitlines()[0]))
        return
    with suppress(EOFError, ConnectionError):  # the parent has closed its end: nobody wants the rest
        connection.send(Hello(environment, measurer.regimes, (kind == "cuda" and uuid_in_use()) or ""))
        _answer_tasks(connection, measurer, trials)


def _send_notices(connection: Connection) -> None:
    """Send warnings of ours to the parent: what this process prints goes to a file that nobody reads while it lives."""

    class Sender(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with suppress(OSError):  # the parent has closed its end
                connection.send(Notice(" ".join(record.getMessage().split())))

    ours = logging.getLogger("mla_tune")
    ours.addHandler(Sender(logging.WARNING))
    ours.propagate = False


def _answer_tasks(connection: Connection, measurer: PointMeasurer, trials: KernelTrials) -> None:
    answer: Done | Lost | Tried | Offer | Refused | Support = Done(())
    while not isinstance(answer, Lost):
        task = connection.recv()
        if isinstance(task, Wanted):
            answer = _offer(measurer.device.kind)
        elif isinstance(task, SupportQuery):
            answer = Support(tuple(_unsupported(site, name, measurer.device) for site, name in task.pairs))
        else:
            answer = _try(trials, task) if isinstance(task, Trial) else _measure(connection, measurer, task)
        connection.send(answer)


def _offer(kind: str) -> Offer | Refused:
    found = sglang_kernels.installed(kind)  # the only engine that can be wanted
    return Refused(found.reason) if isinstance(found, Missing) else Offer(found.provider, found.left_out)


def _unsupported(site: Site, candidate: str, device: binding.Device) -> str | None:
    try:
        return binding.unsupported(site, candidate, device)
    except Exception as error:  # a kernel library may raise anything when it is imported
        return one_line(error)


def _try(trials: KernelTrials, trial: Trial) -> Tried | Lost:
    try:
        return trials.run(trial)
    except DeviceLostError as lost:
        return Lost((), str(lost))


def _measure(connection: Connection, measurer: PointMeasurer, task: Task) -> Done | Lost:
    rows: list[Measurement] = []
    try:
        for row in measurer.measure(task, lambda name: connection.send(Entering(name))):
            rows.append(row)  # noqa: PERF402  -- what was measured before the device is lost must be kept
    except DeviceLostError as lost:
        return Lost(tuple(rows), str(lost))
    return Done(tuple(rows))


def _end_with_the_server() -> None:
    """Ask the kernel to kill this process when the one that forked it ends, even in the middle of a launch.

    That one ends as soon as the sweep's process does, however it does. Should both be gone already, the closed pipe ends
    this one.
    """
    server = os.getppid()
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):  # not Linux: the closed pipe ends the worker after its current task
        return
    if os.getppid() != server:  # it died before the call took effect
        os._exit(1)


def _ask_to_be_killed_first() -> None:
    """If the machine runs out of memory, the kernel should end this process and not the one that keeps the results."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
