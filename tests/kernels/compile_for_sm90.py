# mypy: disable-error-code="import-untyped"
"""Compile every device kernel for sm90, as the H100 and H200 are; needs no GPU. A program: ``test_compile`` runs it."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mla_tune.kernels.device import combine, dequantize, indexer_metadata, slot_ids
from mla_tune.kernels.formats import ROPE_DIM
from tests.kernels.test_formats import FORMATS

POINTERS = {
    "cache_ptr": "*u8",
    "out_ptr": "*i32",
    "slot_ids_ptr": "*i32",
    "cu_rows_ptr": "*i64",
    "compressed_base_ptr": "*i64",
    "window_base_ptr": "*i64",
}


def compile_kernel(kernel: Any, num_warps: int, pointers: dict[str, str] = POINTERS, **constants: Any) -> str:
    """The kernel's PTX; arguments that are neither pointers nor constants are int32."""
    types = {
        name: "constexpr" if name in constants else pointers.get(name, "*i32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature=types, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    return str(compiled.asm["ptx"])


def main() -> None:
    """Compile all; a kernel that flushes subnormals to zero would lose what the smallest V4 scales stand for."""
    for fmt in FORMATS:
        ptx = compile_kernel(
            dequantize._dequantize,
            num_warps=2,
            pointers={**POINTERS, "out_ptr": "*bf16"},
            PAGE_SIZE=64,
            PAGE_BYTES=fmt.page_bytes(64),
            DATA_STRIDE=fmt.data_stride,
            ROPE_OFFSET=fmt.rope_offset,
            SCALE_BASE=fmt.scale_base(64),
            SCALE_STRIDE=fmt.scale_stride,
            EXPONENT_SCALES=fmt.exponent_scales,
            NUM_GROUPS=fmt.num_groups,
            NUM_GROUPS_PADDED=triton.next_power_of_2(fmt.num_groups),
            GROUP_SIZE=fmt.group_size,
            ROPE=ROPE_DIM,
            ROWS=4,
        )
        if ".ftz" in ptx:
            raise SystemExit(f"the {fmt.name} dequantize kernel flushes subnormals to zero")
    for from_end in (False, True):
        compile_kernel(slot_ids._request_slots, 4, PAGE_SIZE=64, FROM_END=from_end, ROWS=512)
    compile_kernel(combine._combine, 4, RATIO=4, TOPK=512, WINDOW=128, TOKENS=8, COLUMNS=128)
    for ratio in (0, 128):
        compile_kernel(
            combine._combine, 4, topk_indices_ptr=None, RATIO=ratio, TOPK=0, WINDOW=128, TOKENS=8, COLUMNS=128
        )
    compile_kernel(indexer_metadata._metadata, 8, SPLIT=256, TILES=128, COLUMNS=32)
    print("compiled")


if __name__ == "__main__":
    main()
