# mypy: disable-error-code="import-untyped"
"""Compile every device kernel for GPUs that this machine need not have. ``test_compile`` runs this program.

Every variant is compiled for sm90 (H100, H200) and sm100 (B200), and one variant of every kernel for sm103 (B300) and
sm120 (RTX PRO 6000) too, down to the cubin. Arguments are taken to be aligned and divisible as they are in a forward, so
that what is checked of the memory instructions is what will run. One kernel is then launched both ways with a driver that
only records: the launch by address must hand over what Triton's own launch does.
"""

from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mla_tune.kernels.device import combine_kernels as combine
from mla_tune.kernels.device import dequantize_kernels as dequantize
from mla_tune.kernels.device import prepare_kernels as prepare
from mla_tune.kernels.device import schedule_kernels as indexer_metadata
from mla_tune.kernels.device import select_kernels as select
from mla_tune.kernels.device import slot_id_kernels as slot_ids
from mla_tune.kernels.device.cache_rows import Layout
from mla_tune.kernels.device.launcher import Launcher
from mla_tune.kernels.formats import V4
from tests.kernels.test_formats import FORMATS

ARCHITECTURES = (90, 100)
"""Every variant of a kernel is compiled for these."""
MORE_ARCHITECTURES = (103, 120)
"""The first variant of a kernel is compiled for these too."""
_seen: set[str] = set()
_HOOKS = slice(6, 9)
"""Where a launch has what it tells profilers, and their two hooks."""
TYPES = {
    "cache_ptr": "*u8",
    "window_cache_ptr": "*u8",
    "marks_ptr": "*u8",
    "cu_rows_ptr": "*i64",
    "window_cu_rows_ptr": "*i64",
    "base_ptr": "*i64",
    "compressed_base_ptr": "*i64",
    "window_base_ptr": "*i64",
}
BF16 = {"out_ptr": "*bf16", "window_out_ptr": "*bf16"}
DIVISIBLE = ("width", "topk_stride")


def compile_kernel(kernel: Any, num_warps: int, types: Any = None, **constants: Any) -> list[str]:
    """The kernel's PTX for each of ``ARCHITECTURES``; arguments that are neither pointers nor constants are int32."""
    known = TYPES | (types or {})
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        pointer = name.endswith("_ptr")
        signature[name] = "constexpr" if name in constants else known.get(name, "*i32" if pointer else "i32")
        if name not in constants and (pointer or name in DIVISIBLE):
            attributes[(index,)] = [["tt.divisibility", 16]]
    name = kernel.__name__
    more = () if name in _seen else MORE_ARCHITECTURES
    _seen.add(name)
    found = []
    for architecture in (*ARCHITECTURES, *more):
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
        require(compiled.asm["cubin"][:4] == b"\x7fELF", f"{name} must have a cubin for sm{architecture}")
        found.append(str(compiled.asm["ptx"]))
    return found[: len(ARCHITECTURES)]


def require(condition: bool, rule: str) -> None:
    """End the program with ``rule`` unless it holds."""
    if not condition:
        raise SystemExit(rule)


def require_wide(ptx: str, name: str, loads: int, stores: int) -> None:
    """At least so many loads and stores of 16 bytes."""
    for word, least in (("ld.global", loads), ("st.global", stores)):
        found = sum(word in line and ".v4.b32" in line for line in ptx.splitlines())
        require(found >= least, f"{name} must have {least} 16-byte {word}: it has {found}")


def compile_dequantize() -> None:
    """A kernel that flushes subnormals to zero would lose what the smallest V4 scales stand for."""
    for fmt in FORMATS:
        for persistent, policy, warps in ((False, "", 2), (False, "evict_first", 1), (True, "", 1)):
            constants = Layout.of(fmt, 64).constants() | {"ROWS": 4, "LOADS": policy, "STORES": policy}
            for ptx in compile_kernel(
                dequantize._dequantize, warps, BF16, **constants, COUNTED=persistent, PERSISTENT=persistent
            ):
                require(".ftz" not in ptx, f"the {fmt.name} dequantize kernel flushes subnormals to zero")
                require_wide(ptx, f"dequantize {fmt.name}", 2, 4)
                streamed = "st.global.L1::evict_first.L2::cache_hint" in ptx
                require(streamed == bool(policy), f"dequantize {fmt.name} must stream if it is told to: {policy!r}")


