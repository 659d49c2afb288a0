"""What an exception in a worker means: an outcome with one line, or the loss of the device."""

from __future__ import annotations

import torch

from mla_tune.store.measurement import Outcome
from mla_tune.sweep.outcomes import Failure


class DeviceLostError(RuntimeError):
    """The device's context no longer works; this process can measure nothing more."""


def failure_of(error: Exception, kind: str) -> Failure:
    """``error`` as an outcome. Raises :class:`DeviceLostError` if a ``cuda`` device no longer answers after it."""
    if kind == "cuda":
        _require_context(error)
    if is_out_of_memory(error):
        return Failure(Outcome.NO_MEMORY, one_line(error))
    compiling = "ompilation" in type(error).__name__
    return Failure(Outcome.COMPILE_ERROR if compiling else Outcome.RUNTIME_ERROR, one_line(error))


def is_out_of_memory(error: BaseException) -> bool:
    """Also where torch's CPU allocator says so, which has no exception type of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def one_line(error: BaseException) -> str:
    """Type and first line of an exception."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _require_context(error: Exception) -> None:
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except RuntimeError:
        raise DeviceLostError(one_line(error)) from error
