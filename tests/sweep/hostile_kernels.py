"""GPU kernels that misbehave; imported on a GPU only."""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit
def store_far_away(pointer):  # type: ignore[no-untyped-def]
    """Write where nothing was ever allocated."""
    tl.store(pointer + (1 << 45), 1.0)


@triton.jit
def spin(dice):  # type: ignore[no-untyped-def]
    """Take a random while: 0 to 2**16 dependent steps, by a linear congruential generator in ``dice`` (1,) int64."""
    value = (tl.load(dice) * 1103515245 + 12345) % (1 << 31)
    tl.store(dice, value)
    result = value
    for _ in range(value % 65536):
        result = (result * 1103515245 + 12345) % (1 << 31)
    tl.store(dice, tl.where(result < 0, result, value))
