"""Numerical comparison of an output with its reference."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Bounds on relative errors in the Euclidean norm: over everything, and for the worst row (first dimension)."""

    overall: float
    worst_row: float


BF16_ATTENTION = Tolerance(overall=1e-2, worst_row=5e-2)
"""For bf16 operands accumulated in fp32. bf16 rounds to 2**-9 = 2e-3 relative; the kernels round the probabilities and
the output once each, so 1e-2 leaves five roundings. A wrong or unwritten row is off by its whole norm, 20 times the row
bound."""


def mismatch(output: torch.Tensor, reference: torch.Tensor, tolerance: Tolerance) -> str | None:
    """Why ``output`` is not ``reference`` within ``tolerance``; None if it is. Shapes are equal, dtypes may differ."""
    if output.shape != reference.shape:
        return f"shape {tuple(output.shape)} differs from the reference's {tuple(reference.shape)}"
    if output.numel() == 0:
        return None
    out, ref = (t.double().reshape(t.shape[0], -1) for t in (output, reference))
    bad_rows = (~out.isfinite()).any(dim=1).nonzero().flatten()
    if bad_rows.numel():
        return f"{bad_rows.numel()} of {out.shape[0]} rows hold NaN or infinity, the first is row {int(bad_rows[0])}"
    error, norm = (out - ref).norm(dim=1), ref.norm(dim=1)
    overall = float(error.norm() / norm.norm().clamp_min(1e-30))
    if not overall <= tolerance.overall:  # also where it is NaN, as with a reference that is
        return f"relative error {overall:.2e} exceeds {tolerance.overall:.0e}"
    relative = error / norm.clamp_min(float(norm.mean()) * 1e-3 + 1e-30)
    row = int(relative.argmax())
    if not float(relative[row]) <= tolerance.worst_row:
        return f"row {row} has relative error {float(relative[row]):.2e}, above {tolerance.worst_row:.0e}"
    return None


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """In here every tensor that torch allocates without filling it holds NaN, or the largest integer of its type.

    Otherwise a kernel that leaves a row unwritten shows the row that another one wrote right into the same memory
    before. A side of torch's deterministic mode, whose other sides only cost time, and warnings that are of no use here.
    """
    import torch

    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def unwritten(output: torch.Tensor) -> str | None:
    """Why ``output``, whose memory was poisoned with NaN before the run, was not fully written; None if it was.

    A row of exact zeros in an output of floats counts as unwritten too: memory fresh from the system is zero, and a
    weighted mean of random values is not.
    """
    if output.numel() == 0:
        return None
    rows = output.reshape(output.shape[0], -1)
    lacking = ~rows.isfinite().all(dim=1)
    if output.is_floating_point():
        lacking |= (rows == 0).all(dim=1)
    if not bool(lacking.any()):
        return None
    row = int(lacking.nonzero()[0])
    return f"output has unwritten or non-finite values, the first in row {row} of {output.shape[0]}"
