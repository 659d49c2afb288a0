"""A policy for people: one screen by default, every row and threshold on request, CSV for other programs."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import msgspec

from mla_tune import __version__
from mla_tune.cli.output.plain_text import wrapped
from mla_tune.errors import UsageError
from mla_tune.hardware.sku import CPU
from mla_tune.policy.comparison import table_name
from mla_tune.policy.evidence import HeldOut, PolicyEvidence, TableEvidence
from mla_tune.policy.file_form import SCHEMA_VERSION, written_tokens
from mla_tune.policy.preface import TOLD_CONTEXTS, choices_at
from mla_tune.policy.schema import Policy, Row, Table
from mla_tune.policy.threshold import Threshold
from mla_tune.sites.engines import Engine
from mla_tune.sites.site import MODELS


@dataclass(frozen=True, slots=True)
class ShownPolicy:
    """A policy and all that is printed of it."""

    policy: Policy
    name: str
    """Its file, as messages name it."""
    sha256: str = ""
    """Empty where the file is not at hand."""
    stated: PolicyEvidence | None = None
    models: tuple[str, ...] = ()
    """Only these; all where there is none."""
    layers: tuple[str, ...] = ()
    everything: bool = False
    """Every table with all of its rows, and where it all comes from."""
    path: Path | None = None
    """Where the file lies, if :attr:`name` does not say."""
    reader: str = ""
    """The engine that was asked about, and how much of the policy serves it; empty where none was."""
    of_own_engine: bool = False
    """Whether the tables of mla-tune's own engine are asked for."""

    @property
    def detailed(self) -> bool:
        """Whether rows are printed one by one."""
        return self.everything or bool(self.layers)

    @property
    def tables(self) -> list[Table]:
        """What is asked for. Tables of mla-tune's own engine, which no server reads, only on request."""
        asked = [t for t in self.policy.tables if not self.models or t.model in self.models]
        asked = [t for t in asked if not self.layers or t.layer in self.layers]
        hides = not (self.everything or self.of_own_engine)
        return [t for t in asked if not hides or t.engine is not Engine.OWN] or asked


def print_policy(
    shown: ShownPolicy, *, as_csv: bool, as_json: bool, answered_by: dict[str, object] | None = None
) -> None:
    """Print a policy in the form that was asked for. Raises :class:`UsageError` where it has no such table."""
    if as_csv and as_json:
        raise UsageError("a policy is printed in one form: got --csv and --json; pass one of them")
    whole = replace(shown, everything=True)
    if not whole.tables:
        have = ", ".join(f"{name} ({', '.join(layers)})" for name, layers in _layers_of(shown.policy).items())
        wanted = " and ".join(", ".join(words) for words in (shown.models, shown.layers) if words)
        raise UsageError(f"--model and --layer must name tables of {shown.name}: got {wanted}; accepted: {have}")
    if as_json:
        tables = msgspec.structs.replace(shown.policy, tables=tuple(whole.tables))
        told = policy_json(tables, shown.stated, shown.name)
        print(json.dumps(told if answered_by is None else {**told, "answered_by": answered_by}))
    elif as_csv:
        print(policy_csv(whole), end="")
    else:
        print("\n".join(policy_text(shown)))


def policy_summary(policy: Policy, stated: PolicyEvidence | None, path: str, as_json: bool) -> None:
    """A policy that was just made, as ``policy show`` prints it."""
    print_policy(ShownPolicy(policy, path, stated=stated), as_csv=False, as_json=as_json)


def _layers_of(policy: Policy) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for table in policy.tables:
        if table.layer not in found.setdefault(table.model, []):
            found[table.model].append(table.layer)
    return found


def policy_json(policy: Policy, stated: PolicyEvidence | None, path: str) -> dict[str, object]:
    """A policy, where it lies and what stands beside it, for scripts."""
    return {"path": path, **msgspec.to_builtins(policy), "justified_by": msgspec.to_builtins(stated)}


def policy_text(shown: ShownPolicy, width: int | None = None) -> list[str]:
    """The lines that ``policy show`` prints."""
    return list(wrapped(_lines(shown), width, hang=10))


