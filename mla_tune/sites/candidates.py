"""The candidates: every way that this project knows to serve a site, as values.

A candidate carries all that distinguishes it: its stages with their laws at every layer type that it serves, what memory it
takes, whether it reads the paged cache as it is, which kernel library it calls, and which engines' kernels can run it. Code
asks these properties and never compares names; names are for files, messages and the command line. Which engine takes which
candidate by default stands in :mod:`mla_tune.sites.engines`. Standard library and msgspec: a serving process imports this.
"""

from __future__ import annotations

import msgspec

from mla_tune.errors import UsageError
from mla_tune.sites.provider import SGLANG
from mla_tune.sites.site import LayerType, Site, SiteName
from mla_tune.sites.stages import Amortization, KernelSource, Law, Stage

_FORWARD, _TYPE, _LAYER = Amortization.PER_FORWARD, Amortization.PER_LAYER_TYPE, Amortization.PER_LAYER
StagesByLayer = tuple[tuple[LayerType, tuple[Stage, ...]], ...]


class Buffers(msgspec.Struct, frozen=True):
    """What an attention candidate keeps beside its inputs and output; bytes in :mod:`mla_tune.fit.workspace_bytes`."""

    partials: int = 0
    """float32 partial results of each query and head that a merge reads; a split-KV kernel's."""
    rows: bool = False
    """A bf16 row for every dequantized cache row, with the index matrix of the sparse prefill kernel."""
    slots: bool = False
    """Of every such row the slot that it came from."""
    selected: bool = False
    """Rows that some query selects only, with a mark and a place for every row that could be."""


class Candidate(msgspec.Struct, frozen=True):
    """One way to serve a site."""

    name: str
    site: SiteName
    stages_by_layer: StagesByLayer
    """The layer types that it serves, each with the stages there in running order, those of a whole forward first."""
    library: KernelSource | None
    """Kernel library that it cannot run without; None for this project's kernels alone."""
    providers: tuple[str, ...] = ()
    """Providers with kernels of their own for it, see :class:`mla_tune.sites.provider.Provider`."""
    paged: bool = False
    """Whether it reads the paged cache in place, rather than a workspace."""
    one_entry: bool = False
    """Whether all query tokens of a forward are one batch entry of its kernel, rather than an entry each."""
    buffers: Buffers | None = None
    """None for what is no attention."""

    def serves(self, site: Site) -> bool:
        """Whether it can be taken at ``site``; with a provider, whether that engine's kernels can."""
        if site.name is not self.site or site.layer not in dict(self.stages_by_layer):
            return False
        return site.provider is None or site.provider.name in self.providers

    def stages(self, site: Site) -> tuple[Stage, ...]:
        """Its stages at ``site``, in running order; those of a whole forward come first."""
        found = dict(self.stages_by_layer)[site.layer]
        if site.name is not SiteName.PREFILL_ATTENTION or not _transforms(site):
            return found
        shared = sum(stage.amortization is not Amortization.PER_LAYER for stage in found)
        return (*found[:shared], TOPK_TRANSFORM, *found[shared:])

    def own_kernels(self, site: Site) -> tuple[str, ...]:
        """Our own kernels (:data:`mla_tune.sites.launch_parameters.KERNELS`) that it runs at ``site``, sorted."""
        return tuple(sorted({name for stage in self.stages(site) for name in stage.own_kernels(site)}))

    def __str__(self) -> str:
        return self.name


def _transforms(site: Site) -> bool:
    return site.provider is not None and site.provider.transforms and site.topk is not None


TOPK_TRANSFORM = Stage("topk_transform", _LAYER, Law.TOPK_TRANSFORM, replaced=True)
"""An engine's selection of the top-k scores as the path wants it, rows or slots; ours takes the selection as given."""

_WINDOW_IDS = Stage("window_ids", _FORWARD, Law.WINDOW_IDS, launches=("slot_ids",))
_ROW_IDS = Stage("row_ids", _TYPE, Law.COMPRESSED_ROWS, launches=("slot_ids",))
_PREPARE = Stage("prepare", _LAYER, Law.PREPARE, launches=("prepare",))
"""One launch for what the layer dequantizes and, in c4a, combines; it looks the slots up itself."""
_MARK = Stage("mark", _LAYER, Law.MARK, launches=("select",))
_COMPACT = Stage("compact", _LAYER, Law.COMPACT, launches=("select",))
# Only c4a combines in every layer: its selection is the indexer's, new in each; the others depend on the shape alone.
_COMBINE_ONCE = Stage("combine", _TYPE, Law.COMBINE, launches=("combine_all",), replaced=True)
_COMBINE_EACH = Stage("combine", _LAYER, Law.COMBINE, launches=("combine_topk",), replaced=True)


