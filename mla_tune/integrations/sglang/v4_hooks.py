"""SGLang's hooks for DeepSeek-V4's backend: which prefill attention each layer takes, and its indexer's schedule.

What SGLang 0.5.22 and 0.5.23 do by themselves: ``_use_sparse_prefill`` is asked once when a forward is prepared (the
*snapshot*) and again in every layer, and answers True for all CUDA prefills without context parallelism. Earlier releases
have no such method, and keep their own choice; of them the schedule alone is chosen (:mod:`.indexer_hooks`).

- Its hard conditions stay: the original is asked with a token count so large that only they can say no.
- The policy sees the lengths of the requests that the scheduler keeps on the host, never ``num_qo_tokens``, which is
  padded in some calls and not in others: one forward gets one answer. Nothing is read from the device.
- Layer types choose for themselves. The snapshot answers True if any of them will: what it builds early must not be
  built late, when the scheduler may already change the tables that it is built from. The reverse wastes a little work.
- A padded count past a limit of the KV-cache kernel is the original's to answer: there its constant guards a crash.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mla_tune.integrations.engine_process import (
    UNBOUNDED,
    Once,
    Prepared,
    matching_model,
    paged_bytes,
    paged_limit,
    reserve,
    shape_of,
    user_set,
)
from mla_tune.integrations.seams import Hook, Seam, argument, lost
from mla_tune.integrations.sglang import indexer_hooks
from mla_tune.integrations.sglang.sglang_state import (
    PROCESS,
    V4_RELEASES,
    chunk_tokens,
    made_up,
    parallel,
    records,
)
from mla_tune.runtime.counters import Reasons
from mla_tune.runtime.decider import Decider, Service
from mla_tune.sites.candidates import PAGED
from mla_tune.sites.site import FORWARD, LayerType, ModelConfig, SiteName

GATES_ONLY = 1 << 62
"""A query count above every constant of the engine: its own choice is yes, so that its hard conditions decide."""
_LAYERS = {0: LayerType.SWA_ONLY, 4: LayerType.C4A, 128: LayerType.C128A}
_STATE = "_mla_tune"
_ATTENTION_SWITCHES = ("SGLANG_OPT_FLASHMLA_SPARSE_PREFILL", "SGLANG_DSV4_Q8KV8_PREFILL")

HOOK = Hook("DeepSeek-V4's prefill attention", V4_RELEASES)
INIT = Seam("DeepseekV4AttnBackend.__init__", ("self", "model_runner"))
USE_SPARSE = Seam("DeepseekV4AttnBackend._use_sparse_prefill", ("self", "forward_batch", "num_qo_tokens"))
LAYER = Seam(
    "DeepseekV4AttnBackend._forward_attention", ("self", "q", "k", "v", "layer", "forward_batch", "compress_ratio")
)


class V4Choices:
    """The choices of one backend. ``layer`` says where in a forward its only thread is."""

    __slots__ = (
        *(
            "_any",
            "_counters",
            "_extend",
            "_kept",
            "_once",
            "_paged_limit",
            "_prefix",
            "_ratios",
            "_serving",
            "_sparse",
        ),
        "layer",
    )

    def __init__(self, deciders: dict[int, Decider], most_tokens: int = UNBOUNDED) -> None:
        """``deciders`` by compress ratio, at least one (all the same one for a choice per forward): all serve or none.

        ``most_tokens``: query tokens that there is memory for in the KV-cache kernel, on all ranks alike.
        """
        first = next(iter(deciders.values()))
        self._serving = deciders if first.serves else {}
        self._kept = first.kept
        self._counters = first.counters
        self.layer: int | None = None
        """Compress ratio of the layer that is running; None in a snapshot."""
        self._extend: list[int] | None = None
        self._prefix: list[int] | None = None
        self._sparse: dict[int, bool] = {}
        self._any = True
        self._paged_limit = min(most_tokens, *(paged_limit(decider) for decider in deciders.values()))
        self._ratios = [
            (decider, [ratio for ratio, of in deciders.items() if of is decider])
            for decider in dict.fromkeys(deciders.values())
        ]
        self._once = Once("the choice of prefill attention")

    def use_sparse(self, original: Callable[..., bool], args: Any, kwargs: dict[str, Any]) -> bool:
        """The answer of the hook; ``original`` is SGLang's own, and takes all that it was asked with."""
        forward_batch, num_qo_tokens = argument(args, kwargs, 0, "forward_batch"), kwargs.get("num_qo_tokens")
        if num_qo_tokens is None or made_up(forward_batch):
            return original(*args, **kwargs)
        if not self._serving:
            self._fell_back(self._kept, forward_batch)
            return original(*args, **kwargs)
        if num_qo_tokens == 0:  # asked in order to be negated: page indices have to be written in any case
            return False
        if not original(*args, **(kwargs | {"num_qo_tokens": GATES_ONLY})):
            if forward_batch.extend_seq_lens_cpu is not None:  # every layer of every decode comes here
                self._fell_back(Reasons.GATE, forward_batch)
            return False
        answer = None
        if num_qo_tokens > self._paged_limit:
            self._fell_back(Reasons.PAST_LIMIT, forward_batch)
        else:
            try:
                answer = self._answer(forward_batch)
            # Whatever it is, it is ours, and the forward goes on.
            except Exception:
                self._once.report(self._counters, Reasons.ERROR)
        return original(*args, **kwargs) if answer is None else answer

    def _answer(self, forward_batch: Any) -> bool | None:
        """The policy's answer, None where it has none: decided once per forward, which its two lists stand for."""
        extend, prefix = forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu
        if extend is None or prefix is None:
            self._counters.fell_back(Reasons.NO_LENGTHS)
            return None
        if extend is not self._extend or prefix is not self._prefix:
            if getattr(forward_batch, "full_prefill_cuda_graph_capture", False):  # one answer would serve every replay
                self._fell_back(Reasons.GATE, forward_batch)
                return None
            self._decide(extend, prefix)
        return self._any if self.layer is None else self._sparse.get(self.layer, self._any)

    def _decide(self, extend: list[int], prefix: list[int]) -> None:
        num_qo_tokens, kv_tokens, num_reqs = shape_of(extend, prefix)
        some = False
        for decider, ratios in self._ratios:
            sparse = decider(num_qo_tokens, kv_tokens, num_reqs) not in PAGED
            some = some or sparse
            for ratio in ratios:
                self._sparse[ratio] = sparse
        self._any = some
        self._extend, self._prefix = extend, prefix

    def _fell_back(self, reason: str, forward_batch: Any) -> None:
        """Count a prefill that the engine decides, once although every layer asks; other forwards have no lengths."""
        extend = forward_batch.extend_seq_lens_cpu
        if extend is not None and extend is not self._extend:
            self._counters.fell_back(reason)
            self._extend, self._prefix = extend, None