def _lines(shown: ShownPolicy) -> Iterator[str]:
    yield from _head(shown)
    yield ""
    if shown.detailed:
        for table in shown.tables:
            yield from _detailed(table, shown.stated.of(table) if shown.stated else None)
            yield ""
    else:
        yield from _overview(shown.tables)
        yield from _bounds(shown)
    yield f"verdict   {_verdict(shown.policy, shown.stated)}"


def _head(shown: ShownPolicy) -> Iterator[str]:
    policy, environment, source = shown.policy, shown.policy.environment, shown.policy.source
    sha256 = f", sha256 {shown.sha256[:12]}" if shown.sha256 else ""
    yield f"GPU       {', '.join(policy.gpu.skus)}, {policy.gpu.sm_count} {'threads' if policy.gpu.sku == CPU else 'SMs'}"
    yield f"policy    {shown.name} (schema {SCHEMA_VERSION}{sha256})"
    yield f"provider  {f'kernels of {policy.provider}' if policy.provider else 'own: the kernels of mla-tune'}"
    if shown.reader:
        yield f"engine    {shown.reader}"
    whose = f"modelled from {policy.scaled_from}" if policy.scaled_from else policy.evidence
    yield f"evidence  {whose}: {source.measurements} timings ({policy.regime}), {source.file} ({source.sha256[:12]})"
    libraries = (
        ", ".join(f"{library.name} {library.version}" for library in environment.libraries) or "no kernel library"
    )
    yield f"builds    {libraries}"
    context = (("driver", environment.driver), ("torch", environment.torch), ("triton", environment.triton))
    yield f"context   {', '.join(f'{name} {version}' for name, version in context if version)} (no condition)"
    yield f"date      {_date(shown.path or Path(shown.name))}"
    if shown.everything:
        yield f"made by   {source.command}"


def _date(path: Path) -> str:
    """When the file was committed or written. A policy holds no date, since it rebuilds byte for byte."""
    if not path.is_file():
        return f"shipped with mla-tune {__version__}"
    day, changed = _git(path, "log", "-1", "--format=%cs"), _git(path, "status", "--porcelain")
    if day:
        return f"committed {day}{', changed since' if changed else ''}"
    return f"written {datetime.fromtimestamp(path.stat().st_mtime, UTC):%Y-%m-%d}"


def _git(path: Path, *words: str) -> str:
    """What git says of a file; empty where it has nothing to say."""
    try:
        command = ["git", "-C", str(path.resolve().parent), *words, "--", path.name]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""


def _overview(tables: Sequence[Table]) -> Iterator[str]:
    """A line for each site, model and layer: what one request of some context gets."""
    yield "paths     by query tokens, for one request of 8K, 128K or 1M context tokens"
    groups: list[tuple[str, str, list[str]]] = []
    for (site, model, engine), members in groupby(tables, lambda of: (of.site, of.model, of.engine)):
        name = model if engine is Engine.SGLANG else f"{model} in {engine}"
        by_heads = [(h_q, _by_layer(list(of))) for h_q, of in groupby(members, lambda of: of.h_q)]
        if by_heads[0][0] is not None and all(len(texts) == 1 for _, texts in by_heads):
            groups.append((name, site, [f"  {h_q} heads: {next(iter(texts))}" for h_q, texts in by_heads]))
            continue
        for h_q, texts in by_heads:
            lines = [f"  {'all' if len(texts) == 1 else ', '.join(layers)}: {text}" for text, layers in texts.items()]
            groups.append((name if h_q is None else f"{name}, {h_q} heads", site, lines))
    for (site, lines), alike in groupby(groups, lambda group: group[1:]):
        yield f"{'; '.join(name for name, _, _ in alike)}: {site}"
        yield from lines


def _by_layer(tables: Sequence[Table]) -> dict[str, list[str]]:
    """What the layers get in words, those that get the same together."""
    texts: dict[str, list[str]] = {}
    for table in tables:
        texts.setdefault(in_words(table), []).append(table.layer)
    return texts


