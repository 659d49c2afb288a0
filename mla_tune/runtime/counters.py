"""What a process decided, as counters: plain integers in the decision path, Prometheus text when somebody asks.

    mla_tune_lookups_total{site,model,layer}              decisions that a table was asked for
    mla_tune_choices_total{site,model,layer,candidate}    what they answered
    mla_tune_out_of_range_total{site,model,layer}         of them, those outside the measured ranges
    mla_tune_fallbacks_total{site,model,layer,reason}     decisions left to the engine, by reason
    mla_tune_policy_info{...}                             1; the policy, its digest and evidence, who decides

An engine decides on one thread. Under several threads a count is exact as long as the interpreter has its global lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LABELS = ("site", "model", "layer")

_HELP = {
    "mla_tune_lookups_total": "Decisions that a policy table was asked for.",
    "mla_tune_choices_total": "Answers of policy tables by candidate.",
    "mla_tune_out_of_range_total": "Lookups outside the measured ranges.",
    "mla_tune_fallbacks_total": "Decisions left to the engine by reason.",
}


class Reasons:
    """Why a decision was left to the engine: the values of the label ``reason``."""

    ENGINE_SETTING = "engine_setting"
    """The user set the engine's own switch."""
    OFF = "off"
    NO_TABLE = "no_table"
    """No policy, or none for this model; the log says which."""
    GATE = "engine_gate"
    """The engine's own hard condition rules one path out."""
    NO_TOKENS = "no_tokens"
    NO_LENGTHS = "no_host_lengths"
    """The lengths of the forward are not on the host."""
    PAST_LIMIT = "past_limit"
    """The engine's own crash guard."""
    MOSTLY_DECODE = "mostly_decode"
    """Decodes share the batch and make up most of it, which no table covers."""
    NO_MEMORY = "no_memory"
    """The KV-cache kernel's buffers did not fit; the engine's own path ran."""
    ERROR = "error"
    """A mistake of ours; logged once."""


@dataclass(slots=True, eq=False)
class SiteCounters:
    """The counts of one resolved site."""

    site: str
    model: str
    layer: str
    choices: dict[str, int]
    """Answers by candidate; every candidate of the site has an entry."""
    fallbacks: dict[str, int]
    """By :class:`Reasons`; a reason that has not occurred has no entry."""
    out_of_range: int = 0

    @property
    def lookups(self) -> int:
        """Decisions that the table was asked for."""
        return sum(self.choices.values())

    def fell_back(self, reason: str) -> None:
        """Count one decision that is left to the engine."""
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1


def prometheus_text(sites: Iterable[SiteCounters], info: dict[str, str]) -> str:
    """The text exposition format (version 0.0.4) of ``sites``; ``info`` are the labels of ``mla_tune_policy_info``."""
    samples: dict[str, list[str]] = {name: [] for name in _HELP}
    for of in _summed(sites):
        labels = dict(zip(LABELS, (of.site, of.model, of.layer), strict=True))
        samples["mla_tune_lookups_total"].append(_sample("mla_tune_lookups_total", labels, of.lookups))
        samples["mla_tune_out_of_range_total"].append(_sample("mla_tune_out_of_range_total", labels, of.out_of_range))
        samples["mla_tune_choices_total"] += _by(of.choices, "mla_tune_choices_total", labels, "candidate")
        samples["mla_tune_fallbacks_total"] += _by(of.fallbacks, "mla_tune_fallbacks_total", labels, "reason")
    lines = []
    for name, text in _HELP.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} counter", *samples[name]]
    name = "mla_tune_policy_info"
    lines += [f"# HELP {name} The policy that this process serves.", f"# TYPE {name} gauge", _sample(name, info, 1)]
    return "\n".join(lines) + "\n"


def _summed(sites: Iterable[SiteCounters]) -> Iterable[SiteCounters]:
    """One for each set of labels: choices that differ in heads or settings alone are one series."""
    found: dict[tuple[str, str, str], SiteCounters] = {}
    for of in sites:
        total = found.setdefault((of.site, of.model, of.layer), SiteCounters(of.site, of.model, of.layer, {}, {}))
        for into, counts in ((total.choices, of.choices), (total.fallbacks, of.fallbacks)):
            for name, count in dict(counts).items():
                into[name] = into.get(name, 0) + count
        total.out_of_range += of.out_of_range
    return found.values()


def _by(counts: dict[str, int], name: str, labels: dict[str, str], label: str) -> Iterator[str]:
    for value, count in sorted(dict(counts).items()):
        yield _sample(name, {**labels, label: value}, count)


def _sample(name: str, labels: dict[str, str], value: int) -> str:
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {value}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
