"""Candidates of ``indexer_metadata``: DeepGEMM's schedule kernel, compiled per bucket of rows, and the shape-agnostic one.

Both give a (num_sms + 1, 2) int32 table that DeepGEMM's paged MQA logits kernel reads; :mod:`.indexer_metadata` says how
far the two may differ. On the CPU ``deep_gemm`` is our algorithm in torch: a prefix sum, then one binary search per SM.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import lru_cache

import torch

from mla_tune.errors import MissingPackageError
from mla_tune.kernels.adapters import sglang_kernels
from mla_tune.kernels.indexer_metadata import BLOCK_KV, paged_mqa_logits_metadata, paged_mqa_logits_metadata_serial
from mla_tune.kernels.prepared import BoundStage, Output, PreparedPath
from mla_tune.sites.candidates import Candidate
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, Launches
from mla_tune.sites.site import Site
from mla_tune.sites.stages import KernelSource

_INDICES_FROM = (0, 2, 5)


@lru_cache(maxsize=1)
def deep_gemm_missing() -> str | None:
    """Why DeepGEMM cannot be used, in one sentence; None if its module imports. Asked once: a failed import is slow."""
    try:
        module = importlib.import_module(KernelSource.DEEP_GEMM)
    # DeepGEMM builds itself on import if it must: assertions and subprocess errors are then possible too.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"deep_gemm cannot be imported ({reason}): pip install 'mla-tune[gpu]'"
    if not hasattr(module, "get_paged_mqa_logits_metadata"):
        return "this deep_gemm has no get_paged_mqa_logits_metadata: install sgl-deep-gemm 0.1.2 or later"
    return None


def prepare(
    context_lens: torch.Tensor, site: Site, candidate: Candidate, num_sms: int, launches: Launches = DEFAULT_LAUNCHES
) -> PreparedPath:
    """Bind ``candidate`` to ``context_lens`` (num_qo_tokens, 1) int32."""
    (stage,) = candidate.stages(site)
    output = Output()
    if site.provider is not None and stage.replaced:
        make = _provided(context_lens, num_sms)
    else:
        make = _maker(context_lens, stage.source, num_sms, launches)

    def run() -> None:
        output.tensor = make()

    return PreparedPath(candidate=candidate.name, stages=(BoundStage(stage, run),), output=output)


def _maker(
    context_lens: torch.Tensor, source: KernelSource | None, num_sms: int, launches: Launches
) -> Callable[[], torch.Tensor]:
    if source is None:
        config = launches.metadata(context_lens.numel())
        return lambda: paged_mqa_logits_metadata(context_lens, BLOCK_KV, num_sms, config=config)
    if context_lens.device.type == "cpu":
        return lambda: paged_mqa_logits_metadata_serial(context_lens, BLOCK_KV, num_sms)
    module = importlib.import_module(KernelSource.DEEP_GEMM)
    major = torch.cuda.get_device_capability(context_lens.device)[0]
    indices = request_indices(str(getattr(module, "__version__", "")), major, context_lens)
    metadata = module.get_paged_mqa_logits_metadata
    if indices is None:
        return lambda: metadata(context_lens, BLOCK_KV, num_sms)
    return lambda: metadata(context_lens, BLOCK_KV, num_sms, indices)


def request_indices(release: str, major: int, context_lens: torch.Tensor) -> torch.Tensor | None:
    """The fourth argument that DeepGEMM ``release`` needs on this architecture, ``(rows,)`` int32; None for none.

    It names the request of each row. From 0.2.5 on the SM100 kernel needs it, to group the rows of a request; each row is
    its own here, as in an engine's call without the argument. Every release has the parameter, but elsewhere it selects a
    kernel that pairs rows and holds fewer of them, so it is passed only where it must be.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:3])
    if major != 10 or numbers < _INDICES_FROM:
        return None
    return torch.arange(context_lens.shape[0], dtype=torch.int32, device=context_lens.device)


def _provided(context_lens: torch.Tensor, num_sms: int) -> Callable[[], torch.Tensor]:
    """SGLang's kernel in the place of ours: it gives the same table."""
    bound = sglang_kernels.metadata(context_lens, num_sms)
    if isinstance(bound, sglang_kernels.Missing):
        raise MissingPackageError(bound.reason)
    run = bound.run
    return lambda: run()[0]
