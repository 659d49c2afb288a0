"""One try of a task on a worker: what it measured, and how the worker failed, if it did."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mla_tune.store.measurement import Measurement, Outcome
from mla_tune.sweep.outcomes import Failure
from mla_tune.sweep.worker.messages import TIMING, Done, Entering, Lost, Task
from mla_tune.sweep.worker.process import WorkerProcess


@dataclass(frozen=True, slots=True)
class Attempt:
    """How a task went."""

    rows: tuple[Measurement, ...]
    """What the worker finished; nothing where it died."""
    culprit: str
    """The candidate that it was running last, or :data:`~mla_tune.sweep.worker.messages.TIMING`."""
    failure: Failure | None
    """How the worker failed, which must then be replaced; None if it did not."""


def attempt(worker: WorkerProcess, task: Task, timeout_s: float) -> Attempt:
    """Give ``task`` to ``worker`` and wait for the answer, at most ``timeout_s`` seconds."""
    culprit = TIMING
    deadline = time.monotonic() + timeout_s
    try:
        worker.send(task)
        while True:
            message = worker.receive(deadline - time.monotonic())
            if isinstance(message, Entering):
                culprit = message.candidate
            elif isinstance(message, Done):
                return Attempt(message.measurements, culprit, None)
            elif isinstance(message, Lost):
                return Attempt(message.measurements, culprit, Failure(Outcome.RUNTIME_ERROR, message.detail))
            else:
                return Attempt((), culprit, Failure(Outcome.TIMEOUT, f"no answer within {timeout_s:.0f} s"))
    except (EOFError, OSError):  # OSError: it died in the middle of a message
        return Attempt((), culprit, Failure(Outcome.CRASH, worker.epitaph()))
