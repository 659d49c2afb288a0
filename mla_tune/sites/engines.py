"""What each serving engine would do without us, and what it can do instead: the two things that make a table its own.

Most tables serve every engine: for V4 prefill vLLM launches the same kernels over the same shapes as SGLang and takes the
same one by default. For V3.2 it does not: SGLang gives the KV-cache kernel one batch entry per query token, vLLM one entry
with all of them, which is another launch with another cost. Standard library only.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from mla_tune.sites.site import WITH_KVCACHE_MIXED, LayerType, ModelConfig, SiteName, incumbent


class Engine(StrEnum):
    """An engine, or one that chooses in a way of its own."""

    SGLANG = "sglang"
    """SGLang 0.5.23. Its tables also serve any engine that has none of its own at a site."""
    VLLM = "vllm"
    """vLLM 0.33.0 with at least :data:`FEW_HEADS` query heads a rank."""
    VLLM_FEW_HEADS = "vllm-few-heads"
    """vLLM 0.33.0 with fewer: it then takes the KV-cache kernel for all tokens of V3.2."""
    OWN = "mla-tune"
    """Whoever runs this project's kernels: SGLang's choice, and the variants of ``sparse_fwd`` that no engine has."""


FEW_HEADS = 32
"""Query heads a rank below which vLLM 0.33.0 changes its own choice for V3.2 (its ``MIN_HEADS_FOR_BF16_PREFILL``)."""


class EngineChoice(msgspec.Struct, frozen=True):
    """One engine at one site."""

    incumbent: str
    """What it takes today without us."""
    candidates: tuple[str, ...]
    """What it can take, sorted."""


_SHARED = ("sparse_fwd", "with_kvcache")
VARIANTS = ("sparse_fwd_fused", "sparse_fwd_selected")
"""What only :attr:`Engine.OWN` can take."""
_VLLM_DSA = ("sparse_fwd", WITH_KVCACHE_MIXED)
_VLLM = {
    Engine.VLLM: EngineChoice("sparse_fwd", _VLLM_DSA),
    Engine.VLLM_FEW_HEADS: EngineChoice(WITH_KVCACHE_MIXED, _VLLM_DSA),
}


def engine_choice(engine: Engine, name: SiteName, layer: LayerType) -> EngineChoice:
    """What ``engine`` takes, and can take, at a site of ``layer``."""
    if name is SiteName.INDEXER_METADATA:
        return EngineChoice(incumbent(name, layer), ("deep_gemm", "jit"))
    if engine in _VLLM and layer is LayerType.DSA:
        return _VLLM[engine]
    variants = VARIANTS if engine is Engine.OWN else ()
    return EngineChoice(incumbent(name, layer), tuple(sorted((*_SHARED, *variants))))


def table_engine(engine: Engine, name: SiteName, model: ModelConfig) -> Engine:
    """The engine whose tables ``engine`` reads for ``model``: its own where it chooses otherwise than SGLang does."""
    layers = model.site_layers(name)
    differs = any(engine_choice(engine, name, layer) != engine_choice(Engine.SGLANG, name, layer) for layer in layers)
    return engine if differs else Engine.SGLANG


def engine_heads(engine: Engine, model: ModelConfig) -> tuple[int, ...]:
    """Padded head counts that ``engine`` reaches: fewer than :data:`FEW_HEADS` are padded to the model's least."""
    return (min(model.heads),) if engine is Engine.VLLM_FEW_HEADS else model.heads


def model_incumbent(engine: Engine, name: SiteName, model: ModelConfig) -> str:
    """What ``engine`` takes today for ``model``; all its layer types agree."""
    return engine_choice(engine, name, model.site_layers(name)[0]).incumbent
