"""Launch parameters of the project's own kernels: what a tuner may vary, what an untuned GPU gets, and the lookup.

A kernel has one set of parameters for each *size class*: a range of the size that it is launched with (rows, query
tokens). ``mla-tune tune`` finds them for a GPU, a policy carries them as ``kernel_config``, and whoever launches a kernel
asks a :class:`Launches` for them. The policy's reader checks with it what it reads, so every server imports it, and classes
of msgspec are made in a tenth of the time that dataclasses take.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from mla_tune.errors import UsageError


def require_powers_of_two(**values: int) -> None:
    """Raise :class:`UsageError` for the first value that is not a positive power of two; Triton's blocks must be."""
    for name, value in values.items():
        if value < 1 or value & (value - 1):
            raise UsageError(f"{name} must be a power of two: got {value}; accepted: 1, 2, 4, 8, ...")


class DequantizeConfig(msgspec.Struct, frozen=True):
    """Launch of the dequantize kernel. The default is the fastest on an H200: 3.84 TB/s of a copy's 4.17, 2M rows."""

    rows_per_program: int = 4
    num_warps: int = 2
    programs_per_sm: int = 0
    """Programs of a persistent grid, each of which takes block after block; 0 gives every block its own program."""
    stream_loads: bool = False
    """Cache rows leave the L1 and L2 first: nothing reads them again before the next forward."""
    stream_stores: bool = False
    """Workspace rows leave them first too. Only where the workspace is larger than the L2: attention reads it next."""

    def __post_init__(self) -> None:
        require_powers_of_two(rows_per_program=self.rows_per_program, num_warps=self.num_warps)
        if self.programs_per_sm:
            require_powers_of_two(programs_per_sm=self.programs_per_sm)


class SlotIdsConfig(msgspec.Struct, frozen=True):
    """Launch of the slot id kernel. The default is the fastest on an H200 at 16M rows of 64 requests (53 us)."""

    rows_per_program: int = 512
    num_warps: int = 2

    def __post_init__(self) -> None:
        require_powers_of_two(rows_per_program=self.rows_per_program, num_warps=self.num_warps)


class CombineConfig(msgspec.Struct, frozen=True):
    """Launch of the index combine kernel: ``tokens_per_program`` x ``columns_per_program`` indices in one step."""

    tokens_per_program: int = 8
    columns_per_program: int = 128
    num_warps: int = 4
    column_programs: int = 0
    """Programs that share the columns of a row of tokens, each taking step after step; 0 gives every step its own."""

    def __post_init__(self) -> None:
        require_powers_of_two(
            tokens_per_program=self.tokens_per_program,
            columns_per_program=self.columns_per_program,
            num_warps=self.num_warps,
        )
        if self.column_programs:
            require_powers_of_two(column_programs=self.column_programs)


class MetadataConfig(msgspec.Struct, frozen=True):
    """Launch of the indexer metadata kernel: rows are split into ``tiles``, each read ``columns`` at a time.

    The default reads 8192 rows with one round of loads.
    """

    tiles: int = 128
    columns: int = 64
    num_warps: int = 8
    entries_per_program: int = 8

    def __post_init__(self) -> None:
        require_powers_of_two(**msgspec.structs.asdict(self))
        if not 4 <= self.columns <= 256:
            raise UsageError(
                f"columns must hold one 16-byte load, and their sum fit 32 bits: got {self.columns}; accepted: 4 to 256"
            )


class PrepareConfig(msgspec.Struct, frozen=True):
    """Launch of the fused preparation: rows that a program dequantizes, and the tile of indices that it combines."""

    rows_per_program: int = 4
    num_warps: int = 2
    tokens_per_program: int = 2
    columns_per_program: int = 128

    def __post_init__(self) -> None:
        require_powers_of_two(**msgspec.structs.asdict(self))


class SelectConfig(msgspec.Struct, frozen=True):
    """Launch of the two kernels that find the selected rows: entries marked, and rows compacted, by a program."""

    tokens_per_program: int = 4
    columns_per_program: int = 256
    rows_per_program: int = 1024
    num_warps: int = 4

    def __post_init__(self) -> None:
        require_powers_of_two(**msgspec.structs.asdict(self))


Config = DequantizeConfig | SlotIdsConfig | CombineConfig | MetadataConfig | PrepareConfig | SelectConfig
"""Launch parameters of one kernel."""
_C = TypeVar("_C", bound=Config)


class SizeClass(msgspec.Struct, frozen=True):
    """Sizes from ``size_from`` up to the next class, their default, and the size at which they are tuned."""

    size_from: int
    tuned_at: int
    default: Config


class Kernel(msgspec.Struct, frozen=True):
    """One kernel whose launch can be tuned."""

    name: str
    unit: str
    """What its size counts."""
    classes: tuple[SizeClass, ...]
    """Ascending, the first from 0."""

    def class_of(self, size: int) -> SizeClass:
        """The class that ``size`` belongs to."""
        for found in reversed(self.classes):
            if found.size_from <= size:
                return found
        return self.classes[0]


_K = 1024
_ROW_CLASSES = ((0, 2 * _K), (8 * _K, 16 * _K), (128 * _K, 2048 * _K))
"""Rows from and tuned at: about a wave of programs, within the L2 (50 MB are 50K rows of bf16), and far beyond it."""


