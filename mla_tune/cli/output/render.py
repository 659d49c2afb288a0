"""What the commands print: tables for people, JSON for scripts."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.table import Table as RichTable

from mla_tune.errors import GoalMissedError
from mla_tune.hardware.sku import CPU
from mla_tune.policy.evidence import HeldOut, PolicyEvidence, RowEvidence, TableEvidence
from mla_tune.policy.file_form import SCHEMA_VERSION, written_tokens
from mla_tune.policy.schema import Policy, Row, Table
from mla_tune.policy.threshold import Threshold
from mla_tune.sites.engines import Engine
from mla_tune.sites.provider import OWN
from mla_tune.sites.stages import KernelSource

if TYPE_CHECKING:
    from mla_tune.cli.answering import Answering
    from mla_tune.fit.evaluation import LostTable, Weighted
    from mla_tune.fit.explanation import Explanation
    from mla_tune.policy.decision import ExplainedChoice
    from mla_tune.runtime.dispatcher import Resolved
    from mla_tune.store.database import EnvironmentSummary

# Tables wider than a narrow pipe would be cut: where there is no terminal there is no width to fit into.
console = Console() if Console().is_terminal else Console(width=160)
status = Console(stderr=True)


def header(found: Answering) -> None:
    """Which policy, GPU, provider and evidence answer."""
    for line in found.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def choice(found: Answering, resolved: Resolved, answer: ExplainedChoice, as_json: bool) -> None:
    """What is taken at one shape, and who decides it."""
    if as_json:
        told = {**asdict(answer), "rule": resolved.rule, "kept": resolved.fallback}
        print(json.dumps({**told, "answered_by": found.as_json()}))
        return
    header(found)
    why = f"because: {_because(answer, None)}"
    if resolved.fallback is not None:  # of a file from which nothing serves, the first line has said why
        kept = "nothing serves it" if resolved.fallback == found.dispatcher.source else resolved.fallback
        why = f"{found.word}'s own, which stays: {kept}"
    console.print(f"choice: {answer.candidate}, {why}", highlight=False, markup=False, soft_wrap=True)


def policy_summary(policy: Policy, stated: PolicyEvidence | None) -> None:
    """The thresholds of a policy and how it did on points that the fit did not see, as ``stated`` has it."""
    title = f"{policy.gpu.sku}, {policy.gpu.sm_count} {_units(policy)}, {policy.evidence}, {policy.regime} time"
    table = RichTable(
        "site", "model", "h_q", "layer", "num_reqs", "kv_tokens", "choice by num_qo_tokens", "slowdown", title=title
    )
    for entry in policy.tables:
        evidence = stated.of(entry) if stated else None
        for index, row in enumerate(entry.rows):
            head = _head(entry) if index == 0 else ("", "", "", "")
            slowdown = _slowdown_text(evidence) if index == 0 else ""
            where = f">= {row.num_reqs_from}", f">= {written_tokens(row.kv_tokens_from)}"
            text = choices_text(row, evidence.rows[index] if evidence else None)
            table.add_row(*head, *where, text, slowdown, end_section=row is entry.rows[-1])
    console.print(table)
    if policy.scaled_from is None:
        console.print(
            "slowdown: mean / worst against the faster measured candidate, on held-out points", highlight=False
        )
    else:
        _modelled(policy, stated)
    for line in dict.fromkeys(_barred(policy, stated)):
        console.print(line, highlight=False)


def _modelled(policy: Policy, stated: PolicyEvidence | None) -> None:
    """What a modelled policy rests on, and how sure it is."""
    widths = [entry.relative for table in stated.tables for entry in table.uncertainty] if stated else []
    off = f"exp({min(widths):.2f}) to exp({max(widths):.2f})" if widths else "an unknown factor"
    console.print(
        f"modelled: scaled from {policy.scaled_from}; nothing was timed on {', '.join(policy.gpu.skus)}. A predicted cost "
        f"may be off by {off} both ways; where two intervals meet the engine's own choice stays",
        highlight=False,
    )


def _barred(policy: Policy, stated: PolicyEvidence | None) -> Iterator[str]:
    """What may not serve, or not everywhere."""
    for table in policy.tables:
        evidence = stated.of(table) if stated else None
        found = {limit.candidate: limit.fails_at for limit in evidence.limits} if evidence else {}
        for limit in table.limits:
            heads = f", {table.h_q} heads" if table.h_q else ""
            fails = f", fails at {found[limit.candidate]}" if limit.candidate in found else ""
            yield (
                f"limit: {limit.candidate} ({table.site}, {table.layer}{heads}) up to {limit.num_qo_tokens} query "
                f"tokens{fails}"
            )
        if evidence is not None and (cap := evidence.workspace_cap) is not None and cap.over:
            yield (
                f"workspace cap: {table.model}{f', {table.h_q} heads' if table.h_q else ''}, {table.layer}: at most "
                f"{cap.max_bytes} bytes bar a candidate around {cap.over} of {cap.shapes} shapes; around {cap.exempt} of "
                f"them no candidate is surely under it and {table.incumbent} stays"
            )
        for entry in table.ineligible:
            bound = f", above {stated.first_call_bound_s:g} s (--first-call-bound)" if stated else ""
            yield (
                f"not served: {entry.candidate} ({table.site}): the first call on a new shape takes "
                f"{entry.first_call_s:.1f} s{bound}"
            )


def _units(policy: Policy) -> str:
    return "threads" if policy.gpu.sku == CPU else "SMs"


def note(line: str) -> None:
    """A line on standard error about what was done or comes next."""
    status.print(line, highlight=False, markup=False, soft_wrap=True)


def warn(line: str) -> None:
    """One line on standard error that does not stop the command."""
    status.print(f"warning: {line}", highlight=False, soft_wrap=True)


def policy_json(policy: Policy, stated: PolicyEvidence | None, path: str) -> dict[str, object]:
    """A policy, where it lies and what stands beside it, for scripts."""
    return {"path": path, **msgspec.to_builtins(policy), "justified_by": msgspec.to_builtins(stated)}


def _head(table: Table) -> tuple[str, str, str, str]:
    return table.site, model_text(table), str(table.h_q or "-"), table.layer


def model_text(table: Table) -> str:
    """``deepseek-v3.2 (vllm)`` where the table is another engine's than SGLang's."""
    return table.model if table.engine is Engine.SGLANG else f"{table.model} ({table.engine})"


def choices_text(row: Row, evidence: RowEvidence | None = None) -> str:
    """``with_kvcache; sparse_fwd from 15 at 1K rising to 54 at 80K [x 0.9, x 1.1]``: thresholds and their brackets."""
    first, *rest = row.choices
    parts = [first.candidate]
    for index, choice in enumerate(rest):
        bracket = f" [x {', x '.join(f'{end:g}' for end in evidence.thresholds[index].bracket)}]" if evidence else ""
        parts.append(f"{choice.candidate} from {threshold_text(choice.threshold)}{bracket}")
    if rest or evidence is None:
        return "; ".join(parts)
    if evidence.censored:
        return f"{first.candidate} (crossover {evidence.censored} the measured range)"
    return f"{first.candidate} (no crossover here)"


def threshold_text(threshold: Threshold) -> str:
    """``15 at 1K rising to 54 at 80K``."""
    low, high = threshold.num_qo_tokens
    if threshold.is_level:
        return str(low)
    start, end = map(written_tokens, threshold.kv_tokens)
    return f"{low} at {start} rising to {high} at {end}"


def _slowdown_text(evidence: TableEvidence | None) -> str:
    if evidence is None or not evidence.held_out.slowdown:
        return "not judged"
    own = evidence.held_out.slowdown[0]
    return f"{own.mean:.3f} / {own.worst:.2f} ({evidence.held_out.points} pts)"


def held_out(policy: Policy, stated: PolicyEvidence | None) -> None:
    """Slowdown of the policy and of every baseline rule, table by table."""
    if stated is None:
        console.print("no evidence beside this policy: its held-out points are not known", highlight=False)
        return
    for entry in filter(None, map(stated.of, policy.tables)):
        if not entry.held_out.points:
            continue
        engine = "" if entry.engine is Engine.SGLANG else f" ({entry.engine})"
        where = f"{entry.site}, {entry.model}{engine}, h_q {entry.h_q or '-'}, {entry.layer}"
        console.print(_rules_table(entry.held_out, f"{where}: {entry.held_out.points} held-out points"))


def provenance(policy: Policy, source: str) -> None:
    """Where a policy comes from."""
    environment = policy.environment
    libraries = (
        ", ".join(f"{library.name} {library.version}" for library in environment.libraries) or "no kernel library"
    )
    kernels = f", around attention the kernels of {policy.provider}" if policy.provider else ""
    console.print(
        f"{source}: schema {SCHEMA_VERSION}, {policy.evidence} with {libraries}{kernels}\n"
        f"for context, no condition: driver {environment.driver}, torch {environment.torch}, triton {environment.triton}\n"
        f"{policy.source.measurements} measurements in {policy.source.file} "
        f"(sha256 {policy.source.sha256[:16]}); made by: {policy.source.command}",
        highlight=False,
    )


def judgement(overall: HeldOut | None, left_out: Sequence[str], lost: Sequence[str]) -> None:
    """Every rule over all attention layer types together, and what could not be judged."""
    if overall:
        console.print(
            _rules_table(overall, f"all attention layer types: {overall.points} held-out (table, shape) pairs")
        )
    for table in left_out:
        console.print(f"no table for {table}: no held-out point judges it yet; sweep again to go on", highlight=False)
    for line in lost:
        warn(line)


def unsettled(unsupported: Sequence[str], suspects: Sequence[str]) -> None:
    """What could not run where it was swept, and which failures are no limits yet."""
    for line in unsupported:
        note(line)
    for line in suspects:
        note(f"no limit yet: {line}; it is not chosen from there up; next: mla-tune probe --suspects")


def lost_points(found: Sequence[LostTable], *, strict: bool) -> None:
    """Tables that lost their own held-out points. Raises :class:`GoalMissedError` for them where that is ``strict``."""
    for entry in found:
        warn(str(entry))
    if found and strict:
        raise GoalMissedError(
            f"--strict accepts no table that loses its own held-out points: got {len(found)}; next: sweep again with a "
            "larger --budget, or fit without --strict"
        )


def weighted(judged: Weighted | None) -> None:
    """The same rules by the recorded traffic; the tables above mean every point alike."""
    if judged is None:
        return
    if not judged.points:
        line = "by traffic: no held-out point lies near the recorded shapes; the slowdowns above mean every point alike"
    else:
        means = ", ".join(f"{name} {mean:.3f}" for name, mean in judged.slowdown)
        line = (
            f"by traffic, mean slowdown: {means} ({judged.points} held-out points near the recorded shapes, worth "
            f"{judged.effective:.1f} of equal weight); the slowdowns above mean every point alike"
        )
    console.print(line, highlight=False)


def _rules_table(judged: HeldOut, title: str) -> RichTable:
    table = RichTable("rule", "geomean", "mean", "p95", "worst", title=title)
    for rule in judged.slowdown:
        table.add_row(rule.rule, *(f"{value:.3f}" for value in (rule.geomean, rule.mean, rule.p95, rule.worst)))
    return table


def _this_command() -> list[str]:
    """How a shell in this folder starts the program that runs now: by name where it is on the path."""
    if shutil.which("mla-tune"):
        return ["mla-tune"]
    installed = Path(sys.executable).with_name("mla-tune")
    if installed.exists():
        return [os.path.relpath(installed)]
    return [sys.executable, "-m", "mla_tune"]


def next_command(policy: Policy, path: Path) -> None:
    """Where the policy lies and what to try with it: the table with most thresholds, at one of them."""
    table = max(policy.tables, key=lambda table: sum(len(row.choices) for row in table.rows))
    row = max(table.rows, key=lambda row: len(row.choices))
    num_reqs = max(row.num_reqs_from, table.measured.num_reqs[0])
    kv_tokens = max(row.kv_tokens_from, table.measured.kv_tokens[0])
    tokens = max(row.choices[-1].threshold.at(kv_tokens), table.measured.num_qo_tokens[0], num_reqs)
    words = [*_this_command(), "explain", "--policy", str(path)]
    words += ["--site", table.site, "--model", table.model, "--layer", table.layer]
    words += [] if table.h_q is None else ["--h-q", str(table.h_q)]
    words += [] if table.engine is Engine.SGLANG else ["--engine", OWN if table.engine is Engine.OWN else table.engine]
    words += [] if num_reqs == 1 else ["--num-reqs", str(num_reqs)]
    print(f"policy written to {path}")
    print(f"next: {shlex.join([*words, str(tokens), str(max(kv_tokens, tokens))])}")


def explanation(found: Answering, result: Explanation, table: Table, as_json: bool) -> None:
    """A choice with the bracket of its threshold, and what each candidate costs stage by stage."""
    shape, decision = result.shape, result.decision
    bracket = _bracket(decision, table, found.stated)
    if as_json:
        print(json.dumps({**asdict(result), "bracket": bracket, "answered_by": found.as_json()}))
        return
    header(found)
    console.print(
        f"{table.site} of {model_text(table)}, layer {table.layer}, h_q {table.h_q or '-'}: "
        f"{shape.num_qo_tokens} query tokens, {shape.kv_tokens} context tokens in {shape.num_reqs} requests",
        highlight=False,
    )
    console.print(f"choice: {decision.candidate}, because: {_because(decision, bracket)}", highlight=False)
    lines = [line for candidate in result.candidates for line in candidate.stages]
    # Whose kernels they are is said where some are an engine's: the others are the same everywhere.
    whose = ["kernel of"] if any(line.provider not in _FIXED for line in lines) else []
    columns = RichTable("candidate", "layer", "stage", *whose, "runs once per", f"us per {result.unit}")
    for candidate in result.candidates:
        for index, line in enumerate(candidate.stages):
            once = str(line.amortization).removeprefix("per_").replace("_", " ")
            name = candidate.candidate if index == 0 else ""
            columns.add_row(
                name, str(line.layer), line.stage, *[line.provider for _ in whose], once, f"{line.latency_us:.2f}"
            )
        measured = f" (measured here: {candidate.measured_us:.2f})" if candidate.measured_us is not None else ""
        columns.add_row(
            "",
            "",
            f"sum x {candidate.correction:.3f}, whole path over sum",
            *("" for _ in whose),
            "",
            f"{candidate.total_us:.2f}{measured}",
        )
        columns.add_section()
    console.print(columns)


_FIXED = (OWN, *KernelSource)
"""Whose kernels run without any ``--provider``."""


def _bracket(decision: ExplainedChoice, table: Table, stated: PolicyEvidence | None) -> tuple[int, int] | None:
    """Query tokens between which the crossover to the choice lies."""
    evidence = stated.of(table) if stated else None
    if evidence is None or decision.num_qo_tokens_from is None:
        return None
    start = decision.num_reqs_from, decision.kv_tokens_from
    for row, of_row in zip(table.rows, evidence.rows, strict=True):
        if (row.num_reqs_from, row.kv_tokens_from) == start and decision.choice:
            return of_row.thresholds[decision.choice - 1].at(decision.num_qo_tokens_from)
    return None


def _because(decision: ExplainedChoice, bracket: tuple[int, int] | None) -> str:
    if decision.num_qo_tokens_from is None:
        return str(decision.reason)
    inside = f", crossover inside [{bracket[0]}, {bracket[1]}]" if bracket else ""
    return (
        f"{decision.reason}: row from {decision.num_reqs_from} requests and {decision.kv_tokens_from} kv_tokens, "
        f"choice from {decision.num_qo_tokens_from} num_qo_tokens{inside}"
    )


def database(rows: Sequence[EnvironmentSummary], as_json: bool) -> None:
    """One line for each environment in a database."""
    if as_json:
        print(json.dumps([asdict(row) for row in rows], default=str))
        return
    table = RichTable("environment", "sku", "measurements", "outcomes", "tries", "quarantined samples", "first", "last")
    for row in rows:
        outcomes = ", ".join(f"{name} {count}" for name, count in row.outcomes)
        table.add_row(
            row.environment.id,
            row.environment.sku,
            str(row.measurements),
            outcomes,
            str(row.tries),
            str(row.quarantined_samples),
            f"{row.first_finished_at:%Y-%m-%d %H:%M}",
            f"{row.last_finished_at:%Y-%m-%d %H:%M}",
        )
    console.print(table)