def _dequantize(part: str, law: Law, layer: LayerType, *, replaced: bool = True) -> Stage:
    kernel = "dequantize_dsa" if layer is LayerType.DSA else "dequantize_v4"
    return Stage(f"dequantize_{part}", _LAYER, law, launches=(kernel,), replaced=replaced)


def _attention(law: Law) -> Stage:
    return Stage("attention", _LAYER, law, KernelSource.FLASH_MLA)


_OVER_ROWS = _attention(Law.WORKSPACE_ATTENTION)
_OVER_SELECTED = _attention(Law.SELECTED_ATTENTION)
_WINDOW = _dequantize("window", Law.WINDOW_ROWS, LayerType.C4A)
_COMPRESSED = _dequantize("compressed", Law.COMPRESSED_ROWS, LayerType.C4A)
_SELECTED = _dequantize("selected", Law.SELECTED_ROWS, LayerType.C4A, replaced=False)

SPARSE_FWD = Candidate(
    name="sparse_fwd",
    site=SiteName.PREFILL_ATTENTION,
    stages_by_layer=(
        (LayerType.SWA_ONLY, (_WINDOW_IDS, _COMBINE_ONCE, _WINDOW, _OVER_ROWS)),
        (LayerType.C4A, (_WINDOW_IDS, _ROW_IDS, _COMPRESSED, _WINDOW, _COMBINE_EACH, _OVER_ROWS)),
        (LayerType.C128A, (_WINDOW_IDS, _ROW_IDS, _COMBINE_ONCE, _COMPRESSED, _WINDOW, _OVER_ROWS)),
        (LayerType.DSA, (_ROW_IDS, _dequantize("compressed", Law.COMPRESSED_ROWS, LayerType.DSA), _OVER_ROWS)),
    ),
    library=KernelSource.FLASH_MLA,
    providers=(SGLANG,),
    buffers=Buffers(rows=True, slots=True),
)
"""Dequantize the cache rows into a flat bf16 workspace, then FlashMLA's sparse prefill kernel."""

SPARSE_FWD_FUSED = Candidate(
    name="sparse_fwd_fused",
    site=SiteName.PREFILL_ATTENTION,
    stages_by_layer=(
        (LayerType.SWA_ONLY, (_COMBINE_ONCE, _PREPARE, _OVER_ROWS)),
        (LayerType.C4A, (_PREPARE, _OVER_ROWS)),
        (LayerType.C128A, (_COMBINE_ONCE, _PREPARE, _OVER_ROWS)),
        (LayerType.DSA, (_PREPARE, _OVER_ROWS)),
    ),
    library=KernelSource.FLASH_MLA,
    buffers=Buffers(rows=True),
)
"""As ``sparse_fwd``, with one launch a layer before attention instead of up to three."""

SPARSE_FWD_SELECTED = Candidate(
    name="sparse_fwd_selected",
    site=SiteName.PREFILL_ATTENTION,
    stages_by_layer=(  # layer types with a top-k: the others select all or nothing
        (
            LayerType.C4A,
            (_WINDOW_IDS, _ROW_IDS, _MARK, _COMPACT, _SELECTED, _WINDOW, _COMBINE_EACH, _OVER_SELECTED),
        ),
        (
            LayerType.DSA,
            (
                *(_ROW_IDS, _MARK, _COMPACT),
                _dequantize("selected", Law.SELECTED_ROWS, LayerType.DSA, replaced=False),
                *(_COMBINE_EACH, _OVER_SELECTED),
            ),
        ),
    ),
    library=KernelSource.FLASH_MLA,
    buffers=Buffers(rows=True, slots=True, selected=True),
)
"""As ``sparse_fwd``, but only rows that some query selects are dequantized."""

_SCHEDULE = Stage("schedule", _TYPE, Law.SCHEDULE, KernelSource.FLASH_MLA)

