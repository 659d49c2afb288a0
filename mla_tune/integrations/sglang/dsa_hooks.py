"""SGLang's hook for DeepSeek-V3.2 (DSA): which sparse attention kernel a prefill takes over an FP8 cache.

SGLang 0.5.23 decides per forward on Blackwell, with ``--dsa-prefill-backend flashmla_auto``; on Hopper it always takes
``flashmla_kv``. ``set_dsa_prefill_impl`` is where it decides, before it builds what depends on it, so the policy sets the
same attribute there: on Hopper too, unless the user named a backend. Whatever SGLang rules out first stays out: dense
attention of short contexts, other modes than a plain extend, caches that are not FP8, context parallelism, sharded or
hierarchical caches.
"""

from __future__ import annotations

from typing import Any

from mla_tune.errors import EnvironmentMismatchError
from mla_tune.integrations.engine_process import Once, matching_model, paged_limit, shape_of
from mla_tune.integrations.seams import Seam
from mla_tune.integrations.sglang.sglang_process import PROCESS, parallel, records
from mla_tune.runtime.counters import Reasons
from mla_tune.runtime.decider import Decider
from mla_tune.sites.candidates import SPARSE_FWD, WITH_KVCACHE
from mla_tune.sites.site import LayerType, SiteName

IMPL = {SPARSE_FWD.name: "flashmla_sparse", WITH_KVCACHE.name: "flashmla_kv"}
"""SGLang's names of the candidates. With an FP8 cache ``flashmla_sparse`` dequantizes the rows first, as ours does."""
AUTO = "flashmla_auto"
_STATE = "_mla_tune"

INIT = Seam("DeepseekSparseAttnBackend.__init__", ("self", "model_runner"))
SET_IMPL = Seam("DeepseekSparseAttnBackend.set_dsa_prefill_impl", ("self", "forward_batch"))


class DsaChoice:
    """The choice of one backend."""

    __slots__ = ("_decider", "_extend_mode", "_once", "_paged_limit", "base")

    def __init__(self, decider: Decider, base: str, extend_mode: Any) -> None:
        self._decider: Decider | None = decider
        self.base = base
        """The backend's own ``dsa_prefill_impl``: what a forward finds that nothing is chosen for."""
        self._extend_mode = extend_mode
        self._paged_limit = paged_limit(decider)
        self._once = Once("the choice of the DSA prefill kernel")

    def impl(self, backend: Any, forward_batch: Any) -> str | None:
        """The kernel for this forward, which SGLang has prepared its own choice for; None leaves it."""
        decider = self._decider
        if decider is None or forward_batch is None or forward_batch.forward_mode is not self._extend_mode:
            return None
        try:
            reason = decider.kept or _ruled_out(backend, forward_batch)
            if reason is None:
                return self._of_shape(decider, forward_batch)
            decider.counters.fell_back(reason)
        # Whatever it is, it is ours, and the forward goes on.
        except Exception:
            self._once.report(decider.counters, Reasons.ERROR)
            self._decider = None
        return None

    def _of_shape(self, decider: Decider, forward_batch: Any) -> str | None:
        shape = shape_of(forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu)
        if not shape[0]:
            return None
        rows = forward_batch.extend_num_tokens or 0  # padded in some batches; only a limit may look at padding
        asked = (rows if rows > self._paged_limit else shape[0], *shape[1:])
        before = decider.counters.out_of_range
        chosen = IMPL[decider(*asked)]
        # With flashmla_auto SGLang has a rule of its own on SM100, which prepared an answer: better than a constant.
        own_rule = self.base == AUTO and decider.counters.out_of_range > before
        return None if own_rule else chosen


def hook_backend(module: Any) -> None:
    """Take hold of the backend's class."""
    extend_mode = module.ForwardMode.EXTEND
    PROCESS.hooks.take(module, {INIT: lambda original: _around_init(original, extend_mode), SET_IMPL: _around_set_impl})


