"""vLLM's hook for DeepSeek-V3.2 (DSA) with an FP8 cache: which kernels a batch with prefills takes.

vLLM decides once, by the query heads a rank (``MIN_HEADS_FOR_BF16_PREFILL``): with few, *mixed*, the KV-cache kernel
for all tokens as one batch entry; else *separate*, a BF16 sparse prefill over dequantized rows beside the KV-cache kernel
for the decodes. Its metadata builder says which in every batch, and its layers follow what the metadata says, so the
policy may say it per batch.

- The split into decodes and prefills is vLLM's own: the hook answers inside the function that it hands the split to.
- What was measured are batches of prefills. Where decodes make up most of the query tokens, vLLM's own choice stays.
- Batches without a prefill (all that CUDA graphs capture), prefills that take dense attention, context parallelism,
  HiSparse and other caches than ``fp8_ds_mla`` keep it too.
"""

from __future__ import annotations

from typing import Any

from mla_tune.integrations.engine_process import (
    UNBOUNDED,
    Once,
    Prepared,
    matching_model,
    paged_bytes,
    paged_limit,
    reserve,
)
from mla_tune.integrations.seams import Hook, Seam, argument
from mla_tune.integrations.vllm.vllm_state import PROCESS, RELEASES, capturing, records, user_setting
from mla_tune.runtime.counters import Reasons
from mla_tune.runtime.decider import Decider, Service
from mla_tune.sites.candidates import PAGED
from mla_tune.sites.engines import FEW_HEADS, Engine
from mla_tune.sites.site import LayerType, SiteName

_CLASS = "FlashMLASparseMetadataBuilder"
INIT = Seam(f"{_CLASS}.__init__", ("self", "kv_cache_spec", "layer_names", "vllm_config"))
BUILD = Seam(f"{_CLASS}.build", ("self", "common_prefix_len", "common_attn_metadata", "fast_build"))
SEPARATE = Seam(f"{_CLASS}._build_fp8_separate_prefill_decode", ("self", "common_attn_metadata", "metadata"))
_CONSTANT = "MIN_HEADS_FOR_BF16_PREFILL"
HOOK = Hook(
    "DeepSeek-V3.2's prefill attention", RELEASES, uses=(f"{_CLASS}._build_fp8_mixed_decode_prefill", _CONSTANT)
)
_STATE = "_mla_tune"


class MixedChoice:
    """The choice of one metadata builder."""

    __slots__ = ("_decider", "_limit", "_once", "base")

    def __init__(self, decider: Decider, *, base: bool, most_tokens: int = UNBOUNDED) -> None:
        self._decider = decider
        self.base = base
        """Whether vLLM's own choice is the mixed batch."""
        self._limit = min(paged_limit(decider), most_tokens)
        self._once = Once("the choice of V3.2's kernels")

    def mixed(self, common: Any, metadata: Any) -> bool:
        """Whether this batch is mixed. ``common`` and ``metadata`` are vLLM's, the latter with its split. Never raises."""
        decider = self._decider
        if not metadata.num_prefills or PROCESS.fabricating:
            return self.base
        try:
            reason = decider.kept or self._ruled_out(common, metadata)
            if reason is None:
                return self._of_shape(decider, common, metadata)
            decider.counters.fell_back(reason)
        # Whatever it is, it is ours, and the batch goes on.
        except Exception:
            self._once.report(decider.counters, Reasons.ERROR)
        return self.base

    def _ruled_out(self, common: Any, metadata: Any) -> str | None:
        """Why this batch is vLLM's to decide; None if it is not."""
        if common.seq_lens_cpu_upper_bound is None:
            return Reasons.NO_LENGTHS
        prefill = metadata.prefill
        if (prefill is not None and prefill.use_dense_mha) or capturing():
            return Reasons.GATE
        if 2 * metadata.num_decode_tokens > common.num_actual_tokens:
            return Reasons.MOSTLY_DECODE
        return Reasons.PAST_LIMIT if common.num_actual_tokens > self._limit else None

    def _of_shape(self, decider: Decider, common: Any, metadata: Any) -> bool:
        first, last = metadata.num_decodes, metadata.num_decodes + metadata.num_prefills
        kv_tokens = int(common.seq_lens_cpu_upper_bound[first:last].sum())  # a tensor on the host, exact for prefills
        num_qo_tokens = common.num_actual_tokens - metadata.num_decode_tokens
        return decider(num_qo_tokens, kv_tokens, metadata.num_prefills) in PAGED