WITH_KVCACHE = Candidate(
    name="with_kvcache",
    site=SiteName.PREFILL_ATTENTION,
    stages_by_layer=tuple((layer, (_SCHEDULE, _attention(Law.PAGED_ATTENTION))) for layer in LayerType),
    library=KernelSource.FLASH_MLA,
    providers=(SGLANG,),
    paged=True,
    buffers=Buffers(partials=1),
)
"""FlashMLA's sparse decode kernel over the paged FP8 cache, every query token a batch entry, as SGLang launches it."""

WITH_KVCACHE_MIXED = Candidate(
    name="with_kvcache_mixed",
    site=SiteName.PREFILL_ATTENTION,
    # V4's call takes its lengths per batch entry, so one entry a token: only V3.2 can be one entry.
    stages_by_layer=((LayerType.DSA, (_SCHEDULE, _attention(Law.ONE_ENTRY_ATTENTION))),),
    library=KernelSource.FLASH_MLA,
    paged=True,
    one_entry=True,
    buffers=Buffers(partials=2),
)
"""``with_kvcache`` as vLLM launches it for V3.2: all query tokens of the forward as the sequence of one batch entry."""

DEEP_GEMM = Candidate(
    name="deep_gemm",
    site=SiteName.INDEXER_METADATA,
    stages_by_layer=tuple(
        (layer, (Stage("metadata", _TYPE, Law.SCHEDULE, KernelSource.DEEP_GEMM),)) for layer in LayerType
    ),
    library=KernelSource.DEEP_GEMM,
    providers=(SGLANG,),
)
"""DeepGEMM's schedule kernel, compiled for each bucket of rows and bounded by shared memory."""

JIT = Candidate(
    name="jit",
    site=SiteName.INDEXER_METADATA,
    stages_by_layer=tuple(
        (layer, (Stage("metadata", _TYPE, Law.SCHEDULE, launches=("metadata",), replaced=True),)) for layer in LayerType
    ),
    library=None,
    providers=(SGLANG,),
)
"""A kernel that fits every number of rows: this project's, or an engine's own."""

CANDIDATES: dict[SiteName, tuple[Candidate, ...]] = {
    SiteName.PREFILL_ATTENTION: (SPARSE_FWD, SPARSE_FWD_FUSED, SPARSE_FWD_SELECTED, WITH_KVCACHE, WITH_KVCACHE_MIXED),
    SiteName.INDEXER_METADATA: (DEEP_GEMM, JIT),
}
"""All of them, by site and sorted by name."""


def candidates_at(site: Site) -> tuple[Candidate, ...]:
    """Everything that can serve ``site``, sorted by name; which of them an engine has, its table says."""
    return tuple(candidate for candidate in CANDIDATES[site.name] if candidate.serves(site))


def names_at(site: Site) -> tuple[str, ...]:
    """Names of :func:`candidates_at`."""
    return tuple(candidate.name for candidate in candidates_at(site))


def candidate_at(site: Site, name: str) -> Candidate:
    """The candidate ``name`` at ``site``. Raises :class:`UsageError` for one that does not serve it."""
    for candidate in CANDIDATES[site.name]:
        if candidate.name == name and candidate.serves(site):
            return candidate
    accepted = ", ".join(names_at(site))
    raise UsageError(f"candidate must be one that serves {site.name}: got {name!r}; accepted: {accepted}")


PAGED = frozenset(candidate.name for found in CANDIDATES.values() for candidate in found if candidate.paged)
"""Names of those that read the paged cache in place: what a hook asks of an answer."""


def known_candidate(name: str) -> Candidate | None:
    """The candidate of this name at any site; None for a name that is none of ours."""
    return next((candidate for found in CANDIDATES.values() for candidate in found if candidate.name == name), None)


def stages(site: Site, name: str) -> tuple[Stage, ...]:
    """Stages of the candidate ``name`` at ``site``; see :meth:`Candidate.stages`. Raises :class:`UsageError`."""
    return candidate_at(site, name).stages(site)


def split_stages(site: Site) -> tuple[Stage, ...]:
    """Stages of a batch that both attention candidates share, in running order; ``gather`` is not always there."""
    parts = [
        msgspec.structs.replace(stage, name=f"{candidate.name}.{stage.name}")
        for candidate in (SPARSE_FWD, WITH_KVCACHE)
        for stage in candidate.stages(site)
    ]
    return (Stage("gather", Amortization.PER_LAYER), *parts, Stage("merge", Amortization.PER_LAYER))
