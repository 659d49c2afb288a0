"""FlashMLA behind one interface, whichever distribution is installed.

Two lineages offer the same two functions. ``sgl-flash-mla`` ships two binaries and a ``use_legacy`` switch between them.
The legacy one has the SM90 kernels, and on SM90 and SM100 those for the V3.2 and V4 cache formats. The current one has
SM100 kernels for V4.1's formats. SGLang 0.5.23 passes ``use_legacy=True`` for both functions on every architecture
(``kernels/ops/attention/flash_mla_interface.py``), so that is what runs here: the current binary's sparse prefill also
accepts V4's shapes on SM100, but no engine launches it for them. Upstream's own package has no switch. Which lineage is
installed is read from the signature, not from a version number.

SGLang's own kernels up to its 0.5.22 have a build of the legacy sources, ``sgl_kernel.flash_mla``, whose arguments are in
another order: so all are named. :func:`mla_tune.hardware.builds.flash_mla_package` says which one runs here.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mla_tune.hardware.builds import SGL_KERNEL, flash_mla_package

if TYPE_CHECKING:
    import torch

HEAD_COUNTS = (64, 128)
"""Query heads that the kernels accept; engines pad to the next one."""
ARCHITECTURES = (9, 10)
"""Major compute capabilities with kernels: SM90 and SM100."""
V_DIM = 512
"""Head dimension of the values, for both cache formats."""


@dataclass(frozen=True, slots=True)
class KvCacheCall:
    """Arguments of the KV-cache kernel in this project's words.

    FlashMLA calls the first cache's entries ``indices`` and the second's ``extra_indices``. For V4 the first is the window
    and the second the selection; for V3.2 there is one cache and its entries are the selection.
    """

    q: torch.Tensor  # (num_qo_tokens, h_q, head_dim) bf16
    cache: torch.Tensor  # (pages, page_size, 1, bytes_per_token) uint8 view
    slots: torch.Tensor  # (num_qo_tokens, width) int32
    lengths: torch.Tensor  # (num_qo_tokens,) int32
    extra_cache: torch.Tensor | None
    extra_slots: torch.Tensor | None
    extra_lengths: torch.Tensor | None
    sm_scale: float
    attn_sink: torch.Tensor | None  # (h_q,) float32
    one_entry: bool = False
    """All query tokens as the sequence of one batch entry, instead of an entry each. V3.2 only: V4's lengths are per entry.
    The kernel then splits no context among blocks, and its scheduler has one entry to plan for."""


def module_name() -> str:
    """The module with the two functions that runs here."""
    package = flash_mla_package()
    return f"{package}.flash_mla" if package == SGL_KERNEL else package


def missing() -> str | None:
    """Why FlashMLA cannot be used on this machine at all, in one sentence; None if its module imports."""
    name = module_name()
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # a library that is there but does not load raises the latter
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "install sglang-kernel again" if name.startswith(SGL_KERNEL) else "pip install 'mla-tune[gpu]'"
        return f"{name} cannot be imported ({reason}): {remedy}"
    return None


class FlashMla:
    """The two kernels of the installed distribution, called as SGLang calls them."""

    def __init__(self, major: int, module: ModuleType | None = None) -> None:
        """``major`` is the GPU's major compute capability."""
        self._module: Any = module or importlib.import_module(module_name())
        self._major = major
        parameters = inspect.signature(self._module.flash_mla_sparse_fwd).parameters
        self._switch: dict[str, bool] = {"use_legacy": True} if "use_legacy" in parameters else {}

    def unsupported(self, h_q: int) -> str | None:
        """Why this build cannot serve ``h_q`` query heads on this architecture; None if it can."""
        if self._major not in ARCHITECTURES:
            return f"FlashMLA has kernels for sm90 and sm100; this GPU is sm{self._major}0"
        if h_q not in HEAD_COUNTS:
            return f"FlashMLA takes 64 or 128 query heads, not {h_q}: pad them"
        has_legacy = getattr(self._module, "has_legacy", None)
        if has_legacy is not None and not has_legacy():
            return "this sgl-flash-mla was built without its legacy kernels (sm90, V3.2 and V4 cache formats)"
        return None

    def sparse_fwd(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        indices: torch.Tensor,
        lengths: torch.Tensor,
        sm_scale: float,
        attn_sink: torch.Tensor | None,
    ) -> torch.Tensor:
        """Sparse prefill over a flat workspace: q (n, h_q, d), kv (rows, d), indices (n, width) -> (n, h_q, 512)."""
        out: torch.Tensor = self._module.flash_mla_sparse_fwd(
            q,
            kv.unsqueeze(1),
            indices.unsqueeze(1),
            sm_scale,
            d_v=V_DIM,
            attn_sink=attn_sink,
            topk_length=lengths,
            **self._switch,
        )[0]
        return out

    def new_schedule(self) -> object:
        """An empty schedule. The first :meth:`with_kvcache` fills it; calls of equal shapes and lengths reuse it."""
        return self._module.get_mla_metadata()[0]

    def with_kvcache(self, call: KvCacheCall, schedule: object) -> torch.Tensor:
        """Sparse decode kernel over the paged FP8 cache -> (n, h_q, 512) bf16."""
        tokens = 0 if call.one_entry else 1  # where the new axis goes: (1, n, ...), or (n, 1, ...)
        out: torch.Tensor = self._module.flash_mla_with_kvcache(
            q=call.q.unsqueeze(tokens),
            k_cache=call.cache,
            block_table=None,
            cache_seqlens=None,
            head_dim_v=V_DIM,
            tile_scheduler_metadata=schedule,
            softmax_scale=call.sm_scale,
            is_fp8_kvcache=True,
            indices=call.slots.unsqueeze(tokens),
            attn_sink=call.attn_sink,
            extra_k_cache=call.extra_cache,
            extra_indices_in_kvcache=None if call.extra_slots is None else call.extra_slots.unsqueeze(1),
            # V3.2 refuses a length: there -1 ends a selection.
            topk_length=call.lengths if call.q.shape[2] == V_DIM else None,
            extra_topk_length=call.extra_lengths,
            **self._switch,
        )[0]
        return out.squeeze(tokens)
