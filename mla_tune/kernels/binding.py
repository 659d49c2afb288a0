"""Candidates on this device: why one cannot serve a shape here, and its stages bound to real inputs.

:func:`add` brings further attention candidates into this process, under names of their own: a kernel under development,
or one that is broken on purpose. They are measured like any other; a policy names only the project's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from mla_tune.kernels import indexer, sparse_fwd, sparse_fwd_fused, sparse_fwd_selected, split_batch, with_kvcache
from mla_tune.kernels.adapters import flash_mla, sglang_kernels
from mla_tune.kernels.inputs import AttentionInputs
from mla_tune.kernels.prepared import PreparedPath
from mla_tune.sites.candidates import (
    SPARSE_FWD,
    SPARSE_FWD_FUSED,
    SPARSE_FWD_SELECTED,
    candidate_at,
    known_candidate,
)
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, Launches
from mla_tune.sites.site import Site
from mla_tune.sites.stages import KernelSource


@dataclass(frozen=True, slots=True)
class Device:
    """Where candidates run: the CPU, or a GPU with its architecture and size."""

    kind: str
    """``cpu`` or ``cuda``."""
    major: int
    """Major compute capability; 0 for the CPU."""
    sm_count: int
    """Streaming multiprocessors, or CPU threads."""
    launches: Launches = DEFAULT_LAUNCHES
    """Launch parameters of our own kernels there."""

    @classmethod
    def current(cls, kind: str, launches: Launches = DEFAULT_LAUNCHES) -> Device:
        """The device of this process. ``kind`` is ``cpu`` or ``cuda``."""
        if kind == "cpu":
            return cls("cpu", 0, torch.get_num_threads(), launches)
        properties = torch.cuda.get_device_properties(0)
        return cls("cuda", properties.major, properties.multi_processor_count, launches)

    @property
    def torch_device(self) -> torch.device:
        """As torch names it."""
        return torch.device(self.kind)


Prepare = Callable[[AttentionInputs, Device], PreparedPath]
"""Binds an attention candidate to inputs."""

_ADDED: dict[str, Prepare] = {}


def add(name: str, prepare: Prepare) -> None:
    """Make ``prepare`` the attention candidate ``name`` of this process. Raises ``ValueError`` for a name of ours."""
    if known_candidate(name) is not None:
        raise ValueError(f"an added candidate must have a name of its own: got {name!r}")
    _ADDED[name] = prepare


def unsupported(site: Site, candidate: str, device: Device) -> str | None:
    """Why ``candidate`` cannot serve ``site`` on ``device``, in one sentence; None if it can.

    The sentence names the missing package, the architecture or the shape rule. On the CPU every candidate has a torch
    implementation of the same stages.
    """
    if candidate in _ADDED:
        return None if site.provider is None else sglang_kernels.missing(site.provider, device.kind)
    found = candidate_at(site, candidate)
    if site.provider is not None:
        reason = sglang_kernels.unsupported(site.provider, found, device.kind)
        if reason is not None:
            return reason
    if device.kind == "cpu" or found.library is None:
        return None
    if found.library is KernelSource.DEEP_GEMM:
        return indexer.deep_gemm_missing()
    missing = flash_mla_missing()
    if missing is not None:
        return missing
    return _flash_mla(device.major).unsupported(site.h_q or 0)


def prepare_attention(inputs: AttentionInputs, candidate: str, device: Device) -> PreparedPath:
    """Bind an attention candidate to ``inputs``. Ask :func:`unsupported` first."""
    if candidate in _ADDED:
        return _ADDED[candidate](inputs, device)
    found = candidate_at(inputs.site, candidate)
    kernels = None if device.kind == "cpu" else _flash_mla(device.major)
    if found.paged:
        return with_kvcache.prepare(inputs, kernels, found)
    return _OVER_WORKSPACE[found](inputs, kernels, device.launches)


_OVER_WORKSPACE = {
    SPARSE_FWD: sparse_fwd.prepare,
    SPARSE_FWD_FUSED: sparse_fwd_fused.prepare,
    SPARSE_FWD_SELECTED: sparse_fwd_selected.prepare,
}


def prepare_split(inputs: AttentionInputs, cached: Sequence[int], device: Device) -> PreparedPath:
    """Bind a batch whose requests ``cached`` read the cache, the others a workspace: see :mod:`.split_batch`."""
    kernels = None if device.kind == "cpu" else _flash_mla(device.major)
    return split_batch.prepare(inputs, cached, kernels, device.launches)


def prepare_indexer(context_lens: torch.Tensor, site: Site, candidate: str, device: Device) -> PreparedPath:
    """Bind an indexer metadata candidate to ``context_lens`` (num_qo_tokens, 1) int32."""
    return indexer.prepare(context_lens, site, candidate_at(site, candidate), device.sm_count, device.launches)


@lru_cache(maxsize=1)
def flash_mla_missing() -> str | None:
    """See :func:`mla_tune.kernels.adapters.flash_mla.missing`; asked once per process, since a failed import is slow."""
    return flash_mla.missing()


@lru_cache(maxsize=2)
def _flash_mla(major: int) -> flash_mla.FlashMla:
    return flash_mla.FlashMla(major)