def _around_init(original: Any, extend_mode: Any) -> Any:
    def init(self: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
        original(self, model_runner, *args, **kwargs)
        try:
            setattr(self, _STATE, _choice(self, model_runner, extend_mode))
        except EnvironmentMismatchError:
            raise  # ranks that would not decide alike must not serve
        except Exception:  # ours, not the engine's: it serves as it would without us
            PROCESS.log_failure("preparing the choice of DeepSeek-V3.2")

    return init


def _around_set_impl(original: Any) -> Any:
    def set_dsa_prefill_impl(self: Any, forward_batch: Any = None) -> None:
        choice: DsaChoice | None = self.__dict__.get(_STATE)
        if choice is not None:
            self.dsa_prefill_impl = choice.base  # what an earlier forward was given must not outlive it
        original(self, forward_batch)
        impl = None if choice is None else choice.impl(self, forward_batch)
        if impl is not None:
            self.dsa_prefill_impl = impl

    return set_dsa_prefill_impl


def _ruled_out(backend: Any, forward_batch: Any) -> str | None:
    """Why the engine itself leaves no choice in this forward; None if it does."""
    if forward_batch.extend_seq_lens_cpu is None or forward_batch.extend_prefix_lens_cpu is None:
        return Reasons.NO_LENGTHS
    gated = (
        backend.use_mha
        or backend.dsa_prefill_impl not in IMPL.values()
        or backend._is_in_tc_piecewise_cuda_graph()
        or forward_batch.full_prefill_cuda_graph_capture  # one answer would serve every replay
        or forward_batch.attn_cp_metadata is not None
    )
    return Reasons.GATE if gated else None


def _choice(backend: Any, runner: Any, extend_mode: Any) -> DsaChoice | None:
    """What the policy decides for a backend; None for the draft model's, and where SGLang has no second path."""
    if runner.is_draft_worker:
        return None
    named = getattr(runner.server_args, "dsa_prefill_backend", None)
    setting = None if named in (None, AUTO) else f"--dsa-prefill-backend {named}"
    service = PROCESS.serve(setting or "")
    base = backend.dsa_prefill_impl
    layers = runner.model_config.hf_text_config.num_hidden_layers
    kept = _no_second_path(backend, base)
    found = matching_model({LayerType.DSA: layers}, backend.dsa_index_topk, backend.num_q_heads)
    if kept is not None or isinstance(found, str):
        PROCESS.announce([], [kept or str(found)])
        return None
    model, h_q = found
    decider = service.decider(
        SiteName.PREFILL_ATTENTION,
        model=model.name,
        layer=LayerType.DSA,
        h_q=h_q,
        engine_setting=setting,
        records=records(),
    )
    PROCESS.announce([decider], _not_in_force(backend))
    return DsaChoice(decider, base, extend_mode)


def _no_second_path(backend: Any, base: str) -> str | None:
    """What of the configuration, fixed at start, leaves one kernel only; None if both run."""
    if not backend.dsa_kv_cache_store_fp8:
        return "DSA without an FP8 cache has one prefill path"
    if base not in (*IMPL.values(), AUTO):
        return f"the DSA prefill backend is {base}"
    if backend.hisparse_coordinator is not None:
        return "HiSparse keeps its own DSA backend"
    if backend._kv_shard_pool is not None or parallel().attn_dcp_size > 1:
        return "a sharded DSA cache has one prefill path"
    if backend.dsa_index_kpool > 1:
        return "a pooled DSA index has one prefill path"
    return None


def _not_in_force(backend: Any) -> list[str]:
    module, name = type(backend).__mro__[0].__module__, SET_IMPL.path.rpartition(".")[2]
    if PROCESS.hooks.in_force(f"{module}:{SET_IMPL.path}", getattr(type(backend), name, None)):
        return []
    return [f"{type(backend).__name__}.{name} is somebody else's, who does not call ours"]
