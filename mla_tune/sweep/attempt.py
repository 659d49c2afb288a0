"""One try of a task on a worker: what it measured, and how the worker failed, if it did."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mla_tune.store.measurement import Measurement, Outcome
from mla_tune.store.outside_cause import outside_cause
from mla_tune.sweep.outcomes import Failure
from mla_tune.sweep.worker.messages import Done, Entering, Lost, Task
from mla_tune.sweep.worker.process import WorkerProcess


@dataclass(frozen=True, slots=True)
class Attempt:
    """How a task went."""

    rows: tuple[Measurement, ...]
    """What the worker finished; nothing where it died."""
    running: str | None
    """The candidate that it ran last, or :data:`~mla_tune.sweep.worker.messages.TIMING`; None while it built the inputs."""
    failure: Failure | None
    """How the worker failed, which must then be replaced; None if it did not. ``disturbed`` if the cause lies outside."""


def attempt(worker: WorkerProcess, task: Task, timeout_s: float) -> Attempt:
    """Give ``task`` to ``worker`` and wait for the answer, at most ``timeout_s`` seconds."""
    running: str | None = None
    deadline = time.monotonic() + timeout_s
    try:
        worker.send(task)
        while True:
            message = worker.receive(deadline - time.monotonic())
            if isinstance(message, Entering):
                running = message.candidate
            elif isinstance(message, Done):
                return Attempt(message.measurements, running, None)
            elif isinstance(message, Lost):
                return Attempt(message.measurements, running, _failure(Outcome.RUNTIME_ERROR, message.detail))
            else:
                return Attempt((), running, Failure(Outcome.TIMEOUT, f"no answer within {timeout_s:.0f} s"))
    except (EOFError, OSError):  # OSError: it died in the middle of a message
        return Attempt((), running, _failure(Outcome.CRASH, worker.exit_summary()))


def _failure(outcome: Outcome, detail: str) -> Failure:
    return Failure(Outcome.DISTURBED if outside_cause(detail) else outcome, detail)
