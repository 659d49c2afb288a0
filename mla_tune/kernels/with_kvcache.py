"""FlashMLA's sparse decode kernel over the paged FP8 cache, in the two ways in which engines launch it.

Candidate ``with_kvcache``, as in SGLang: every query token is a batch entry. Candidate ``with_kvcache_mixed``, as vLLM does
for V3.2: one batch entry with all query tokens of the forward as its sequence.

Its scheduler runs inside the first call of a forward, so the ``schedule`` stage is that call less a call whose schedule is
already there. The selection arrives as cache slots, which is what the engine's top-k transform writes for this path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla_tune.kernels.adapters.attention_cpu import schedule_cpu, with_kvcache_cpu
from mla_tune.kernels.adapters.flash_mla import FlashMla, KvCacheCall
from mla_tune.kernels.adapters.provided import Selections, selections
from mla_tune.kernels.formats import PagedSelection, paged_view
from mla_tune.kernels.inputs import AttentionInputs
from mla_tune.kernels.prepared import BoundStage, Output, PreparedPath, Run
from mla_tune.sites.candidates import WITH_KVCACHE, Candidate


def prepare(inputs: AttentionInputs, kernels: FlashMla | None, candidate: Candidate = WITH_KVCACHE) -> PreparedPath:
    """Bind both stages of ``candidate``. ``kernels`` None means the torch implementation on the CPU."""
    return _prepare_cpu(inputs, candidate) if kernels is None else _prepare_gpu(inputs, kernels, candidate)


def _prepare_gpu(inputs: AttentionInputs, kernels: FlashMla, candidate: Candidate) -> PreparedPath:
    output, chosen = Output(), selections(inputs)
    one_entry = candidate.one_entry
    if chosen.transform is not None:  # the schedule's calls read a selection as well
        chosen.transform()
    fixed = _call(inputs, chosen.parts, one_entry=one_entry)
    filled = kernels.new_schedule()

    def call() -> KvCacheCall:
        return fixed if chosen.transform is None else _call(inputs, chosen.parts, one_entry=one_entry)

    def attention() -> None:
        output.tensor = kernels.with_kvcache(call(), filled)

    def attention_with_schedule() -> None:
        output.tensor = kernels.with_kvcache(call(), kernels.new_schedule())

    return _prepared(inputs, candidate, chosen, output, attention_with_schedule, attention, baseline=attention)


def _prepare_cpu(inputs: AttentionInputs, candidate: Candidate) -> PreparedPath:
    output, chosen = Output(), selections(inputs)
    lengths = torch.stack([part.lengths for part in chosen.parts]).sum(0)
    if candidate.one_entry:  # one entry has one length: every query is taken to be as wide as the indices
        lengths = torch.full_like(lengths, sum(part.slot_ids.shape[1] for part in chosen.parts))
    h_q, head_dim = inputs.q.shape[1:]
    plan = schedule_cpu(lengths, h_q, head_dim)

    def schedule() -> None:
        nonlocal plan
        plan = schedule_cpu(lengths, h_q, head_dim)

    def attention() -> None:
        output.tensor = with_kvcache_cpu(inputs.q, plan, chosen.parts, inputs.sm_scale, inputs.attn_sink)

    return _prepared(inputs, candidate, chosen, output, schedule, attention)


def _prepared(
    inputs: AttentionInputs,
    candidate: Candidate,
    chosen: Selections,
    output: Output,
    schedule: Run,
    attention: Run,
    baseline: Run | None = None,
) -> PreparedPath:
    """The candidate's stages in the order of the site; ``baseline`` is taken from the schedule's time."""
    bound = {"attention": (attention, None), "schedule": (schedule, baseline)}
    if chosen.transform is not None:
        bound["topk_transform"] = (chosen.transform, None)
    return PreparedPath(
        candidate=candidate.name,
        stages=tuple(BoundStage(stage, *bound[stage.name]) for stage in candidate.stages(inputs.site)),
        output=output,
        buffers=chosen.scratch,
        scratch=chosen.scratch,
    )


def _call(inputs: AttentionInputs, parts: Sequence[PagedSelection], *, one_entry: bool) -> KvCacheCall:
    """The kernel's arguments: V4 has the window first and the selection as extra cache, V3.2 the selection only."""
    first, *more = parts
    extra = more[0] if more else None
    return KvCacheCall(
        q=inputs.q,
        cache=_view(first),
        slots=first.slot_ids,
        lengths=first.lengths,
        extra_cache=None if extra is None else _view(extra),
        extra_slots=None if extra is None else extra.slot_ids,
        extra_lengths=None if extra is None else extra.lengths,
        sm_scale=inputs.sm_scale,
        attn_sink=inputs.attn_sink,
        one_entry=one_entry,
    )


def _view(part: PagedSelection) -> torch.Tensor:
    return paged_view(part.cache, part.fmt, part.page_size)
