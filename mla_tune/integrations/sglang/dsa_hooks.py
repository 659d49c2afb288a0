"""SGLang's hook for DeepSeek-V3.2 (DSA): which sparse attention kernel a prefill takes over an FP8 cache.

SGLang decides per forward on Blackwell, with ``--dsa-prefill-backend flashmla_auto``; on Hopper it always takes
``flashmla_kv``. ``set_dsa_prefill_impl`` is where it decides, before it builds what depends on it, so the policy sets the
same attribute there: on Hopper too, unless the user named a backend. Whatever SGLang rules out first stays out: dense
attention of short contexts, other modes than a plain extend, caches that are not FP8, context parallelism, sharded or
hierarchical caches. The method means the same in all of 0.5.17 to 0.5.23; what an earlier one does not have yet (a sharded
cache, a pooled index, graphs of whole prefills) rules nothing out there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mla_tune.integrations.engine_process import (
    UNBOUNDED,
    Once,
    Prepared,
    matching_model,
    paged_limit,
    reserve,
    shape_of,
)
from mla_tune.integrations.seams import Hook, Seam, argument, lost
from mla_tune.integrations.sglang.sglang_state import PROCESS, RELEASES, made_up, parallel, records, user_argument
from mla_tune.runtime.counters import Reasons
from mla_tune.runtime.decider import Decider, Service
from mla_tune.sites.candidates import SPARSE_FWD, WITH_KVCACHE
from mla_tune.sites.site import LayerType, SiteName

IMPL = {SPARSE_FWD.name: "flashmla_sparse", WITH_KVCACHE.name: "flashmla_kv"}
"""SGLang's names of the candidates. With an FP8 cache ``flashmla_sparse`` dequantizes the rows first, as ours does."""
AUTO = "flashmla_auto"
_ROW_BYTES = 2 * 576
"""A dequantized cache row, which ``flashmla_sparse`` has one of for every context token."""
_MOST_ROWS = 1 << 21
"""Rows that memory is reserved for, 2.3 GiB. Forwards of longer contexts keep SGLang's own choice."""
_STATE = "_mla_tune"
_GRAPHS = "sglang.srt.model_executor.runner_backend_utils.tc_piecewise_cuda_graph"

HOOK = Hook("DeepSeek-V3.2's prefill attention", RELEASES)
INIT = Seam("DeepseekSparseAttnBackend.__init__", ("self", "model_runner"))
SET_IMPL = Seam("DeepseekSparseAttnBackend.set_dsa_prefill_impl", ("self", "forward_batch"))


class DsaChoice:
    """The choice of one backend."""

    __slots__ = ("_decider", "_extend_mode", "_in_graph", "_most_rows", "_once", "_paged_limit", "base")

    def __init__(
        self, decider: Decider, base: str, extend_mode: Any, in_graph: Callable[[], bool], most_rows: int = UNBOUNDED
    ) -> None:
        self._decider = decider
        self.base = base
        """The backend's own ``dsa_prefill_impl``: what a forward finds that nothing is chosen for."""
        self._extend_mode = extend_mode
        self._in_graph = in_graph
        """Whether a piecewise graph is captured or replayed, SGLang's own function."""
        self._most_rows = most_rows
        """Context tokens that there is memory to dequantize, on all ranks alike."""
        self._paged_limit = paged_limit(decider)
        self._once = Once("the choice of the DSA prefill kernel")

    def impl(self, backend: Any, forward_batch: Any) -> str | None:
        """The kernel for this forward, which SGLang has prepared its own choice for; None leaves it."""
        if forward_batch is None or forward_batch.forward_mode is not self._extend_mode or made_up(forward_batch):
            return None
        decider = self._decider
        try:
            reason = decider.kept or self._ruled_out(backend, forward_batch)
            if reason is None:
                return self._of_shape(decider, forward_batch)
            decider.counters.fell_back(reason)
        # Whatever it is, it is ours, and the forward goes on.
        except Exception:
            self._once.report(decider.counters, Reasons.ERROR)
        return None

    def _of_shape(self, decider: Decider, forward_batch: Any) -> str | None:
        num_qo_tokens, kv_tokens, num_reqs = shape_of(
            forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu
        )
        if not num_qo_tokens:
            return None
        if kv_tokens > self._most_rows:
            decider.counters.fell_back(Reasons.NO_MEMORY)
            return None
        rows = forward_batch.extend_num_tokens or 0  # padded in some batches; only a limit may look at padding
        before = decider.counters.out_of_range
        chosen = IMPL[decider(rows if rows > self._paged_limit else num_qo_tokens, kv_tokens, num_reqs)]
        # With flashmla_auto SGLang has a rule of its own on SM100, which prepared an answer: better than a constant.
        own_rule = self.base == AUTO and decider.counters.out_of_range > before
        return None if own_rule else chosen

    def _ruled_out(self, backend: Any, forward_batch: Any) -> str | None:
        """Why the engine itself leaves no choice in this forward; None if it does."""
        if forward_batch.extend_seq_lens_cpu is None or forward_batch.extend_prefix_lens_cpu is None:
            return Reasons.NO_LENGTHS
        gated = (
            backend.use_mha
            or backend.dsa_prefill_impl not in IMPL.values()
            or self._in_graph()
            or getattr(forward_batch, "full_prefill_cuda_graph_capture", False)  # one answer would serve every replay
            or forward_batch.attn_cp_metadata is not None
        )
        return Reasons.GATE if gated else None


