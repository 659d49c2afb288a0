"""SGLang's hooks for DeepSeek-V4: which prefill attention each layer takes, and who plans the indexer's schedule.

What SGLang 0.5.23 does by itself: ``_use_sparse_prefill`` is asked once when a forward is prepared (the *snapshot*) and
again in every layer, and answers True for all CUDA prefills without context parallelism.

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

from mla_tune.errors import EnvironmentMismatchError
from mla_tune.integrations.engine_process import Once, matching_model, paged_limit, shape_of, user_set
from mla_tune.integrations.seams import Seam
from mla_tune.integrations.sglang.sglang_process import PROCESS, parallel, records
from mla_tune.runtime.counters import Reasons
from mla_tune.runtime.decider import Decider
from mla_tune.sites.candidates import DEEP_GEMM, PAGED
from mla_tune.sites.site import FORWARD, LayerType, SiteName

GATES_ONLY = 1 << 62
"""A query count above every constant of the engine: its own choice is yes, so that its hard conditions decide."""
_LAYERS = {0: LayerType.SWA_ONLY, 4: LayerType.C4A, 128: LayerType.C128A}
_STATE = "_mla_tune"
_ATTENTION_SWITCHES = ("SGLANG_OPT_FLASHMLA_SPARSE_PREFILL", "SGLANG_DSV4_Q8KV8_PREFILL")
_METADATA_SWITCH = "SGLANG_OPT_USE_JIT_INDEXER_METADATA"

BACKEND = "sglang.srt.layers.attention.deepseek_v4_backend:DeepseekV4AttnBackend"
INIT = Seam("DeepseekV4AttnBackend.__init__", ("self", "model_runner"))
USE_SPARSE = Seam("DeepseekV4AttnBackend._use_sparse_prefill", ("self", "forward_batch", "num_qo_tokens"))
LAYER = Seam(
    "DeepseekV4AttnBackend._forward_attention", ("self", "q", "k", "v", "layer", "forward_batch", "compress_ratio")
)
PREPARE = Seam("DeepseekV4AttnBackend._build_forward_metadata", ("self", "forward_batch"))
SCHEDULE = Seam("get_paged_mqa_logits_metadata", ("seq_lens", "page_size", "num_sm"))


class V4Choices:
    """The choices of one backend. ``layer`` and ``shape`` say where in a forward its only thread is."""

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
        *("indexer", "layer", "shape"),
    )

    def __init__(self, deciders: dict[int, Decider], indexer: Decider | None) -> None:
        """``deciders`` by compress ratio, at least one (all the same one for a choice per forward): all serve or none."""
        first = next(iter(deciders.values()))
        self._serving = deciders if first.serves else {}
        self._kept = first.kept
        self._counters = first.counters
        self.indexer = indexer
        self.layer: int | None = None
        """Compress ratio of the layer that is running; None in a snapshot."""
        self.shape: tuple[int, int, int] | None = None
        """Query tokens, context tokens and requests of the prefill whose metadata is being built."""
        self._extend: list[int] | None = None
        self._prefix: list[int] | None = None
        self._sparse: dict[int, bool] = {}
        self._any = True
        self._paged_limit = min(paged_limit(decider) for decider in deciders.values())
        self._ratios = [
            (decider, [ratio for ratio, of in deciders.items() if of is decider])
            for decider in dict.fromkeys(deciders.values())
        ]
        self._once = Once("the choice of prefill attention")

    def use_sparse(self, original: Callable[..., bool], backend: Any, forward_batch: Any, num_qo_tokens: int) -> bool:
        """The answer of the hook; ``original`` is SGLang's own."""
        if not self._serving:
            self._fell_back(self._kept, forward_batch)
            return original(backend, forward_batch, num_qo_tokens=num_qo_tokens)
        if num_qo_tokens == 0:  # asked in order to be negated: page indices have to be written in any case
            return False
        if not original(backend, forward_batch, num_qo_tokens=GATES_ONLY):
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
                self._serving, self._kept = {}, Reasons.ERROR
        return original(backend, forward_batch, num_qo_tokens=num_qo_tokens) if answer is None else answer

    def _answer(self, forward_batch: Any) -> bool | None:
        """The policy's answer, None where it has none: decided once per forward, which its two lists stand for."""
        extend, prefix = forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu
        if extend is None or prefix is None:
            self._counters.fell_back(Reasons.NO_LENGTHS)
            return None
        if extend is not self._extend or prefix is not self._prefix:
            if forward_batch.full_prefill_cuda_graph_capture:  # one answer would serve every replay
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
    PROCESS.hooks.take(
        module, {INIT: _around_init, USE_SPARSE: _around_use_sparse, LAYER: _around_layer, PREPARE: _around_prepare}
    )


def hook_metadata(module: Any) -> None:
    """Take hold of SGLang's own schedule kernel, which is imported from its package at every call."""
    PROCESS.hooks.take(module, {SCHEDULE: _around_schedule})


_preparing: list[V4Choices] = []
"""The choices of the backend that builds metadata now, at most one; the schedule function knows no backend."""


