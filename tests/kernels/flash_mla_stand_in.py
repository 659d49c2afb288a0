"""A module with FlashMLA's signatures, argument rules and answer, but in torch: what the adapter is held against."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from mla_tune.kernels.formats import DSA, V4, PagedSelection
from mla_tune.kernels.reference import attention_reference, paged_attention_reference


@dataclass
class Schedule:
    """What ``get_mla_metadata`` gives: empty until the first call fills it for its shapes."""

    filled_for: tuple[object, ...] | None = None


@dataclass
class Recorder:
    """The calls that the stand-in received, by argument name."""

    calls: list[dict[str, Any]] = field(default_factory=list)


def check_queries(q: torch.Tensor) -> None:
    assert q.dtype is torch.bfloat16
    assert q.is_contiguous()
    assert q.shape[-2] in (64, 128)
    assert q.shape[-1] in (512, 576)


def check_indices(indices: torch.Tensor, h_q: int) -> None:
    assert indices.dtype is torch.int32
    assert indices.is_contiguous()
    assert indices.shape[1] == 1
    assert indices.shape[2] % (64 if h_q == 64 else 128) == 0


def sparse_answer(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, kv, indices, lengths = call["q"], call["kv"], call["indices"], call["topk_length"]
    check_queries(q)
    check_indices(indices, q.shape[1])
    assert kv.dtype is torch.bfloat16
    assert kv.shape[1:] == (1, q.shape[2])
    assert lengths.dtype is torch.int32
    assert int(indices.max()) < kv.shape[0]
    out, lse = attention_reference(
        q, kv[:, 0], indices[:, 0], lengths, call["sm_scale"], call["attn_sink"], call["d_v"]
    )
    return out.bfloat16(), lse, lse


def cache_part(cache: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor | None) -> PagedSelection:
    """What the kernel reads of one cache: its pages lie ``stride(0)`` bytes apart."""
    _, page_size, one, width = cache.shape
    fmt = {584: V4, 656: DSA}[width]
    assert one == 1
    assert slots.dtype is torch.int32
    assert slots.shape[1] == 1
    assert slots.shape[2] % 64 == 0
    pages = cache.as_strided((cache.shape[0], cache.stride(0)), (cache.stride(0), 1))
    every_column = torch.full(slots.shape[:1], slots.shape[2], dtype=torch.int32)
    return PagedSelection(pages, fmt, page_size, slots[:, 0], every_column if lengths is None else lengths)


def paged_answer(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    q, schedule = call["q"], call["tile_scheduler_metadata"]
    assert isinstance(schedule, Schedule)
    shapes_now = (q.shape, call["indices"].shape, call["extra_indices_in_kvcache"] is None)
    assert schedule.filled_for in (None, shapes_now)
    schedule.filled_for = shapes_now
    check_queries(q)
    assert 1 in q.shape[:2]  # one query token a batch entry, or one entry with all of them
    tokens = 1 if q.shape[1] == 1 else 0
    assert call["indices"].shape[:2] == q.shape[:2]
    assert call["block_table"] is call["cache_seqlens"] is call["num_splits"] is None
    assert (call["causal"], call["is_fp8_kvcache"], call["head_dim_v"]) == (False, True, 512)
    assert tokens == 1 or call["topk_length"] is None  # lengths are per batch entry
    slots = call["indices"].flatten(0, 1).unsqueeze(1)
    parts = [cache_part(call["k_cache"], slots, call["topk_length"])]
    if q.shape[3] == 576:
        assert call["topk_length"] is call["extra_k_cache"] is call["extra_indices_in_kvcache"] is None
        assert call["extra_topk_length"] is call["attn_sink"] is None
    else:
        assert call["indices"].shape[2] == 128  # the window, whatever the layer type
    if call["extra_k_cache"] is not None:
        parts.append(cache_part(call["extra_k_cache"], call["extra_indices_in_kvcache"], call["extra_topk_length"]))
    out, lse = paged_attention_reference(q.flatten(0, 1), parts, call["softmax_scale"], call["attn_sink"], 512)
    return out.bfloat16().unsqueeze(tokens), lse


def signature(required: str, optional: dict[str, object], switch: bool) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    defaults = {**optional, "use_legacy": False} if switch else optional
    parameters = [inspect.Parameter(name, kind) for name in required.split()]
    parameters += [inspect.Parameter(name, kind, default=value) for name, value in defaults.items()]
    return inspect.Signature(parameters)


def sparse_signature(switch: bool) -> inspect.Signature:
    optional: dict[str, object] = {"d_v": 512, "attn_sink": None, "topk_length": None, "indexer_topk": 0}
    return signature("q kv indices sm_scale", optional, switch)


def paged_signature(switch: bool) -> inspect.Signature:
    optional = {"num_splits": None, "softmax_scale": None, "causal": False, "is_fp8_kvcache": False}
    tensors = "indices attn_sink extra_k_cache extra_indices_in_kvcache topk_length extra_topk_length"
    required = "q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata"
    return signature(required, {**optional, **dict.fromkeys(tensors.split())}, switch)


def stand_in(switch: bool, recorder: Recorder, legacy: bool | None = None) -> ModuleType:
    """A module with the signatures of upstream's package, or of the distribution with the ``use_legacy`` switch.

    ``legacy`` True or False adds that distribution's ``has_legacy()``.
    """

    def function(accepted: inspect.Signature, answer: Callable[[dict[str, Any]], object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            bound = accepted.bind(*args, **kwargs)  # raises TypeError as the library's own function would
            bound.apply_defaults()
            recorder.calls.append(bound.arguments)
            return answer(bound.arguments)

        call.__signature__ = accepted  # type: ignore[attr-defined]
        return call

    module: Any = ModuleType("flash_mla")
    module.flash_mla_sparse_fwd = function(sparse_signature(switch), sparse_answer)
    module.flash_mla_with_kvcache = function(paged_signature(switch), paged_answer)
    module.get_mla_metadata = lambda *args, **kwargs: (Schedule(), None)
    if legacy is not None:
        module.has_legacy = lambda: legacy
    return module  # type: ignore[no-any-return]
