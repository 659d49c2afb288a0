"""What each serving engine would do without us, and what it can do instead: the two things that make a table its own.

Most tables serve every engine: for V4 prefill vLLM launches the same kernels over the same shapes as SGLang and takes the
same one by default. For V3.2 it does not: SGLang gives the KV-cache kernel one batch entry per query token, vLLM one entry
with all of them, which is another launch with another cost. Standard library and msgspec only.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

import msgspec

from mla_tune.sites.candidates import (
    DEEP_GEMM,
    JIT,
    SPARSE_FWD,
    SPARSE_FWD_FUSED,
    SPARSE_FWD_SELECTED,
    WITH_KVCACHE,
    WITH_KVCACHE_MIXED,
    Candidate,
)
from mla_tune.sites.site import LayerType, ModelConfig, Site, SiteName


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


SM100 = "sm100"
"""As :mod:`mla_tune.hardware.datasheet` names it, which a server does not load."""


class EngineChoice(msgspec.Struct, frozen=True):
    """One engine at one site."""

    default: Candidate
    """What it takes today without us: the choice that a tie or an unmeasured range keeps."""
    options: tuple[Candidate, ...]
    """What it can take, sorted by name."""

    @property
    def incumbent(self) -> str:
        """Name of :attr:`default`."""
        return self.default.name

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of :attr:`options`."""
        return tuple(candidate.name for candidate in self.options)


VARIANTS = (SPARSE_FWD_FUSED, SPARSE_FWD_SELECTED)
"""What only :attr:`Engine.OWN` can take."""
_SHARED = (SPARSE_FWD, WITH_KVCACHE)

_OWN = {
    layer: tuple(c for c in (SPARSE_FWD, *VARIANTS, WITH_KVCACHE) if layer in dict(c.stages_by_layer))
    for layer in LayerType
}
"""By layer type: only those with a top-k have rows to leave out."""
_ONE_ENTRY = (SPARSE_FWD, WITH_KVCACHE_MIXED)

# SGLang 0.5.23 on CUDA: V4 always takes the workspace, V3.2 with an FP8 cache on Hopper always the cache in place, and the
# indexer's metadata always comes from the JIT kernel.
_METADATA = EngineChoice(JIT, (DEEP_GEMM, JIT))
_V4 = EngineChoice(SPARSE_FWD, _SHARED)
_V4_OWN = {layer: EngineChoice(SPARSE_FWD, _OWN[layer]) for layer in LayerType if layer.has_window}
_V3_2 = {
    Engine.SGLANG: EngineChoice(WITH_KVCACHE, _SHARED),
    Engine.OWN: EngineChoice(WITH_KVCACHE, _OWN[LayerType.DSA]),
    Engine.VLLM: EngineChoice(SPARSE_FWD, _ONE_ENTRY),
    Engine.VLLM_FEW_HEADS: EngineChoice(WITH_KVCACHE_MIXED, _ONE_ENTRY),
}


def engine_choice(engine: Engine, name: SiteName, layer: LayerType) -> EngineChoice:
    """What ``engine`` takes, and can take, at a site of ``layer``. The only place that defines an engine's default."""
    if name is SiteName.INDEXER_METADATA:
        return _METADATA
    if layer is LayerType.DSA:
        return _V3_2[engine]
    return _V4_OWN[layer] if engine is Engine.OWN else _V4


def table_engine(engine: Engine, name: SiteName, model: ModelConfig) -> Engine:
    """The engine whose tables ``engine`` reads for ``model``: its own where it chooses otherwise than SGLang does."""
    layers = model.site_layers(name)
    differs = any(engine_choice(engine, name, layer) != engine_choice(Engine.SGLANG, name, layer) for layer in layers)
    return engine if differs else Engine.SGLANG


SM100_DSA_DEFAULT = "trtllm"
"""SGLang 0.5.23's own ``--dsa-prefill-backend`` for V3.2 with an FP8 cache on SM100 (``arg_groups/overrides.py``).

It is no candidate: our hook leaves it alone. Only where the user asks for ``flashmla_auto`` does the choice arise there,
and SGLang's own rule then takes ``sparse_fwd`` below 512 context tokens a query token. A table's incumbent is
``with_kvcache`` all the same, which is what that rule takes elsewhere; outside of a table's measured range the hook leaves
the rule's answer as it is."""
_SM100_SPARSE_HEADS = 128


def launched_site(engine: Engine, site: Site, candidate: str, architecture: str | None) -> Site:
    """The site whose kernels ``engine`` launches for ``candidate`` at ``site``: its heads may be padded further.

    SGLang 0.5.23 pads V3.2's queries to 128 heads for the workspace path on SM100 (``dsa_backend.py``, line 2824) and to
    64 or 128 for the cache path; vLLM 0.33.0 pads to 64. ``architecture`` is as the datasheets name it.
    """
    pads = (
        architecture == SM100
        and engine in (Engine.SGLANG, Engine.OWN)
        and site.layer is LayerType.DSA
        and candidate == SPARSE_FWD.name
        and site.h_q is not None
    )
    return replace(site, h_q=max(site.h_q or 0, _SM100_SPARSE_HEADS)) if pads else site


def engine_heads(engine: Engine, model: ModelConfig) -> tuple[int, ...]:
    """Padded head counts that ``engine`` reaches: fewer than :data:`FEW_HEADS` are padded to the model's least."""
    return (min(model.heads),) if engine is Engine.VLLM_FEW_HEADS else model.heads


def model_incumbent(engine: Engine, name: SiteName, model: ModelConfig) -> str:
    """What ``engine`` takes today for ``model``; all its layer types agree."""
    return engine_choice(engine, name, model.site_layers(name)[0]).incumbent