def in_words(table: Table) -> str:
    """``sparse_fwd from 12 at 8K, 29 at 128K, else with_kvcache``: what one request of some context gets."""
    never = "".join(
        f" ({entry.candidate} never: a first call takes {entry.first_call_s:.1f} s)" for entry in table.ineligible
    )
    if {limit.candidate for limit in table.limits} == set(table.candidates):
        return "no path runs at every length"
    low, high = table.measured.kv_tokens
    longest = min(high, MODELS[table.model].max_context)
    contexts = [kv for kv in TOLD_CONTEXTS if low <= kv <= longest] or [low]
    found = [choices_at(table, kv) for kv in contexts]
    names = {tuple(candidate for _, candidate in choices) for choices in found}
    if names == {(found[0][0][1],)}:
        return f"{found[0][0][1]}{never}"
    if len(names) == 1 and len(found[0]) == 2:
        counts = ", ".join(
            f"{choices[1][0]} at {written_tokens(kv)}" for kv, choices in zip(contexts, found, strict=True)
        )
        return f"{found[0][1][1]} from {counts}, else {found[0][0][1]}{never}"
    told: dict[str, list[str]] = {}
    for kv, choices in zip(contexts, found, strict=True):
        (_, first), *rest = choices
        text = ", ".join([first, *(f"{name} from {count}" for count, name in rest)])
        told.setdefault(text, []).append(str(written_tokens(kv)))
    return "; ".join(f"at {' and '.join(at)} {text}" for text, at in told.items()) + never


def _bounds(shown: ShownPolicy) -> Iterator[str]:
    """Limits of the shown tables in one line, and what is left for the options."""
    limits: dict[str, set[int]] = {}
    for table in shown.tables:
        for limit in table.limits:
            limits.setdefault(limit.candidate, set()).add(limit.num_qo_tokens)
    ends = [f"{name} {_least_and_most(most)}" for name, most in limits.items()]
    if ends:
        yield f"limits    most query tokens: {'; '.join(ends)}"
    caps = (
        [entry for entry in shown.stated.tables if entry.workspace_cap and entry.workspace_cap.over]
        if shown.stated
        else []
    )
    if caps:
        yield f"cap       {len(caps)} tables keep a workspace cap: --all shows where"
    hidden = len(shown.policy.tables) - len(shown.tables)
    if hidden and not shown.models:
        yield f"more      {hidden} tables of mla-tune's own engine: --all"


def _least_and_most(limits: set[int]) -> str:
    return str(min(limits)) if len(limits) == 1 else f"{min(limits)} to {max(limits)}, by layer"


def _verdict(policy: Policy, stated: PolicyEvidence | None) -> str:
    if policy.scaled_from is not None:
        widths = [entry.relative for table in stated.tables for entry in table.uncertainty] if stated else []
        off = (
            f"a cost may be off by exp({min(widths):.2f}) to exp({max(widths):.2f}) both ways"
            if widths
            else "costs may be off"
        )
        skus = ", ".join(policy.gpu.skus)
        return f"not judged: modelled; nothing was timed on {skus}; {off}; sweep before you rely on it"
    if stated is None:
        return "not judged: there is no evidence beside this policy"
    if stated.overall is None:
        return "not judged: no attention table has two paths to choose from"
    return _rules(stated.overall, only="always ")


def _rules(judged: HeldOut, only: str = "") -> str:
    """``takes 1.001 times the time of the fastest path (worst 1.03) ...``, and the rules that begin with ``only``."""
    ours, *others = (rule for rule in judged.slowdown if rule is judged.slowdown[0] or rule.rule.startswith(only))
    rest = "".join(f"; {rule.rule}: {rule.mean:.3f} ({rule.worst:.2f})" for rule in others)
    return (
        f"takes {ours.mean:.3f} times the time of the fastest path (worst {ours.worst:.2f}) on {judged.points} held-out "
        f"shapes{rest}"
    )