def compile_combine() -> None:
    """The selection is read, and the indices are written, 16 bytes at a time."""
    tile = {"WINDOW": 128, "TOKENS": 8, "COLUMNS": 128}
    for mapped in (False, True):
        rest = {} if mapped else {"row_map_ptr": None}
        for ptx in compile_kernel(combine._combine, 4, RATIO=4, TOPK=512, MAPPED=mapped, **tile, **rest):
            require_wide(ptx, "combine with a top-k", 2, 2)
    absent = {"topk_indices_ptr": None, "row_map_ptr": None}
    for ratio in (0, 128):
        for ptx in compile_kernel(combine._combine, 4, RATIO=ratio, TOPK=0, MAPPED=False, **tile, **absent):
            require_wide(ptx, "combine without a top-k", 0, 2)


def compile_prepare() -> None:
    """All three jobs in one kernel, and the rows of one cache alone."""
    window = Layout.of(V4, 256)
    constants = {
        "WINDOW_PAGE_SIZE": 256,
        "WINDOW_PAGE_BYTES": window.page_bytes,
        "WINDOW_SCALE_BASE": window.scale_base,
        "REQUESTS": 64,
        "ROWS": 4,
        "TOKENS": 2,
        "COLUMNS": 128,
    }
    everything = Layout.of(V4, 64).constants() | {"COMPRESSED": True, "RATIO": 4, "TOPK": 512, "WINDOW": 128}
    for ptx in compile_kernel(prepare._prepare, 2, BF16, **constants, **everything):
        require_wide(ptx, "prepare", 5, 9)
    absent = {name: None for name in prepare._prepare.arg_names if name.endswith("_ptr") and name not in ROWS_ONLY}
    for fmt in FORMATS:
        rows = Layout.of(fmt, 64).constants() | {"COMPRESSED": True, "RATIO": 0, "TOPK": 0, "WINDOW": 0}
        compile_kernel(prepare._prepare, 2, BF16, **constants, **rows, **absent)


ROWS_ONLY = ("cache_ptr", "page_table_ptr", "lens_ptr", "cu_rows_ptr", "out_ptr")


class RecordingDriver:
    """A Triton driver of an H100 that compiles for it and records launches instead of making them."""

    def __init__(self) -> None:
        self.launches: list[list[Any]] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda name, binary, shared, device: (1, 42, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Any number that nothing else has."""
        return 77

    def get_current_target(self) -> GPUTarget:
        """An H100."""
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Records grid, stream, function, metadata and arguments; tensors as the addresses that CUDA gets."""

        def launch(*given: Any) -> None:
            self.launches.append([g.data_ptr() if isinstance(g, torch.Tensor) else g for g in given])

        return launch


def launch_both_ways() -> None:
    """The first launch goes through Triton, the second and a bound one by address: CUDA must not see a difference.

    What profilers hook in is left aside: a launch by address has no hooks.
    """
    driver = RecordingDriver()
    triton.runtime.driver.set_active(driver)
    launcher = Launcher(indexer_metadata._metadata_small)
    require(not launcher.only_through_triton, f"Triton {triton.__version__} must be launched by address: it is known")
    lens, out = torch.zeros(64, dtype=torch.int32), torch.zeros(9, 2, dtype=torch.int32)
    launch = ((9,), (lens, out, 64, 8), {"SPLIT": 256, "ROWS": 128}, 1)
    launcher(*launch)
    launcher(*launch)
    launcher.bind(*launch)()
    require(len(driver.launches) == 3, f"3 launches must be 3: got {len(driver.launches)}")
    for at in range(3):
        del driver.launches[at][_HOOKS]
    first, *others = driver.launches
    require(first[:5] == [9, 1, 1, 77, 42], f"Triton must launch the grid on the stream: got {first[:5]}")
    for other in others:
        require(other == first, f"a launch by address must be Triton's own: got {other} instead of {first}")


def main() -> None:
    """Compile all."""
    launch_both_ways()
    compile_dequantize()
    compile_combine()
    compile_prepare()
    for from_end in (False, True):
        compile_kernel(slot_ids._request_slots, 4, PAGE_SIZE=64, FROM_END=from_end, ROWS=512)
    for rows in (128, 256):
        compile_kernel(indexer_metadata._metadata_small, 1, SPLIT=256, ROWS=rows)
    for tiles, columns, warps in ((128, 16, 4), (128, 64, 8), (256, 128, 32)):
        for ptx in compile_kernel(
            indexer_metadata._metadata, warps, SPLIT=256, TILES=tiles, COLUMNS=columns, ENTRIES=8
        ):
            require_wide(ptx, "metadata", min(8, tiles * columns // warps // 128), 0)
    compile_kernel(select._mark, 4, RATIO=4, TOPK=512, TOKENS=4, COLUMNS=256)
    compile_kernel(select._compact, 4, ROWS=1024)
    print("compiled")


if __name__ == "__main__":
    main()
