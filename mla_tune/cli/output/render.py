"""What the commands print: tables for people, JSON for scripts."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as RichTable

from mla_tune.errors import GoalMissedError
from mla_tune.policy.evidence import HeldOut, PolicyEvidence
from mla_tune.policy.schema import Policy, Table
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


def note(line: str) -> None:
    """A line on standard error about what was done or comes next."""
    status.print(line, highlight=False, markup=False, soft_wrap=True)


def warn(line: str) -> None:
    """One line on standard error that does not stop the command."""
    status.print(f"warning: {line}", highlight=False, soft_wrap=True)


def model_text(table: Table) -> str:
    """``deepseek-v3.2 (vllm)`` where the table is another engine's than SGLang's."""
    return table.model if table.engine is Engine.SGLANG else f"{table.model} ({table.engine})"


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
