"""How candidates look, on the page and in the picture: a colour and a sign each, so that neither alone has to be seen."""

from __future__ import annotations

import msgspec

from mla_tune.hardware.sku import CPU
from mla_tune.sites.candidates import (
    DEEP_GEMM,
    JIT,
    SPARSE_FWD,
    SPARSE_FWD_FUSED,
    SPARSE_FWD_SELECTED,
    WITH_KVCACHE,
    WITH_KVCACHE_MIXED,
)


class Look(msgspec.Struct, frozen=True):
    """One candidate's colour on light and on dark ground, and its sign as plotly and as matplotlib name it."""

    light: str
    dark: str
    symbol: str
    marker: str


# Okabe and Ito's palette, which colour-blind readers tell apart; lighter shades of it on dark ground.
_LOOKS = {
    WITH_KVCACHE.name: Look("#0072B2", "#56B4E9", "circle", "o"),
    WITH_KVCACHE_MIXED.name: Look("#0072B2", "#56B4E9", "circle", "o"),
    SPARSE_FWD.name: Look("#D55E00", "#FF8A3D", "square", "s"),
    SPARSE_FWD_FUSED.name: Look("#9A6A00", "#F0C14B", "diamond", "D"),
    SPARSE_FWD_SELECTED.name: Look("#A0447E", "#E79CC6", "triangle-up", "^"),
    JIT.name: Look("#007A5A", "#2BC49A", "square", "s"),
    DEEP_GEMM.name: Look("#0072B2", "#56B4E9", "circle", "o"),
}
_OTHERS = (
    Look("#4D4D4D", "#C0C0C0", "cross", "P"),
    Look("#5B3FA0", "#B7A1F0", "hexagon", "h"),
    Look("#8C1D1D", "#F09090", "star", "*"),
)

_MODELS = {
    "deepseek-v4-flash": "DeepSeek-V4-Flash",
    "deepseek-v4-pro": "DeepSeek-V4-Pro",
    "deepseek-v3.2": "DeepSeek-V3.2",
}
_SITES = {
    "prefill_attention": "Prefill attention",
    "indexer_metadata": "Indexer metadata",
    "indexer_logits": "Indexer logits",
    "head_padding": "Head padding",
}


def look(candidate: str) -> Look:
    """How ``candidate`` looks; one that has no look of its own gets one of a few by its name."""
    return _LOOKS.get(candidate) or _OTHERS[sum(candidate.encode()) % len(_OTHERS)]


def model_words(model: str, h_q: int | None) -> str:
    """``DeepSeek-V3.2, 128 heads``."""
    name = _MODELS.get(model, model)
    return name if h_q is None else f"{name}, {h_q} heads"


def device_words(sku: str) -> str:
    """``an NVIDIA H200``."""
    return "a CPU" if sku == CPU else f"an NVIDIA {sku.removeprefix('nvidia-').upper()}"


def unit_words(sku: str) -> str:
    """What a device is counted in."""
    return "threads" if sku == CPU else "SMs"


def site_words(site: str) -> str:
    """``Prefill attention``."""
    return _SITES.get(site, site.replace("_", " ").capitalize())


def tokens(count: float) -> str:
    """``1024`` as ``1K``, ``134217728`` as ``128M``; other counts as they are, with a point where they are large."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if count >= size:
            scaled = count / size
            return f"{scaled:.0f}{unit}" if scaled == int(scaled) else f"{scaled:.3g}{unit}"
    return f"{count:.0f}"


def request_words(num_reqs: tuple[int, int]) -> str:
    """``1 request``, ``2 to 5 requests``."""
    low, high = num_reqs
    return ("1 request" if low == 1 else f"{low} requests") if low == high else f"{low} to {high} requests"