def hook_backend(module: Any) -> None:
    """Take hold of the backend's class."""
    attention = PROCESS.hooks.take(
        module, HOOK, {INIT: _around_init, USE_SPARSE: _around_use_sparse, LAYER: _around_layer}
    )
    schedule = PROCESS.hooks.take(
        module, indexer_hooks.HOOK, {INIT: _around_init, indexer_hooks.PREPARE: indexer_hooks.around_prepare}
    )
    _hooked.clear()
    _hooked.update({HOOK.choice: attention, indexer_hooks.HOOK.choice: schedule})


_hooked: dict[str, bool] = {}
"""Which choices of this release's backend are ours to make."""


def _around_init(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    wrapped(*args, **kwargs)
    prepare(instance, argument(args, kwargs, 0, "model_runner"))


def _around_use_sparse(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> bool:
    choices: V4Choices | None = instance.__dict__.get(_STATE)
    return bool(wrapped(*args, **kwargs)) if choices is None else choices.use_sparse(wrapped, args, kwargs)


def _around_layer(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    choices: V4Choices | None = instance.__dict__.get(_STATE)
    if choices is None:
        return wrapped(*args, **kwargs)
    choices.layer = argument(args, kwargs, 5, "compress_ratio")
    try:
        return wrapped(*args, **kwargs)
    finally:
        choices.layer = None


def prepare(backend: Any, runner: Any) -> None:
    """Give a backend that SGLang has built its choices; none to the draft model's, nor for models without tables."""
    if runner.is_draft_worker:
        return  # one or a few swa_only layers, whose answer is always the same
    setting, layers = _attention_setting(backend), dict[int, Decider]()
    switches = filter(None, (setting, *map(user_set, (*_ATTENTION_SWITCHES, indexer_hooks.SWITCH))))

    def resolve(service: Service) -> Prepared:
        found = _model(backend, runner)
        if isinstance(found, str):
            return Prepared(kept=(found,))
        model, h_q, ratios = found
        most_tokens = UNBOUNDED
        if _hooked.get(HOOK.choice):
            layers.update(_by_ratio(service, model, h_q, ratios, setting))
            most_tokens = _reserved(layers, h_q)
        schedule = (indexer_hooks.decider(service, model),) if _hooked.get(indexer_hooks.HOOK.choice) else ()
        return Prepared((*dict.fromkeys(layers.values()), *schedule), _not_in_force(backend), most_tokens)

    prepared = PROCESS.prepare("DeepSeek-V4's kernels", ", ".join(dict.fromkeys(switches)), resolve)
    if prepared is None:
        return
    if layers:
        setattr(backend, _STATE, V4Choices(layers, prepared.most_tokens))
    for decider in prepared.deciders:
        if decider.resolved.site is SiteName.INDEXER_METADATA:
            indexer_hooks.give(backend, decider)


def _model(backend: Any, runner: Any) -> tuple[ModelConfig, int, list[int]] | str:
    """The model of the policy, its padded heads per rank, and the compress ratios of its layers; or why there is none."""
    config = runner.model_config.hf_text_config
    ratios = list(config.compress_ratios)[: config.num_hidden_layers]
    unknown = sorted(set(ratios) - set(_LAYERS))
    if unknown:
        return f"no table is for compress ratios {unknown}, as DeepSeek-V4.1 has them"
    layers = {_LAYERS[ratio]: ratios.count(ratio) for ratio in sorted(set(ratios))}
    heads = runner.model_config.num_attention_heads // parallel().attn_tp_size
    topk = getattr(backend, "index_topk", None)  # from 0.5.21 on
    found = matching_model(layers, config.index_topk if topk is None else topk, heads)
    return found if isinstance(found, str) else (*found, sorted(set(ratios)))


def _by_ratio(
    service: Service, model: ModelConfig, h_q: int, ratios: list[int], setting: str | None
) -> dict[int, Decider]:
    """Who decides for each compress ratio: each layer type its own table, or all of them the whole forward's."""

    def decider(layer: str, *, recorded: bool) -> Decider:
        return service.decider(
            SiteName.PREFILL_ATTENTION,
            model=model.name,
            layer=layer,
            h_q=h_q,
            engine_setting=setting,
            records=recorded and records(),
        )

    found = {ratio: decider(_LAYERS[ratio], recorded=ratio == ratios[0]) for ratio in ratios}
    if all(one.serves for one in found.values()):
        return found
    return dict.fromkeys(found, decider(FORWARD, recorded=True))


def _reserved(layers: dict[int, Decider], h_q: int) -> int:
    """Query tokens of the largest chunk that the KV-cache kernel has memory for; SGLang reserves for its own path alone."""
    if not any(decider.serves for decider in layers.values()):
        return UNBOUNDED
    most = chunk_tokens(min(paged_limit(decider) for decider in layers.values()))
    return reserve(most, lambda tokens: paged_bytes(tokens, h_q))


def _attention_setting(backend: Any) -> str | None:
    """What the user told SGLang about this choice, if anything."""
    for name in _ATTENTION_SWITCHES:
        setting = user_set(name)
        if setting is not None:
            return setting
    chosen = getattr(backend, "dsv4_prefill_backend", "auto")
    return None if chosen in (None, "auto") else f"--dsv4-prefill-backend {chosen}"


def _not_in_force(backend: Any) -> tuple[str, ...]:
    key = next((key for key in PROCESS.hooks.taken if key.endswith(f":{USE_SPARSE.path}")), None)
    if key is None or PROCESS.hooks.in_force(key, type(backend), USE_SPARSE.name):
        return ()
    return (lost(backend, USE_SPARSE),)