def hook_backend(module: Any) -> None:
    """Take hold of the backend's class."""
    extend_mode = module.ForwardMode.EXTEND

    def around_init(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        prepare(instance, argument(args, kwargs, 0, "model_runner"), extend_mode)

    PROCESS.hooks.take(module, HOOK, {INIT: around_init, SET_IMPL: _around_set_impl})


def _around_set_impl(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    choice: DsaChoice | None = instance.__dict__.get(_STATE)
    if choice is None:
        return wrapped(*args, **kwargs)
    instance.dsa_prefill_impl = choice.base  # what an earlier forward was given must not outlive it
    answer = wrapped(*args, **kwargs)
    impl = choice.impl(instance, argument(args, kwargs, 0, "forward_batch"))
    if impl is not None:
        instance.dsa_prefill_impl = impl
    return answer


def prepare(backend: Any, runner: Any, extend_mode: Any) -> None:
    """Give a backend that SGLang has built its choice; none to the draft model's, and where SGLang has no second path."""
    if runner.is_draft_worker:
        return
    named = user_argument(runner.server_args, "dsa_prefill_backend")
    setting = None if named in (None, AUTO) else f"--dsa-prefill-backend {named}"
    found = PROCESS.prepare(
        "the prefill attention of DeepSeek-V3.2",
        setting or "",
        lambda service: _resolved(service, backend, runner, setting),
    )
    if found is not None:
        base = backend.dsa_prefill_impl
        setattr(backend, _STATE, DsaChoice(found.deciders[0], base, extend_mode, _in_graph(backend), found.most_tokens))


def _resolved(service: Service, backend: Any, runner: Any, setting: str | None) -> Prepared:
    layers = runner.model_config.hf_text_config.num_hidden_layers
    kept = _no_second_path(backend, backend.dsa_prefill_impl)
    found = matching_model({LayerType.DSA: layers}, backend.dsa_index_topk, backend.num_q_heads)
    if kept is not None or isinstance(found, str):
        return Prepared(kept=(kept or str(found),))
    model, h_q = found
    decider = service.decider(
        SiteName.PREFILL_ATTENTION,
        model=model.name,
        layer=LayerType.DSA,
        h_q=h_q,
        engine_setting=setting,
        records=records(),
    )
    _in_graph(backend)  # an engine without it is one that the hook does not know
    most_rows = reserve(_MOST_ROWS, lambda rows: rows * _ROW_BYTES) if decider.serves else UNBOUNDED
    return Prepared((decider,), _not_in_force(backend), most_rows)


def _no_second_path(backend: Any, base: str) -> str | None:
    """What of the configuration, fixed at start, leaves one kernel only; None if both run."""
    if not backend.dsa_kv_cache_store_fp8:
        return "DSA without an FP8 cache has one prefill path"
    if base not in (*IMPL.values(), AUTO):
        return f"the DSA prefill backend is {base}"
    if backend.hisparse_coordinator is not None:
        return "HiSparse keeps its own DSA backend"
    if getattr(backend, "_kv_shard_pool", None) is not None or parallel().attn_dcp_size > 1:
        return "a sharded DSA cache has one prefill path"
    if getattr(backend, "dsa_index_kpool", 1) > 1:
        return "a pooled DSA index has one prefill path"
    return None


def _in_graph(backend: Any) -> Callable[[], bool]:
    """SGLang's own ``is_in_tc_piecewise_cuda_graph``, which its backends hold from 0.5.20 on."""
    held: Callable[[], bool] | None = getattr(backend, "_is_in_tc_piecewise_cuda_graph", None)
    if held is not None:
        return held
    from importlib import import_module

    found: Callable[[], bool] = import_module(_GRAPHS).is_in_tc_piecewise_cuda_graph
    return found


def _not_in_force(backend: Any) -> tuple[str, ...]:
    key = f"{type(backend).__module__}:{SET_IMPL.path}"
    return () if PROCESS.hooks.in_force(key, type(backend), SET_IMPL.name) else (lost(backend, SET_IMPL),)
