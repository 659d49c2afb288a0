"""Timings that others published, to check a model of a GPU against. The only place where such figures stand.

Each says what it covers of our stages, and what had to be assumed where the source is silent. They are compared, never
fitted: a miss is shown as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mla_tune.sites.candidates import SPARSE_FWD, WITH_KVCACHE, Candidate
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import DEEPSEEK_V3_2, DEEPSEEK_V4_FLASH, LayerType, Site, SiteName


@dataclass(frozen=True, slots=True)
class LaunchCount:
    """How often one stage is launched at one shape."""

    site: Site
    candidate: Candidate
    stage: str
    shape: Shape
    count: float


@dataclass(frozen=True, slots=True)
class Published:
    """One published figure."""

    what: str
    sku: str
    published_ms: float
    source: str
    assumed: str
    """What the source doesn't say, or what of it none of our stages covers."""
    launches: tuple[LaunchCount, ...]
    """Empty where no stage covers it."""
    always_splits: bool = False
    """Whether its build's KV-cache kernel splits every query, as the number of its merges says."""


_SGLANG = "sgl-project/sglang#25418"
_VLLM = "vllm-project/vllm#33451"
_LMDEPLOY = "InternLM/lmdeploy#4904"

_CHUNK, _PROMPT, _CHUNKS = 8192, 131072, 5
_SOME_CHUNKS = "which 5 of the prompt's 16 chunks is not said: the mean over all; 16 heads a rank, padded to 64"


def _v4_flash(
    candidate: Candidate, stages: dict[str, Sequence[LayerType]], *, once: bool = False
) -> tuple[LaunchCount, ...]:
    """Launches of five chunks of a 128K prompt of V4-Flash; ``stages`` says which layer types run each of them.

    ``once``: one launch for all layers of a type, rather than one in each.
    """
    model, every = DEEPSEEK_V4_FLASH, range(_CHUNK, _PROMPT + 1, _CHUNK)
    return tuple(
        LaunchCount(
            site=model.site(SiteName.PREFILL_ATTENTION, layer),
            candidate=candidate,
            stage=stage,
            shape=Shape(1, _CHUNK, context),
            count=(1 if once else model.layer_count(layer)) * _CHUNKS / len(every),
        )
        for stage, layers in stages.items()
        for layer in layers
        for context in every
    )


def _v3_sparse_fwd(h_q: int, num_qo_tokens: int, context: int) -> tuple[LaunchCount, ...]:
    site = DEEPSEEK_V3_2.site(SiteName.PREFILL_ATTENTION, LayerType.DSA, h_q)
    return (LaunchCount(site, SPARSE_FWD, "attention", Shape(1, num_qo_tokens, context), 1),)


_SWA, _C4A, _C128A = LayerType.SWA_ONLY, LayerType.C4A, LayerType.C128A
_ALL = (_SWA, _C4A, _C128A)
_PREFILL = "DSv4-Flash, 5 chunks of 8192 of a 128K prompt, 43 layers"
_FULL_TOPK = "every query attends to 2048 entries, gathered from 8192 rows"

PUBLISHED: tuple[Published, ...] = (
    Published(
        what=f"{_PREFILL}: with_kvcache attention (205.89) and its combine (12.36)",
        sku="nvidia-b200",
        published_ms=205.89 + 12.36,
        source=_SGLANG,
        assumed=f"{_SOME_CHUNKS}; our stage holds both kernels; as many merges as attention kernels: it always splits",
        launches=_v4_flash(WITH_KVCACHE, {"attention": _ALL}),
        always_splits=True,
    ),
    Published(
        what=f"{_PREFILL}: with_kvcache metadata",
        sku="nvidia-b200",
        published_ms=9.04,
        source=_SGLANG,
        assumed="15 launches: 3 layer types a chunk",
        launches=_v4_flash(WITH_KVCACHE, {"schedule": _ALL}, once=True),
        always_splits=True,
    ),
    Published(
        what=f"{_PREFILL}: sparse_fwd attention",
        sku="nvidia-b200",
        published_ms=146.78,
        source=_SGLANG,
        assumed=_SOME_CHUNKS,
        launches=_v4_flash(SPARSE_FWD, {"attention": _ALL}),
    ),
    Published(
        what=f"{_PREFILL}: dequantize",
        sku="nvidia-b200",
        published_ms=5.22,
        source=_SGLANG,
        assumed=f"{_SOME_CHUNKS}; SGLang's kernel, where ours is timed",
        launches=_v4_flash(SPARSE_FWD, {"dequantize_window": _ALL, "dequantize_compressed": (_C4A, _C128A)}),
    ),
    Published(
        what=f"{_PREFILL}: combine of indices",
        sku="nvidia-b200",
        published_ms=3.95,
        source=_SGLANG,
        assumed="launches not said: once a layer of c4a, once a chunk for the others; SGLang's kernel, where ours is timed",
        launches=(
            *_v4_flash(SPARSE_FWD, {"combine": (_C4A,)}),
            *_v4_flash(SPARSE_FWD, {"combine": (_SWA, _C128A)}, once=True),
        ),
    ),
    Published(
        what=f"{_PREFILL}: window ids",
        sku="nvidia-b200",
        published_ms=0.19,
        source=_SGLANG,
        assumed="once a chunk; SGLang's kernel, where ours is timed",
        launches=_v4_flash(SPARSE_FWD, {"window_ids": (_C4A,)}, once=True),
    ),
    Published(
        what=f"{_PREFILL}: top-k transform on the with_kvcache path",
        sku="nvidia-b200",
        published_ms=14.57,
        source=_SGLANG,
        assumed="belongs to the indexer: no stage of ours",
        launches=(),
    ),
    Published(
        what=f"{_PREFILL}: top-k transform on the sparse_fwd path, which writes raw positions too",
        sku="nvidia-b200",
        published_ms=21.47,
        source=_SGLANG,
        assumed="belongs to the indexer: no stage of ours",
        launches=(),
    ),
    Published(
        what="sparse_fwd attention, d 576, topk 2048, 128 heads, 512 query tokens",
        sku="nvidia-b200",
        published_ms=0.201,
        source=_VLLM,
        assumed=f"SM100 is a B200; {_FULL_TOPK}",
        launches=_v3_sparse_fwd(128, 512, 8192),
    ),
    Published(
        what="sparse_fwd attention, d 576, topk 2048, 128 heads, 1024 query tokens",
        sku="nvidia-b200",
        published_ms=0.394,
        source=_VLLM,
        assumed=f"SM100 is a B200; {_FULL_TOPK}",
        launches=_v3_sparse_fwd(128, 1024, 8192),
    ),
    Published(
        what="sparse_fwd attention, topk 2048, padded to 64 heads, 64 query tokens",
        sku="nvidia-h200",
        published_ms=0.069,
        source=_LMDEPLOY,
        assumed=_FULL_TOPK,
        launches=_v3_sparse_fwd(64, 64, 8192),
    ),
    Published(
        what="sparse_fwd attention, topk 2048, padded to 64 heads, 2119 query tokens",
        sku="nvidia-h200",
        published_ms=1.057,
        source=_LMDEPLOY,
        assumed=_FULL_TOPK,
        launches=_v3_sparse_fwd(64, 2119, 8192),
    ),
)
