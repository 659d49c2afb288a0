"""The timed parts of a candidate: how often each runs, what its time depends on, and whose kernel runs it.

Kernels run stages, the sweep times them one by one, and the fit adds their curves up: these values are what the three
share. Which candidate has which of them stands in :mod:`mla_tune.sites.candidates`. Standard library and msgspec.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from mla_tune.sites.provider import OWN
from mla_tune.sites.site import Site


class Amortization(StrEnum):
    """How often a stage runs in one forward of a model."""

    PER_LAYER = "per_layer"
    """In every layer."""
    PER_LAYER_TYPE = "per_layer_type"
    """Once; all layers of the same type use its result."""
    PER_FORWARD = "per_forward"
    """Once; all layers of the forward use its result."""


class Law(StrEnum):
    """What a stage's time depends on. The formulas are in :mod:`mla_tune.fit.bases`, one for each of these."""

    WORKSPACE_ATTENTION = "workspace_attention"
    """Sparse prefill over a workspace of all rows: one block a query and 64 heads, in waves."""
    SELECTED_ATTENTION = "selected_attention"
    """The same over a workspace of the selected rows."""
    PAGED_ATTENTION = "paged_attention"
    """Split-KV kernel over the cache, one batch entry a query: a schedule shares its tiles out."""
    ONE_ENTRY_ATTENTION = "one_entry_attention"
    """The same with one batch entry for all queries: as many parts a query as there are SMs for it, in waves."""
    SCHEDULE = "schedule"
    """One block that walks over all rows."""
    TOPK_TRANSFORM = "topk_transform"
    COMPRESSED_ROWS = "compressed_rows"
    WINDOW_ROWS = "window_rows"
    SELECTED_ROWS = "selected_rows"
    PREPARE = "prepare"
    MARK = "mark"
    COMPACT = "compact"
    WINDOW_IDS = "window_ids"
    COMBINE = "combine"
    WHOLE = "whole"
    """A whole timing that stands for stages which nobody timed."""


class KernelSource(StrEnum):
    """Who wrote the kernel of a stage, where it isn't this project."""

    FLASH_MLA = "flash_mla"
    DEEP_GEMM = "deep_gemm"


class Stage(msgspec.Struct, frozen=True):
    """A timed part of a candidate. ``name`` is the ``part`` of its measurements."""

    name: str
    amortization: Amortization
    law: Law = Law.WHOLE
    source: KernelSource | None = None
    """Whose kernel runs it; None for this project's own."""
    launches: tuple[str, ...] = ()
    """Names of our own kernels (:data:`mla_tune.sites.launch_parameters.KERNELS`) that it runs."""
    replaced: bool = False
    """Whether an engine's kernels run it where a site has a provider."""

    def run_by(self, site: Site) -> str:
        """Whose kernel runs it at ``site``: ``own``, ``flash_mla``, ``deep_gemm``, or as ``sglang 0.5.23``."""
        if self.source is not None:
            return self.source.value
        return str(site.provider) if site.provider is not None and self.replaced else OWN

    def own_kernels(self, site: Site) -> tuple[str, ...]:
        """Those of :attr:`launches` that run at ``site``: none where an engine's kernels stand in for them."""
        return self.launches if self.run_by(site) == OWN else ()
