"""The two FP8 formats of a paged KV cache, as FlashMLA reads them, and a quantizer that writes them.

A cache is a uint8 tensor ``(num_pages, page_bytes)``. A *slot* names one row of it: ``page * page_size + offset``.

V4 (584 B a token): a page holds ``page_size * 576`` data bytes (448 e4m3 values, then 64 bf16 rotary values a token),
then ``page_size * 8`` scale bytes (7 exponents and 1 pad byte a token), and is padded to a multiple of 576 B.
A value is ``e4m3 * 2**(scale - 127)``; scale 255 is NaN, scale 0 is 2**-127.

DSA (656 B a token, V3.2): 512 e4m3 values, 4 float32 scales (one per 128 values), 64 bf16 rotary values. The quantizer
rounds these scales up to powers of two as well: on SM100 some builds of FlashMLA truncate a float32 scale to its exponent,
so that only such scales give the same values in every build.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_tune.errors import UsageError
from mla_tune.sites.site import LayerType

ROPE_DIM = 64
_NAN_BYTE = 0xFF
"""NaN in every part of a row: as e4m3, as an exponent, and repeated as bf16 and as float32."""


@dataclass(frozen=True, slots=True, eq=False)  # two objects in all: a launch looks constants up by them
class KVFormat:
    """Byte layout of one cached token. Values are grouped; each group of ``group_size`` e4m3 values has one scale."""

    name: str
    nope_dim: int
    """e4m3 values a token; the 64 bf16 rotary values come on top."""
    group_size: int
    scale_bytes: int
    """Bytes of all scales of one token, padding included."""
    exponent_scales: bool
    """V4: scales are single exponent bytes behind the page's data. Otherwise float32, between values and rotary part."""
    page_multiple: int
    """A page is padded to a multiple of so many bytes."""

    @property
    def head_dim(self) -> int:
        """Values of one token once dequantized."""
        return self.nope_dim + ROPE_DIM

    @property
    def num_groups(self) -> int:
        """Scales of one token."""
        return self.nope_dim // self.group_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token, page padding left out."""
        return self.nope_dim + self.scale_bytes + 2 * ROPE_DIM

    @property
    def data_stride(self) -> int:
        """Bytes from one token's values to the next one's in a page."""
        return self.bytes_per_token - (self.scale_bytes if self.exponent_scales else 0)

    @property
    def rope_offset(self) -> int:
        """Bytes from a token's first value to its rotary part."""
        return self.data_stride - 2 * ROPE_DIM

    @property
    def scale_stride(self) -> int:
        """Bytes from one token's scales to the next one's in a page."""
        return self.scale_bytes if self.exponent_scales else self.data_stride

    def scale_base(self, page_size: int) -> int:
        """Bytes from the start of a page to the scales of its first token."""
        return page_size * self.data_stride if self.exponent_scales else self.nope_dim

    def page_bytes(self, page_size: int) -> int:
        """Bytes of one page of ``page_size`` tokens, padding included."""
        return -(-page_size * self.bytes_per_token // self.page_multiple) * self.page_multiple


V4 = KVFormat("v4", nope_dim=448, group_size=64, scale_bytes=8, exponent_scales=True, page_multiple=576)
DSA = KVFormat("dsa", nope_dim=512, group_size=128, scale_bytes=16, exponent_scales=False, page_multiple=656)


def kv_format(layer: LayerType) -> KVFormat:
    """The format of a layer's caches."""
    return DSA if layer is LayerType.DSA else V4


@dataclass(frozen=True, slots=True)
class PageParts:
    """Views into a cache; writing to them writes the cache."""

    nope: torch.Tensor  # (num_pages, page_size, nope_dim) uint8
    scales: torch.Tensor  # (num_pages, page_size, scale_bytes) uint8
    rope: torch.Tensor  # (num_pages, page_size, 128) uint8


@dataclass(frozen=True, slots=True)
class PagedSelection:
    """Rows of one paged cache that each query attends to; the V4 KV-cache path takes two (window and selection)."""

    cache: torch.Tensor  # (num_pages, page_bytes) uint8
    fmt: KVFormat
    page_size: int
    slot_ids: torch.Tensor  # (num_qo_tokens, width) int32, -1 = skip
    lengths: torch.Tensor  # (num_qo_tokens,) int32, columns of slot_ids that count


def check_cache(cache: torch.Tensor, fmt: KVFormat, page_size: int) -> None:
    """Raise :class:`UsageError` unless ``cache`` is contiguous uint8 ``(num_pages, fmt.page_bytes(page_size))``."""
    page_bytes = fmt.page_bytes(page_size)
    if cache.dtype is torch.uint8 and cache.dim() == 2 and cache.shape[1] == page_bytes and cache.is_contiguous():
        return
    raise UsageError(
        f"a {fmt.name} cache of page size {page_size} must be contiguous uint8 (num_pages, {page_bytes}): "
        f"got {cache.dtype} {tuple(cache.shape)} with strides {cache.stride()}; quantize_k_cache makes one"
    )


def page_parts(cache: torch.Tensor, fmt: KVFormat, page_size: int) -> PageParts:
    """Split ``cache`` ``(num_pages, page_bytes)`` uint8 into views of its values, scales and rotary parts."""
    check_cache(cache, fmt, page_size)
    page_bytes = fmt.page_bytes(page_size)

    def view(offset: int, token_stride: int, width: int) -> torch.Tensor:
        size, strides = (cache.shape[0], page_size, width), (page_bytes, token_stride, 1)
        return cache.as_strided(size, strides, cache.storage_offset() + offset)

    return PageParts(
        nope=view(0, fmt.data_stride, fmt.nope_dim),
        scales=view(fmt.scale_base(page_size), fmt.scale_stride, fmt.scale_bytes),
        rope=view(fmt.rope_offset, fmt.data_stride, 2 * ROPE_DIM),
    )


def paged_view(cache: torch.Tensor, fmt: KVFormat, page_size: int) -> torch.Tensor:
    """The strided view ``(num_pages, page_size, 1, bytes_per_token)`` uint8 of ``cache`` that FlashMLA takes.

    Only its shape and page stride mean something for V4, whose scales do not lie beside their tokens.
    """
    check_cache(cache, fmt, page_size)
    size = (cache.shape[0], page_size, 1, fmt.bytes_per_token)
    return cache.as_strided(size, (cache.shape[1], fmt.bytes_per_token, fmt.bytes_per_token, 1))


def quantize_k_cache(values: torch.Tensor, fmt: KVFormat, page_size: int) -> torch.Tensor:
    """Write ``values`` ``(num_tokens, head_dim)`` (finite bf16 or float32) to a new cache, token ``i`` in slot ``i``.

    Returns uint8 ``(ceil(num_tokens / page_size), page_bytes)`` on the same device. Rows of the last page without a
    token are NaN, so that a kernel that reads them shows. Raises :class:`UsageError` on a wrong head dimension.
    """
    if values.dim() != 2 or values.shape[1] != fmt.head_dim:
        raise UsageError(
            f"values of a {fmt.name} cache must be (num_tokens, {fmt.head_dim}): got {tuple(values.shape)}"
        )
    num_pages = -(-values.shape[0] // page_size)
    cache = values.new_full((num_pages, fmt.page_bytes(page_size)), _NAN_BYTE, dtype=torch.uint8)
    parts = page_parts(cache, fmt, page_size)
    pages_at_once = max(1, 65536 // page_size)  # bounds the float32 copies to some hundred MB
    for page in range(0, num_pages, pages_at_once):
        rows = values[page * page_size : (page + pages_at_once) * page_size]
        _write_rows(parts, page, rows, fmt, page_size)
    return cache


def _write_rows(parts: PageParts, first_page: int, rows: torch.Tensor, fmt: KVFormat, page_size: int) -> None:
    groups = rows[:, : fmt.nope_dim].float().reshape(-1, fmt.num_groups, fmt.group_size)
    scales, exponents = _power_of_two_scales(groups.abs().amax(-1))
    stored = torch.nn.functional.pad(exponents, (0, 1)) if fmt.exponent_scales else scales.view(torch.uint8)
    nope = (groups / scales[..., None]).to(torch.float8_e4m3fn).flatten(1).view(torch.uint8)
    rope = rows[:, fmt.nope_dim :].to(torch.bfloat16).contiguous().view(torch.uint8)
    full, rest = divmod(rows.shape[0], page_size)
    for view, data in ((parts.nope, nope), (parts.scales, stored), (parts.rope, rope)):
        view[first_page : first_page + full] = data[: full * page_size].view(full, page_size, data.shape[1])
        if rest:
            view[first_page + full, :rest] = data[full * page_size :]


def _power_of_two_scales(amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales 2**ceil(log2(amax / 448)) as float32, and their biased exponents as uint8."""
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2**exponent, mantissa in [0.5, 1); 448 = 0.875 * 2**9
    biased = (exponent - 8 - (mantissa <= 0.875).int() + 127).clamp(1, 254)  # 1: a float32 power of two, not subnormal
    return (biased.to(torch.int32) << 23).view(torch.float32), biased.to(torch.uint8)
