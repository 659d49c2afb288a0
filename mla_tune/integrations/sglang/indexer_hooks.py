"""SGLang's hook for the schedule of V4's indexer: SGLang's own JIT kernel or DeepGEMM's plans a prefill's logits.

The schedule is planned while a forward's metadata is built, by a function that knows neither backend nor batch. So the
backend's method that builds the metadata says whose forward it is, and the function asks. All of 0.5.17 to 0.5.23 import
the function from its package at every call, and chunk the rows in the caller.
"""

from __future__ import annotations

from typing import Any

from mla_tune.integrations.engine_process import Once, shape_of, user_set
from mla_tune.integrations.seams import Hook, Seam, argument
from mla_tune.integrations.sglang.sglang_state import PROCESS, RELEASES, made_up
from mla_tune.runtime.counters import Reasons
from mla_tune.runtime.decider import Decider, Service
from mla_tune.sites.candidates import DEEP_GEMM
from mla_tune.sites.site import LayerType, ModelConfig, SiteName

SWITCH = "SGLANG_OPT_USE_JIT_INDEXER_METADATA"
_STATE = "_mla_tune_indexer"

HOOK = Hook("the schedule of DeepSeek-V4's indexer", RELEASES)
PREPARE = Seam("DeepseekV4AttnBackend._build_forward_metadata", ("self", "forward_batch"))
SCHEDULE = Seam("get_paged_mqa_logits_metadata", ("seq_lens", "page_size", "num_sm"))


class IndexerChoice:
    """The choice of one backend."""

    __slots__ = ("_decider", "_once")

    def __init__(self, decider: Decider) -> None:
        self._decider = decider
        self._once = Once("the choice of the indexer's schedule")

    def planner(self, forward_batch: Any, rows: int) -> Any:
        """DeepGEMM's function, where it is to plan ``rows`` rows of a prefill; None leaves SGLang's own."""
        try:
            shape = shape_of(forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu)
            # What a limit bounds are the rows of this call: all of a padded batch, or one chunk of it.
            if self._decider(max(shape[0], rows), *shape[1:]) != DEEP_GEMM.name:
                return None
            from deep_gemm import get_paged_mqa_logits_metadata

            return get_paged_mqa_logits_metadata
        # Whatever it is, it is ours, and the forward goes on.
        except Exception:
            self._once.report(self._decider.counters, Reasons.ERROR)
            return None


_building: list[tuple[IndexerChoice, Any]] = []
"""The choice and the batch of the backend that builds metadata now, at most one."""


def decider(service: Service, model: ModelConfig) -> Decider:
    """Who plans the schedules of ``model``."""
    return service.decider(
        SiteName.INDEXER_METADATA, model=model.name, layer=LayerType.C4A, engine_setting=user_set(SWITCH)
    )


def give(backend: Any, decided_by: Decider) -> None:
    """Let ``decided_by`` plan the schedules of ``backend``, if a table serves it."""
    if decided_by.serves:
        setattr(backend, _STATE, IndexerChoice(decided_by))


def hook_function(module: Any) -> None:
    """Take hold of SGLang's own schedule kernel, which is imported from its package at every call."""
    PROCESS.hooks.take(module, HOOK, {SCHEDULE: around_schedule})


def around_prepare(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Say whose metadata is being built, for as long as it is."""
    choice: IndexerChoice | None = instance.__dict__.get(_STATE)
    forward_batch = argument(args, kwargs, 0, "forward_batch")
    if choice is None or not _is_prefill(forward_batch):
        return wrapped(*args, **kwargs)
    _building.append((choice, forward_batch))
    try:
        return wrapped(*args, **kwargs)
    finally:
        _building.clear()


def around_schedule(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Plan a schedule by whoever the policy says."""
    del instance
    theirs = None
    if _building:
        choice, forward_batch = _building[0]
        theirs = choice.planner(forward_batch, argument(args, kwargs, 0, "seq_lens").shape[0])
    if theirs is None:
        return wrapped(*args, **kwargs)
    return theirs(*(argument(args, kwargs, place, name) for place, name in enumerate(SCHEDULE.parameters)))


def _is_prefill(forward_batch: Any) -> bool:
    return (
        forward_batch.extend_seq_lens_cpu is not None
        and forward_batch.extend_prefix_lens_cpu is not None
        and bool(forward_batch.forward_mode.is_extend_without_speculative())
        and not made_up(forward_batch)
    )
