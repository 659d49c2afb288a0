"""What an exception in a worker means: an outcome with one line, or the loss of the device."""

from __future__ import annotations

import subprocess

import torch

from mla_tune.store.measurement import Outcome
from mla_tune.store.outside_cause import outside_cause
from mla_tune.sweep.outcomes import Failure

_ALLOCATIONS = ("empty", "empty_like", "new_empty", "new_zeros", "zeros")


class DeviceLostError(RuntimeError):
    """The device's context no longer works; this process can measure nothing more."""


def failure_of(error: Exception, kind: str) -> Failure:
    """``error`` as an outcome. Raises :class:`DeviceLostError` if a ``cuda`` device no longer answers after it.

    ``disturbed`` where the cause lies outside the candidate: see :mod:`mla_tune.store.outside_cause`.
    """
    if kind == "cuda":
        _require_context(error)
    if is_out_of_memory(error):
        return Failure(Outcome.NO_MEMORY, one_line(error))
    if (origin := _outside_origin(error)) is not None:
        return Failure(Outcome.DISTURBED, one_line(origin))
    compiling = "ompilation" in type(error).__name__
    return Failure(Outcome.COMPILE_ERROR if compiling else Outcome.RUNTIME_ERROR, one_line(error))


def _outside_origin(error: BaseException | None) -> BaseException | None:
    """What in the chain of ``error`` lies outside the candidate: the driver's library, the file system, a compiler."""
    while error is not None:
        bases = {base.__name__ for base in type(error).__mro__}
        outside = isinstance(error, (OSError, subprocess.SubprocessError)) or any(
            n.startswith("NVMLError") for n in bases
        )
        if outside or outside_cause(one_line(error)):
            return error
        error = error.__cause__ or error.__context__
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Also where no exception type says so: torch's CPU allocator, and an allocation through torch's stable ABI.

    The latter loses the reason: ``torch_call_dispatcher("aten::new_empty", ...) API call failed``.
    """
    text = str(error)
    through_abi = "API call failed" in text and any(f'"aten::{name}"' in text for name in _ALLOCATIONS)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text or through_abi


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
