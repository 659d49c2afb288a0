"""Which implementation of a kernel runs, and the launch parameters that a tuner may vary.

Every public function of the kernel modules has a Triton kernel for CUDA tensors and a vectorized torch version for CPU
tensors, chosen by :func:`choose_backend` from where the tensors lie. Triton is imported at the first launch only, so that a
machine without it can import everything and run on its CPU.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING

from mla_tune.errors import MissingPackageError, UsageError

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


@dataclass(frozen=True, slots=True)
class DequantizeConfig:
    """Launch of the dequantize kernel. The default is the fastest on an H200: 3.84 TB/s of a copy's 4.17, 2M rows."""

    rows_per_program: int = 4
    num_warps: int = 2

    def __post_init__(self) -> None:
        require_powers_of_two(rows_per_program=self.rows_per_program, num_warps=self.num_warps)


@dataclass(frozen=True, slots=True)
class SlotIdsConfig:
    """Launch of the slot id kernel. The default is the fastest on an H200 at 16M rows of 64 requests (53 us)."""

    rows_per_program: int = 512
    num_warps: int = 2

    def __post_init__(self) -> None:
        require_powers_of_two(rows_per_program=self.rows_per_program, num_warps=self.num_warps)


@dataclass(frozen=True, slots=True)
class CombineConfig:
    """Launch of the index combine kernel: a program writes ``tokens_per_program`` x ``columns_per_program`` indices."""

    tokens_per_program: int
    columns_per_program: int
    num_warps: int

    def __post_init__(self) -> None:
        require_powers_of_two(
            tokens_per_program=self.tokens_per_program,
            columns_per_program=self.columns_per_program,
            num_warps=self.num_warps,
        )

    @classmethod
    def default(cls, width: int) -> CombineConfig:
        """The fastest of those tried on an H200: at 640 columns, and (65 against 82 us) at 8320."""
        return cls(8, 128, 4) if width < 2048 else cls(4, 256, 2)


@dataclass(frozen=True, slots=True)
class MetadataConfig:
    """Launch of the indexer metadata kernel: rows are split into ``tiles``, each read ``columns`` at a time.

    On an H200 with a warm L2 the default takes 3.0, 3.9 and 5.9 us at 64, 11673 and 32768 rows; (256, 32, 8) takes 4.1,
    4.7 and 5.7, and 11 instead of 16 at 131072.
    """

    tiles: int = 128
    columns: int = 32
    num_warps: int = 4

    def __post_init__(self) -> None:
        require_powers_of_two(tiles=self.tiles, columns=self.columns, num_warps=self.num_warps)
        if self.columns < 4:
            raise UsageError(f"columns must hold one 16-byte load: got {self.columns}; accepted: 4, 8, 16, ...")


def require_powers_of_two(**values: int) -> None:
    """Raise :class:`UsageError` for the first value that is not a positive power of two; Triton's blocks must be."""
    for name, value in values.items():
        if value < 1 or value & (value - 1):
            raise UsageError(f"{name} must be a power of two: got {value}; accepted: 1, 2, 4, 8, ...")