def _around_init(original: Any) -> Any:
    def init(self: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
        original(self, model_runner, *args, **kwargs)
        try:
            setattr(self, _STATE, _choices(self, model_runner))
        except EnvironmentMismatchError:
            raise  # ranks that would not decide alike must not serve
        except Exception:  # ours, not the engine's: it serves as it would without us
            PROCESS.log_failure("preparing the choices of DeepSeek-V4")

    return init


def _around_use_sparse(original: Any) -> Any:
    def use_sparse_prefill(self: Any, forward_batch: Any, *, num_qo_tokens: int) -> bool:
        choices: V4Choices | None = self.__dict__.get(_STATE)
        if choices is None:
            return bool(original(self, forward_batch, num_qo_tokens=num_qo_tokens))
        return choices.use_sparse(original, self, forward_batch, num_qo_tokens)

    return use_sparse_prefill


def _around_layer(original: Any) -> Any:
    def forward_attention(
        self: Any,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        compress_ratio: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        choices: V4Choices | None = self.__dict__.get(_STATE)
        if choices is None:
            return original(self, q, k, v, layer, forward_batch, compress_ratio, *args, **kwargs)
        choices.layer = compress_ratio
        try:
            return original(self, q, k, v, layer, forward_batch, compress_ratio, *args, **kwargs)
        finally:
            choices.layer = None

    return forward_attention


def _around_prepare(original: Any) -> Any:
    def build_forward_metadata(self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        choices: V4Choices | None = self.__dict__.get(_STATE)
        extend, prefix = forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu
        if choices is None or choices.indexer is None or extend is None or prefix is None:
            return original(self, forward_batch, *args, **kwargs)
        if not forward_batch.forward_mode.is_extend_without_speculative():
            return original(self, forward_batch, *args, **kwargs)
        choices.shape = shape_of(extend, prefix)
        _preparing.append(choices)
        try:
            return original(self, forward_batch, *args, **kwargs)
        finally:
            _preparing.clear()

    return build_forward_metadata


def _around_schedule(original: Any) -> Any:
    def get_paged_mqa_logits_metadata(seq_lens: Any, page_size: int, num_sm: int) -> Any:
        choices = _preparing[0] if _preparing else None
        if choices is not None and choices.indexer is not None and choices.shape is not None:
            num_qo_tokens, kv_tokens, num_reqs = choices.shape
            # What a limit bounds are the rows of this call: all of a padded batch, or one chunk of it.
            rows = max(num_qo_tokens, seq_lens.shape[0])
            if choices.indexer(rows, kv_tokens, num_reqs) == DEEP_GEMM.name:
                from deep_gemm import get_paged_mqa_logits_metadata as theirs

                return theirs(seq_lens, page_size, num_sm)
        return original(seq_lens, page_size, num_sm)

    return get_paged_mqa_logits_metadata


def _choices(backend: Any, runner: Any) -> V4Choices | None:
    """What the policy decides for a backend; None for the draft model's, and for models that it knows nothing of."""
    if runner.is_draft_worker:
        return None  # one or a few swa_only layers, whose answer is always the same
    switches = list(filter(None, (*map(user_set, _ATTENTION_SWITCHES), user_set(_METADATA_SWITCH))))
    service = PROCESS.serve(", ".join(switches))
    config = runner.model_config.hf_text_config
    ratios = list(config.compress_ratios)[: config.num_hidden_layers]
    unknown = sorted(set(ratios) - set(_LAYERS))
    if unknown:
        PROCESS.announce([], [f"no table is for compress ratios {unknown}, as DeepSeek-V4.1 has them"])
        return None
    layers = {_LAYERS[ratio]: ratios.count(ratio) for ratio in sorted(set(ratios))}
    heads = runner.model_config.num_attention_heads // parallel().attn_tp_size
    found = matching_model(layers, backend.index_topk, heads)
    if isinstance(found, str):
        PROCESS.announce([], [found])
        return None
    model, h_q = found

    def decider(site: SiteName, layer: str, setting: str | None, *, recorded: bool = False) -> Decider:
        heads = h_q if site is SiteName.PREFILL_ATTENTION else None
        of_this_rank = recorded and records()
        return service.decider(
            site, model=model.name, layer=layer, h_q=heads, engine_setting=setting, records=of_this_rank
        )

    setting = _attention_setting(backend)
    by_layer = {
        ratio: decider(SiteName.PREFILL_ATTENTION, layer, setting, recorded=layer is next(iter(layers)))
        for ratio, layer in _LAYERS.items()
        if layer in layers
    }
    if not all(one.serves for one in by_layer.values()):
        whole = decider(SiteName.PREFILL_ATTENTION, FORWARD, setting, recorded=True)
        by_layer = dict.fromkeys(by_layer, whole)
    indexer = decider(SiteName.INDEXER_METADATA, LayerType.C4A, user_set(_METADATA_SWITCH))
    PROCESS.announce([*dict.fromkeys(by_layer.values()), indexer], _not_in_force(backend))
    return V4Choices(by_layer, indexer if indexer.serves else None)


def _attention_setting(backend: Any) -> str | None:
    """What the user told SGLang about this choice, if anything."""
    for name in _ATTENTION_SWITCHES:
        setting = user_set(name)
        if setting is not None:
            return setting
    chosen = getattr(backend, "dsv4_prefill_backend", "auto")
    return None if chosen in (None, "auto") else f"--dsv4-prefill-backend {chosen}"


def _not_in_force(backend: Any) -> list[str]:
    name = USE_SPARSE.path.rpartition(".")[2]
    key = f"{BACKEND.partition(':')[0]}:{USE_SPARSE.path}"
    if PROCESS.hooks.in_force(key, getattr(type(backend), name, None)):
        return []
    return [f"{type(backend).__name__}.{name} is somebody else's, who does not call ours"]
