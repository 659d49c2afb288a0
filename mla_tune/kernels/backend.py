"""Which implementation of a kernel runs.

Every public function of the kernel modules has a Triton kernel for CUDA tensors and a vectorized torch version for CPU
tensors, chosen by :func:`choose_backend` from where the tensors lie. Triton is imported at the first launch only, so that a
machine without it can import everything and run on its CPU. Launch parameters: :mod:`mla_tune.sites.launch_parameters`.
"""

from __future__ import annotations

import importlib.util
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING

from mla_tune.errors import MissingPackageError

if TYPE_CHECKING:
    import torch


class Backend(StrEnum):
    """The two implementations of every kernel here."""

    TRITON = "triton"
    TORCH = "torch"


def choose_backend(tensor: torch.Tensor, backend: Backend | None) -> Backend:
    """``backend`` if given, else Triton for a CUDA tensor and torch for any other.

    Triton on CPU tensors works where its interpreter is on (``TRITON_INTERPRET=1``); that is slow, so it is never chosen
    unasked. Raises :class:`MissingPackageError` if Triton is needed and absent.
    """
    chosen = backend or (Backend.TRITON if tensor.is_cuda else Backend.TORCH)
    if chosen is Backend.TRITON:
        _require_triton()
    return chosen


@cache
def _require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise MissingPackageError(
            "kernels on a GPU need the package triton; install it with: pip install 'mla-tune[tune]'"
        )