def _detailed(table: Table, evidence: TableEvidence | None) -> Iterator[str]:
    """Every row of a table, its range, its limits and its judgement."""
    yield table_name(table)
    for index, row in enumerate(table.rows):
        requests, context = max(row.num_reqs_from, 1), written_tokens(row.kv_tokens_from)
        yield f"  from {requests} requests, {context} context: {_choices(row, evidence, index)}"
    measured = table.measured
    context = " to ".join(str(written_tokens(end)) for end in measured.kv_tokens)
    yield (
        f"  measured: query tokens {measured.num_qo_tokens[0]} to {measured.num_qo_tokens[1]}, context {context}, requests "
        f"{measured.num_reqs[0]} to {measured.num_reqs[1]}; elsewhere {table.incumbent}"
    )
    yield f"  builds: {', '.join(table.builds) or 'none'}{''.join(_own_builds(table))}"
    fails = {limit.candidate: limit.fails_at for limit in evidence.limits} if evidence else {}
    for limit in table.limits:
        seen = f", fails at {fails[limit.candidate]}" if limit.candidate in fails else ""
        yield f"  limit: {limit.candidate} up to {limit.num_qo_tokens} query tokens{seen}"
    for entry in table.ineligible:
        yield f"  not served: {entry.candidate}: a first call on a new shape takes {entry.first_call_s:.1f} s"
    if evidence is not None:
        yield from _judged(table, evidence)


def _own_builds(table: Table) -> Iterator[str]:
    for entry in table.candidate_builds:
        yield f"; {entry.candidate} also {', '.join(entry.builds)}"


def _judged(table: Table, evidence: TableEvidence) -> Iterator[str]:
    cap = evidence.workspace_cap
    if cap is not None and cap.over:
        yield (
            f"  workspace cap: at most {cap.max_bytes} bytes bar a candidate around {cap.over} of {cap.shapes} shapes; "
            f"around {cap.exempt} of them no candidate is surely under it and {table.incumbent} stays"
        )
    for entry in evidence.uncertainty:
        yield f"  modelled cost of {entry.candidate}: may be off by exp({entry.relative:.2f}) both ways"
    if evidence.held_out.slowdown:
        yield f"  held out: {_rules(evidence.held_out)}"


def _choices(row: Row, evidence: TableEvidence | None, index: int) -> str:
    first, *rest = row.choices
    parts = [first.candidate]
    for at, choice in enumerate(rest):
        bracket = ""
        if evidence is not None and index < len(evidence.rows) and at < len(evidence.rows[index].thresholds):
            low, high = evidence.rows[index].thresholds[at].bracket
            bracket = f" [x {low:g} to {high:g}]"
        parts.append(f"{choice.candidate} from {_threshold(choice.threshold)}{bracket}")
    return "; ".join(parts)


def _threshold(threshold: Threshold) -> str:
    low, high = threshold.num_qo_tokens
    if threshold.is_level:
        return str(low)
    start, end = map(written_tokens, threshold.kv_tokens)
    return f"{low} at {start} rising to {high} at {end}"


_COLUMNS = (
    *("site", "model", "engine", "h_q", "layer", "requests_from", "context_from", "take", "query_tokens_from"),
    *(
        "context_at_end",
        "query_tokens_at_end",
        "incumbent",
        "limit",
        "held_out_points",
        "mean_slowdown",
        "worst_slowdown",
    ),
)


def policy_csv(shown: ShownPolicy) -> str:
    """A line for each choice of the tables that are asked for, with plain numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for table in shown.tables:
        judged = shown.stated.of(table) if shown.stated else None
        writer.writerows(_csv_rows(table, judged.held_out if judged else None))
    return out.getvalue()


def _csv_rows(table: Table, judged: HeldOut | None) -> Iterable[Sequence[object]]:
    limits = {limit.candidate: limit.num_qo_tokens for limit in table.limits}
    own = judged.slowdown[0] if judged and judged.slowdown else None
    for row in table.rows:
        for choice in row.choices:
            line = choice.threshold
            end = ("", "") if line.is_level else (line.kv_tokens[1], line.num_qo_tokens[1])
            start = row.kv_tokens_from if line.is_level else line.kv_tokens[0]
            yield (
                *(table.site, table.model, table.engine, table.h_q or "", table.layer, row.num_reqs_from, start),
                *(choice.candidate, line.num_qo_tokens[0], *end, table.incumbent, limits.get(choice.candidate, "")),
                *((judged.points, own.mean, own.worst) if judged and own else ("", "", "")),
            )
