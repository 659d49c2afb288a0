"""vLLM's hook for DeepSeek-V4: prefill on the paged FP8 cache where the policy says so.

vLLM has one way to prefill: gather and dequantize the rows of some requests at a time, then FlashMLA's sparse
prefill. Its metadata builder prepares the other one all the same (the window of every prefill token as cache slots), and
its FlashInfer backend and its own decodes show how the kernel is called. So a layer's ``_forward_prefill`` either runs as
it is, or is replaced by that call; what counts as a decode and every buffer stay as they are.

- Layer types choose for themselves, once per forward: they share nothing here.
- Not replaced: images (wider windows), context parallelism, capture of a CUDA graph, caches that are not ``fp8_ds_mla``.
- The kernel's buffers (float32, one partial output a query token) come from torch's allocator. They are asked for in the
  forward that vLLM measures its memory with, so that it leaves room for them. Where they do not fit all the same the
  original runs, in that forward and on that rank; the choice stays, since the other ranks know nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mla_tune.integrations.engine_process import (
    UNBOUNDED,
    Once,
    Prepared,
    matching_model,
    out_of_memory,
    paged_bytes,
    paged_limit,
    reserve,
)
from mla_tune.integrations.seams import Hook, Seam, argument
from mla_tune.integrations.vllm.vllm_state import (
    PROCESS,
    RELEASES,
    capturing,
    most_entries,
    records,
    user_setting,
)
from mla_tune.runtime.counters import Reasons
from mla_tune.runtime.decider import Decider, Service
from mla_tune.sites.candidates import PAGED
from mla_tune.sites.site import SWA_WINDOW, LayerType, ModelConfig, SiteName

_CLASS = "DeepseekV4FlashMLAAttention"
INIT = Seam(f"{_CLASS}.__init__", ("self",))
PREFILL = Seam(
    f"{_CLASS}._forward_prefill",
    ("self", "q", "positions", "compressed_k_cache", "swa_k_cache", "output", "attn_metadata", "swa_metadata"),
)
FORWARD_MQA = Seam(f"{_CLASS}.forward_mqa", ("self", "q", "kv", "positions", "output"))
HOOK = Hook(
    "DeepSeek-V4's prefill attention",
    RELEASES,
    uses=("compute_global_topk_indices_and_lens", "flash_mla_with_kvcache", "get_forward_context"),
)
_WHAT = "the prefill attention of DeepSeek-V4"
_STATE = "_mla_tune"
_LAYERS = {1: LayerType.SWA_ONLY, 4: LayerType.C4A, 128: LayerType.C128A}
"""By vLLM's compress ratio, which is 1 for layers that only have a window."""


@dataclass(slots=True)
class _Plan:
    """What all layers of one type share in one forward."""

    paged: bool
    schedule: Any = None
    slots: Any = None
    """(num_prefill_tokens, 1, width) int32 slots of the selection, where they are the same in every layer."""
    lengths: Any = None  # (num_prefill_tokens,) int32


class V4Choice:
    """The choice of the layers of one type."""

    __slots__ = ("_decider", "_limit", "_once", "_ratio")

    def __init__(self, decider: Decider, ratio: int, most_tokens: int = UNBOUNDED) -> None:
        self._decider = decider
        self._ratio = ratio
        self._limit = min(paged_limit(decider), most_tokens)
        self._once = Once("the prefill of DeepSeek-V4 on the paged cache")

    def plan(self, swa_metadata: Any) -> _Plan | None:
        """The plan of a forward, made when its first layer of this type asks; None leaves it to vLLM. Never raises."""
        if PROCESS.fabricating:
            return None
        plans = swa_metadata.__dict__.setdefault(_STATE, {})
        found: _Plan | None = plans.get(self._ratio)
        if found is None:
            found = plans[self._ratio] = _Plan(self._paged(self._decider, swa_metadata))
        return found if found.paged else None

    def _paged(self, decider: Decider, swa_metadata: Any) -> bool:
        try:
            reason = decider.kept or self._ruled_out(swa_metadata)
            if reason is None:
                kv_tokens = int(swa_metadata.prefill_seq_lens_cpu.sum())  # a tensor on the host
                shape = (swa_metadata.num_prefill_tokens, kv_tokens, swa_metadata.num_prefills)
                return decider(*shape) in PAGED
            decider.counters.fell_back(reason)
        # Whatever it is, it is ours, and the forward goes on.
        except Exception:
            self.failed(Reasons.ERROR)
        return False

    def _ruled_out(self, swa_metadata: Any) -> str | None:
        """Why this forward is vLLM's to decide; None if it is not."""
        if not swa_metadata.num_prefill_tokens:
            return Reasons.NO_TOKENS
        if swa_metadata.prefill_seq_lens_cpu is None or swa_metadata.prefill_swa_indices is None:
            return Reasons.NO_LENGTHS
        if capturing() or getattr(swa_metadata, "cache_slot_mapping", None) is not None:  # gathered, from 0.33 on
            return Reasons.GATE
        return Reasons.PAST_LIMIT if swa_metadata.num_prefill_tokens > self._limit else None

    def failed(self, reason: str) -> None:
        """Count, and log once, a failure while its exception is handled."""
        self._once.report(self._decider.counters, reason)

    def reserve(self, h_q: int, most: int) -> None:
        """Have the kernel's buffers for ``most`` query tokens in the memory that vLLM measures."""
        if self._decider.serves:
            reserve(min(most, self._limit), lambda tokens: paged_bytes(tokens, h_q))