def hook_builder(module: Any) -> None:
    """Take hold of the builder's class."""

    def around_init(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        prepare(instance, argument(args, kwargs, 2, "vllm_config"), getattr(module, _CONSTANT))

    PROCESS.hooks.take(module, HOOK, {INIT: around_init, BUILD: _around_build, SEPARATE: _around_separate})


def _around_build(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    choice: MixedChoice | None = instance.__dict__.get(_STATE)
    if choice is None or not choice.base:
        return wrapped(*args, **kwargs)
    instance.fp8_use_mixed_batch = False  # leads to the function that decides; what it answers is what the batch gets
    try:
        return wrapped(*args, **kwargs)
    finally:
        instance.fp8_use_mixed_batch = True


def _around_separate(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    choice: MixedChoice | None = instance.__dict__.get(_STATE)
    common, metadata = argument(args, kwargs, 0, "common_attn_metadata"), argument(args, kwargs, 1, "metadata")
    if choice is None or not choice.mixed(common, metadata):
        return wrapped(*args, **kwargs)
    metadata.fp8_use_mixed_batch = True
    return instance._build_fp8_mixed_decode_prefill()


def prepare(builder: Any, vllm_config: Any, few_heads: Any) -> None:
    """Give a builder that vLLM has made its choice; none where vLLM has no second path."""
    setting = user_setting() if few_heads == FEW_HEADS else f"{_CONSTANT}={few_heads}"
    found = PROCESS.prepare(
        "the prefill attention of DeepSeek-V3.2",
        setting or "",
        lambda service: _resolved(service, builder, vllm_config, setting),
    )
    if found is not None:
        choice = MixedChoice(found.deciders[0], base=builder.fp8_use_mixed_batch, most_tokens=found.most_tokens)
        setattr(builder, _STATE, choice)


def _resolved(service: Service, builder: Any, vllm_config: Any, setting: str | None) -> Prepared:
    layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    kept = _no_second_path(builder, vllm_config)
    found = matching_model({LayerType.DSA: layers}, builder.topk_tokens, builder.num_heads)
    if kept is not None or isinstance(found, str):
        return Prepared(kept=(kept or str(found),))
    model, h_q = found
    decider = service.decider(
        SiteName.PREFILL_ATTENTION,
        model=model.name,
        layer=LayerType.DSA,
        h_q=h_q,
        engine=Engine.VLLM_FEW_HEADS if builder.num_heads < FEW_HEADS else Engine.VLLM,
        engine_setting=setting,
        records=records(),
    )
    most_tokens = UNBOUNDED
    if decider.serves and not builder.fp8_use_mixed_batch:  # vLLM has made room for its own choice
        scheduler = getattr(vllm_config, "scheduler_config", None)
        most = min(paged_limit(decider), getattr(scheduler, "max_num_batched_tokens", UNBOUNDED))
        # One batch entry has up to two partial results a query: both sides of a split.
        most_tokens = reserve(most, lambda tokens: paged_bytes(2 * tokens, h_q))
    return Prepared((decider,), (), most_tokens)


def _no_second_path(builder: Any, vllm_config: Any) -> str | None:
    """What of the configuration, fixed at start, leaves one way only; None if both run."""
    cache = vllm_config.cache_config.cache_dtype
    parallel = vllm_config.parallel_config
    if cache != "fp8_ds_mla":
        return f"V3.2's cache is {cache}, not fp8_ds_mla"
    if builder.use_hisparse:
        return "HiSparse keeps its own split"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism has one way to run V3.2"
    widths = builder.mla_dims.kv_lora_rank, builder.mla_dims.qk_rope_head_dim
    if widths != (512, 64):
        return f"V3.2's cache rows are 512 + 64 wide, not {widths[0]} + {widths[1]}"
    return None
