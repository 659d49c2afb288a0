"""What a tuner may try: the values of every launch parameter of every kernel."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from mla_tune.errors import UsageError
from mla_tune.sites.launch_parameters import KERNELS, KernelLaunch, make_launch, parameters

Space = Mapping[str, tuple[int, ...]]
"""Parameter name -> its values, the same at every run: a study is resumed only in the space that it began in."""

_WARPS = (1, 2, 4, 8)
_DEQUANTIZE: Space = {
    "rows_per_program": (1, 2, 4, 8, 16),
    "num_warps": _WARPS,
    "programs_per_sm": (0, 8, 16, 32),
    "stream_loads": (0, 1),
    "stream_stores": (0,),
}
_SPACES: dict[str, Space] = {
    "dequantize_v4": _DEQUANTIZE,
    "dequantize_dsa": _DEQUANTIZE,
    "slot_ids": {"rows_per_program": (64, 128, 256, 512, 1024, 2048), "num_warps": _WARPS},
    "combine_topk": {
        "tokens_per_program": (1, 2, 4, 8, 16),
        "columns_per_program": (64, 128, 256, 512, 1024),
        "num_warps": _WARPS,
        "column_programs": (0, 1, 2),
    },
    "combine_all": {
        "tokens_per_program": (1, 2, 4, 8),
        "columns_per_program": (128, 256, 512, 1024, 2048),
        "num_warps": _WARPS,
        "column_programs": (0, 1, 4),
    },
    "metadata": {
        "tiles": (64, 128, 256, 512),
        "columns": (16, 32, 64, 128, 256),
        "num_warps": (4, 8, 16, 32),
        "entries_per_program": (1, 4, 8, 16, 32),
    },
    "prepare": {
        "rows_per_program": (1, 2, 4, 8),
        "num_warps": (1, 2, 4),
        "tokens_per_program": (1, 2, 4),
        "columns_per_program": (64, 128, 256),
    },
    "select": {
        "tokens_per_program": (1, 2, 4, 8),
        "columns_per_program": (128, 256, 512),
        "rows_per_program": (512, 1024, 2048, 4096),
        "num_warps": (2, 4, 8),
    },
}
_MOST_VALUES_PER_THREAD = 64
"""Values of one block that a thread may hold: twice as many spill, and take seconds to compile."""


def space_of(kernel: str, size_from: int) -> Space:
    """Values to try for ``kernel`` in the size class that starts at ``size_from``.

    Workspace rows are streamed past the L2 only in the largest class: in the smaller ones attention finds them there, which
    a timing of the kernel alone would not see.
    """
    space = _SPACES[kernel]
    if kernel.startswith("dequantize") and size_from == KERNELS[kernel].classes[-1].size_from:
        return {**space, "stream_stores": (0, 1)}
    return space


def launch_at(kernel: str, size_from: int, values: Mapping[str, int]) -> KernelLaunch | None:
    """A point of the space as launch parameters; None for one that cannot run or is known to be no good."""
    if _values_per_thread(kernel, values) > _MOST_VALUES_PER_THREAD:
        return None
    try:
        return make_launch(kernel, size_from, values)
    except UsageError:  # a combination that the kernel refuses
        return None


def space_size(kernel: str, size_from: int) -> int:
    """Points of the space that :func:`launch_at` lets through."""
    space = space_of(kernel, size_from)
    points = (dict(zip(space, values, strict=True)) for values in product(*space.values()))
    return sum(launch_at(kernel, size_from, values) is not None for values in points)


def default_values(kernel: str, size_from: int) -> dict[str, int]:
    """The default of a size class as a point of its space."""
    return parameters(KERNELS[kernel].class_of(size_from).default)


def _values_per_thread(kernel: str, values: Mapping[str, int]) -> float:
    threads = 32 * values["num_warps"]
    if kernel.startswith("dequantize") or kernel == "prepare":
        return values["rows_per_program"] * 512 / threads
    if kernel == "metadata":
        return values["tiles"] * values["columns"] / threads
    tile = values.get("tokens_per_program", 1) * values.get("columns_per_program", 1)
    return max(tile, values.get("rows_per_program", 1)) / threads