def hook_layer(module: Any) -> None:
    """Take hold of the layer's class."""

    def around_prefill(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return _forward_prefill(module, wrapped, instance, args, kwargs)

    def around_forward(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        answer = wrapped(*args, **kwargs)
        choice: V4Choice | None = instance.__dict__.get(_STATE)
        if choice is not None and module.get_forward_context().attn_metadata is None:
            choice.reserve(instance.padded_heads, instance.max_num_batched_tokens)
        return answer

    PROCESS.hooks.take(module, HOOK, {INIT: _around_init, PREFILL: around_prefill, FORWARD_MQA: around_forward})


def _around_init(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    wrapped(*args, **kwargs)
    prepare(instance, argument(args, kwargs, 0, "vllm_config"))


def _forward_prefill(module: Any, wrapped: Any, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    choice: V4Choice | None = layer.__dict__.get(_STATE)
    call = dict(zip(PREFILL.parameters[1:], args, strict=False)) | kwargs
    plan = None if choice is None else choice.plan(call["swa_metadata"])
    if choice is not None and plan is not None:
        try:
            _paged_prefill(
                module,
                layer,
                plan,
                *(call[name] for name in ("q", "compressed_k_cache", "swa_k_cache", "output")),
                *(call[name] for name in ("attn_metadata", "swa_metadata")),
            )
            return None
        # What fails before the kernel runs leaves nothing behind: the original writes the whole output.
        except Exception as error:
            plan.paged = False  # for the rest of this forward
            choice.failed(Reasons.NO_MEMORY if out_of_memory(error) else Reasons.ERROR)
    return wrapped(*args, **kwargs)


def _paged_prefill(
    module: Any,
    layer: Any,
    plan: _Plan,
    q: Any,  # (at least num_prefill_tokens, h_q, 512) bf16
    compressed_k_cache: Any,  # (blocks, 256 // compress_ratio, 584) uint8; None for a layer with a window only
    swa_k_cache: Any,  # (blocks, block_size, 584) uint8
    output: Any,  # as q
    attn_metadata: Any,
    swa_metadata: Any,
) -> None:
    """One layer's prefill by the KV-cache kernel, every query token a batch entry, as vLLM's decodes call it."""
    count = swa_metadata.num_prefill_tokens
    if plan.schedule is None:
        from vllm.v1.attention.ops.flashmla import get_mla_metadata

        plan.schedule = get_mla_metadata()[0]  # filled by the first layer of the type, used by the others
    slots, lengths, extra_cache = None, None, None
    if layer.compress_ratio > 1:
        slots, lengths = _selection(module, layer, plan, attn_metadata, swa_metadata)
        extra_cache = compressed_k_cache.unsqueeze(-2)
    module.flash_mla_with_kvcache(
        q=q[:count].unsqueeze(1),
        k_cache=swa_k_cache.unsqueeze(-2),
        block_table=None,
        cache_seqlens=None,
        head_dim_v=512,
        tile_scheduler_metadata=plan.schedule,
        softmax_scale=layer.scale,
        is_fp8_kvcache=True,
        indices=swa_metadata.prefill_swa_indices[:count],
        topk_length=swa_metadata.prefill_swa_lens[:count],
        attn_sink=layer.attn_sink,
        extra_k_cache=extra_cache,
        extra_indices_in_kvcache=slots,
        extra_topk_length=lengths,
        out=output[:count].unsqueeze(1),
    )


def _selection(module: Any, layer: Any, plan: _Plan, attn_metadata: Any, swa_metadata: Any) -> tuple[Any, Any]:
    """Slots (num_prefill_tokens, 1, width) int32 of what each query selects, and how many count.

    A c4a layer selects anew what its indexer wrote; all c128a layers of a forward select the same rows.
    """
    if plan.slots is not None:
        return plan.slots, plan.lengths
    first = swa_metadata.num_decode_tokens
    tokens = slice(first, first + swa_metadata.num_prefill_tokens)
    each = layer.compress_ratio == 4
    local = layer.topk_indices_buffer[tokens] if each else attn_metadata.c128a_prefill_topk_indices
    slots, lengths = module.compute_global_topk_indices_and_lens(
        local,
        swa_metadata.token_to_req_indices[tokens],
        attn_metadata.block_table,
        attn_metadata.block_size // layer.compress_ratio,
        swa_metadata.is_valid_token[tokens],
    )
    slots = slots.unsqueeze(1)
    if not each:
        plan.slots, plan.lengths = slots, lengths
    return slots, lengths


_choices: dict[tuple[tuple[ModelConfig, int] | str, str | None], dict[int, V4Choice]] = {}
"""By model with its heads, or why it has no choice, and setting; then by compress ratio: layers alike share one."""


def prepare(layer: Any, vllm_config: Any) -> None:
    """Give a layer that vLLM has built its choice; none where vLLM has no second path, or the policy no such model."""
    setting = user_setting()
    kept = _no_second_path(layer, vllm_config)
    found = _model(layer, vllm_config.model_config.hf_config)
    key = (kept or found, setting)
    choices = _choices.get(key)
    if choices is None:
        prepared = PROCESS.prepare(_WHAT, setting or "", lambda service: _resolved(service, *key))
        choices = _choices[key] = {} if prepared is None else _by_ratio(prepared)
    choice = choices.get(layer.compress_ratio)  # None: the window of a multi-token prediction, which no table covers
    if choice is not None:
        setattr(layer, _STATE, choice)


def _resolved(service: Service, found: tuple[ModelConfig, int] | str, setting: str | None) -> Prepared:
    if isinstance(found, str):
        return Prepared(kept=(found,))
    model, h_q = found
    deciders = tuple(
        service.decider(
            SiteName.PREFILL_ATTENTION,
            model=model.name,
            layer=layer_type,
            h_q=h_q,
            engine_setting=setting,
            records=layer_type is model.layers[0][0] and records(),
        )
        for layer_type in _LAYERS.values()
        if model.layer_count(layer_type)
    )
    entries = most_entries(service.dispatcher)
    return Prepared(deciders, (), UNBOUNDED if entries is None else entries)


def _by_ratio(prepared: Prepared) -> dict[int, V4Choice]:
    ratios = {layer_type: ratio for ratio, layer_type in _LAYERS.items()}
    deciders = {ratios[LayerType(decider.resolved.layer)]: decider for decider in prepared.deciders}
    return {ratio: V4Choice(decider, ratio, prepared.most_tokens) for ratio, decider in deciders.items()}


def _model(layer: Any, config: Any) -> tuple[ModelConfig, int] | str:
    """The model of the policy that ``config`` is, and its padded heads; or why there is none."""
    ratios = _compress_ratios(config)
    unknown = sorted(set(ratios) - set(_LAYERS))
    if unknown:
        return f"no table is for compress ratios {unknown}"
    layers = {_LAYERS[ratio]: ratios.count(ratio) for ratio in sorted(set(ratios))}
    return matching_model(layers, config.index_topk, layer.padded_heads)


def _compress_ratios(config: Any) -> list[int]:
    """Of each layer; 1 for a window alone. 0.33 reads transformers' configuration, which has a rate for a kind of layer."""
    stated = getattr(config, "compress_ratios", None)
    if stated is None:
        stated = [config.compress_rates.get(kind, 0) for kind in config.layer_types]
    return [max(1, int(ratio)) for ratio in stated[: config.num_hidden_layers]]


def _no_second_path(layer: Any, vllm_config: Any) -> str | None:
    """What of the configuration, fixed at start, leaves the gather only; None if both run."""
    parallel = vllm_config.parallel_config
    if layer.max_image_tokens:
        return "images widen the window, which no table covers"
    if layer.window_size != SWA_WINDOW:
        return f"V4's window is {SWA_WINDOW} tokens, not {layer.window_size}"
    if not layer._uses_fp8_ds_mla_layout():
        return "V4's cache is not in the fp8_ds_mla layout"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism has one way to prefill V4"
    return None
