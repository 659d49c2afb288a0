"""A policy in service: what an engine's integration holds in each process, with the counters and the recording.

    service = Service(Dispatcher.for_this_gpu(fallback="incumbent"))
    attention = service.decider("prefill_attention", model="deepseek-v4-flash", layer="forward", h_q=64)
    ...
    if attention.serves:
        path = attention(num_qo_tokens, kv_tokens, num_reqs)  # once per forward
    else:
        attention.counters.fell_back(attention.kept)  # and the engine's own choice

A decision is integer arithmetic and two dictionary entries: no file, no lock, no device.
"""

from __future__ import annotations

from collections.abc import Callable

from mla_tune.policy.decision import Leaf, Reason
from mla_tune.runtime.counters import Reasons, SiteCounters, prometheus_text
from mla_tune.runtime.dispatcher import Dispatcher, Resolved
from mla_tune.runtime.recording import Record, Recorder
from mla_tune.runtime.switches import Rule
from mla_tune.sites.engines import Engine

_KEPT = {Rule.ENGINE: Reasons.ENGINE_SETTING, Rule.OFF: Reasons.OFF, Rule.INCUMBENT: Reasons.NO_TABLE}


class Decider:
    """One resolved site that counts, and records where it was told to."""

    __slots__ = ("_answer", "_record", "counters", "kept", "resolved", "serves")

    def __init__(self, resolved: Resolved, record: Record | None) -> None:
        self.resolved = resolved
        self.serves = resolved.table is not None
        """Whether the policy or a pin decides. If not, the engine keeps its own choice: call what was there before."""
        self.kept = "" if self.serves else _KEPT[resolved.rule]
        """The reason to count then."""
        answers = (resolved.incumbent,) if resolved.table is None else resolved.table.candidates
        self.counters = SiteCounters(resolved.site, resolved.model, resolved.layer, dict.fromkeys(answers, 0), {})
        self._answer = _always(resolved.incumbent) if resolved.decision is None else resolved.decision.answer
        self._record = record

    def __call__(self, num_qo_tokens: int, kv_tokens: int, num_reqs: int) -> str:
        """The candidate for one forward of ``num_reqs`` requests: host integers, real counts without padding."""
        answer = self._answer(num_qo_tokens, kv_tokens, num_reqs)
        candidate, counters = answer.candidate, self.counters
        counters.choices[candidate] += 1
        if answer.row is None:
            counters.out_of_range += 1
        if self._record is not None:
            self._record(num_qo_tokens, kv_tokens, num_reqs)
        return candidate


def _always(incumbent: str) -> Callable[[int, int, int], Leaf]:
    kept = Leaf(incumbent, Reason.FALLBACK)
    return lambda num_qo_tokens, kv_tokens, num_reqs: kept


class Service:
    """A dispatcher in a serving process."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.deciders: list[Decider] = []
        self._by_choice: dict[tuple[str, str, str, int | None, Engine, str | None], Decider] = {}
        path = dispatcher.switches.record
        self.recorder = None if path is None else Recorder(path)
        if self.recorder is not None:
            self.recorder.start()

    def decider(
        self,
        site: str,
        *,
        model: str,
        layer: str,
        h_q: int | None = None,
        engine: Engine = Engine.SGLANG,
        engine_setting: str | None = None,
        records: bool = True,
    ) -> Decider:
        """Prepare one choice; see :meth:`mla_tune.runtime.Dispatcher.resolve`. Here a miss keeps the incumbent.

        Asked again for the very same choice (site, model, layer, heads, engine and setting), it gives the same decider:
        a process counts each choice once, and backends of other models, heads or settings have tables and limits of their
        own.
        ``records``: False where another decider, or another rank, records the same forwards.
        """
        key = (site, model, layer, h_q, engine, engine_setting)
        known = self._by_choice.get(key)
        if known is not None:
            return known
        found = self.dispatcher.resolve(
            site,
            model=model,
            layer=layer,
            h_q=h_q,
            fallback="incumbent",
            engine=engine,
            engine_setting=engine_setting,
        )
        record = self.recorder.site(found.site, model) if self.recorder is not None and records else None
        decider = Decider(found, record)
        self.deciders.append(decider)
        self._by_choice[key] = decider
        return decider

    def prometheus_text(self) -> str:
        """All counters of this process, in Prometheus' text format."""
        dispatcher = self.dispatcher
        policy = dispatcher.policy
        info = {
            "source": dispatcher.source,
            "digest": dispatcher.digest,
            "sku": "" if policy is None else policy.gpu.sku,
            "evidence": "" if policy is None else policy.evidence,
            "mode": dispatcher.switches.mode,
        }
        return prometheus_text((decider.counters for decider in self.deciders), info)