def _by_rows(name: str, default: Config) -> Kernel:
    return Kernel(name, "rows", tuple(SizeClass(start, at, default) for start, at in _ROW_CLASSES))


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        _by_rows("dequantize_v4", DequantizeConfig()),
        _by_rows("dequantize_dsa", DequantizeConfig()),
        Kernel(
            "slot_ids",
            "rows",
            (SizeClass(0, 16 * _K, SlotIdsConfig()), SizeClass(128 * _K, 2048 * _K, SlotIdsConfig())),
        ),
        Kernel(
            "combine_topk",
            "query tokens",
            (SizeClass(0, 64, CombineConfig()), SizeClass(2 * _K, 16 * _K, CombineConfig())),
        ),
        # A row of c128a has 8320 columns at 1M tokens: 65 us with (4, 256, 2) on an H200, 82 us with (8, 128, 4).
        Kernel(
            "combine_all",
            "query tokens",
            (SizeClass(0, 64, CombineConfig(4, 256, 2)), SizeClass(2 * _K, 8 * _K, CombineConfig(4, 256, 2))),
        ),
        Kernel(
            "metadata",
            "rows",
            (
                SizeClass(0, 2 * _K, MetadataConfig(128, 16, 4)),
                SizeClass(4 * _K, 8 * _K, MetadataConfig()),
                SizeClass(16 * _K, 32 * _K, MetadataConfig(256, 128, 32)),
            ),
        ),
        _by_rows("prepare", PrepareConfig()),
        Kernel(
            "select",
            "query tokens",
            (SizeClass(0, 64, SelectConfig()), SizeClass(_K, 4 * _K, SelectConfig())),
        ),
    )
}


class KernelLaunch(msgspec.Struct, frozen=True):
    """Tuned parameters of one kernel in one size class."""

    kernel: str
    size_from: int
    config: Config


@dataclass(frozen=True, slots=True)
class Launches:
    """Parameters of every kernel at every size: the tuned ones, and the defaults where nothing was tuned."""

    tuned: tuple[KernelLaunch, ...] = ()
    _configs: dict[tuple[str, int], Config] = field(init=False, repr=False, compare=False)
    """The same by kernel and class: every launch asks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_configs", {(entry.kernel, entry.size_from): entry.config for entry in self.tuned})

    def config(self, kernel: str, size: int) -> Config:
        """Parameters of ``kernel`` for a launch of ``size``."""
        found = KERNELS[kernel].class_of(size)
        return self._configs.get((kernel, found.size_from), found.default)

    def dequantize(self, fmt: str, rows: int) -> DequantizeConfig:
        """Of the dequantize kernel for a cache format (``v4``, ``dsa``)."""
        return _typed(self.config(f"dequantize_{fmt}", rows), DequantizeConfig)

    def slot_ids(self, rows: int) -> SlotIdsConfig:
        """Of the slot id kernel."""
        return _typed(self.config("slot_ids", rows), SlotIdsConfig)

    def combine(self, has_topk: bool, num_qo_tokens: int) -> CombineConfig:
        """Of the combine kernel, where the layer has a top-k (c4a, dsa) or selects all or nothing."""
        return _typed(self.config("combine_topk" if has_topk else "combine_all", num_qo_tokens), CombineConfig)

    def metadata(self, rows: int) -> MetadataConfig:
        """Of the indexer metadata kernel."""
        return _typed(self.config("metadata", rows), MetadataConfig)

    def prepare(self, rows: int) -> PrepareConfig:
        """Of the fused preparation."""
        return _typed(self.config("prepare", rows), PrepareConfig)

    def select(self, num_qo_tokens: int) -> SelectConfig:
        """Of the kernels that find the selected rows."""
        return _typed(self.config("select", num_qo_tokens), SelectConfig)

    def digest(self, kernels: Iterable[str]) -> str:
        """What tells measurements of differently tuned kernels apart: 12 hex digits; empty where all have the default."""
        names = set(kernels)
        entries = [
            e for e in self.tuned if e.kernel in names and e.config != DEFAULT_LAUNCHES.config(e.kernel, e.size_from)
        ]
        mine = sorted((e.kernel, e.size_from, sorted(parameters(e.config).items())) for e in entries)
        return hashlib.sha256(json.dumps(mine).encode()).hexdigest()[:12] if mine else ""


DEFAULT_LAUNCHES = Launches()
"""What a GPU gets that nobody tuned."""


def parameters(config: Config) -> dict[str, int]:
    """Parameters by name, as they are stored; flags as 0 and 1."""
    return {name: int(value) for name, value in msgspec.structs.asdict(config).items()}


def make_launch(kernel: str, size_from: int, values: Mapping[str, int]) -> KernelLaunch:
    """Read :func:`parameters` back. Raises :class:`UsageError` for a kernel, class or parameter that there is not."""
    if kernel not in KERNELS:
        raise UsageError(f"kernel must be a known one: got {kernel!r}; accepted: {', '.join(KERNELS)}")
    classes = {found.size_from: found for found in KERNELS[kernel].classes}
    if size_from not in classes:
        raise UsageError(
            f"size_from must start a size class of {kernel}: got {size_from}; accepted: {', '.join(map(str, classes))}"
        )
    kind = type(classes[size_from].default)
    known = kind.__annotations__
    if set(values) != set(known):
        raise UsageError(
            f"launch must have the parameters of {kernel}: got {', '.join(values) or 'none'}; "
            f"accepted: {', '.join(known)}"
        )
    for name, value in values.items():
        if known[name] == "bool" and value not in (0, 1):
            raise UsageError(f"{name} must be a flag: got {value}; accepted: 0, 1")
    typed: dict[str, Any] = {name: bool(value) if known[name] == "bool" else value for name, value in values.items()}
    return KernelLaunch(kernel, size_from, kind(**typed))


def _typed(config: Config, kind: type[_C]) -> _C:
    if not isinstance(config, kind):  # a launch is only made with the parameters of its kernel
        raise UsageError(f"launch parameters must be a {kind.__name__}: got {type(config).__name__}")
    return config
