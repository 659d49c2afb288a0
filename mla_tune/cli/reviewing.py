"""Commands for whoever reviews a policy: ``policy diff``, ``policy lint``, ``policy schema``."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mla_tune.cli.options import JsonOption

if TYPE_CHECKING:
    from mla_tune.cli.output.change_output import ChangeJudgement
    from mla_tune.cli.revisions import NamedVersion
    from mla_tune.policy.comparison import PolicyChange
    from mla_tune.sites.served_shapes import Traffic

_Version = Annotated[
    str, typer.Argument(help="A policy file, or REVISION:PATH of git: HEAD:policies/nvidia-h200.yaml.")
]
_DbOption = Annotated[
    Path | None, typer.Option("--db", help="Export that judges the changes (default: the one that NEW names).")
]


def diff(
    old: _Version,
    new: _Version,
    traffic: Annotated[
        Path | None, typer.Option("--traffic", help="Shapes that a server recorded (MLA_TUNE_RECORD), for the grid.")
    ] = None,
    db: _DbOption = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="Also say what the cost curves expect where nothing was measured.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown for a pull request.")] = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 where a server sees a difference.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print for which shapes two versions of a policy answer differently, and what that wins or costs.

    Example: mla-tune policy diff HEAD:policies/nvidia-h200.yaml policies/nvidia-h200.yaml
    """
    from mla_tune.cli.output.change_output import ChangeJudgement, DiffReport, print_diff
    from mla_tune.cli.revisions import read_version
    from mla_tune.policy.comparison import compare_policies, evidence_changes
    from mla_tune.sites.served_shapes import read_traffic

    before, after = read_version(old), read_version(new)
    recorded = None if traffic is None else read_traffic(traffic)
    change = compare_policies(before.policy, after.policy, recorded)
    report = DiffReport(
        old=before,
        new=after,
        change=change,
        judged=_judged(change, after, db, recorded if predict else None, predict)
        if change.changed
        else ChangeJudgement(),
        evidence=tuple(evidence_changes(before.stated, after.stated)),
    )
    print_diff(report, markdown=markdown, as_json=as_json)
    if exit_code and not change.serves_alike:
        raise typer.Exit(1)


def _judged(
    change: PolicyChange, after: NamedVersion, db: Path | None, traffic: Traffic | None, predict: bool
) -> ChangeJudgement:
    """What the measurements behind the new policy say, or why they say nothing."""
    from mla_tune.cli.output.change_output import ChangeJudgement

    if find_spec("numpy") is None or find_spec("scipy") is None:
        return ChangeJudgement(reason="measurements are read with numpy and scipy: pip install 'mla-tune[tune]'")
    export = db or Path(after.policy.source.file)
    if db is None and not export.is_file():
        return ChangeJudgement(reason=f"no export {export} here; run this in a checkout that has it, or pass --db")
    if after.policy.scaled_from is not None and not predict:
        return ChangeJudgement(reason="nothing was timed on this GPU; --predict says what the scaled curves expect")
    from mla_tune.cli.priced import measured_costs
    from mla_tune.policy.comparison import asked_shapes
    from mla_tune.replay.measured_changes import judge_changes, mean_ratio, predict_changes

    costs = measured_costs(after.policy, after.name, export)
    measured = () if after.policy.scaled_from is not None else tuple(judge_changes(costs.observations, change))
    asked = [list(asked_shapes(table.before, table.after, traffic)) for table in change.tables]
    predicted = tuple(predict_changes(costs, change, asked)) if predict else ()
    reason = "nothing was timed on this GPU" if after.policy.scaled_from is not None else None
    return ChangeJudgement(measured, predicted, mean_ratio(measured), str(export), reason)


def lint(
    files: Annotated[list[str], typer.Argument(help="Policy files.", metavar="FILE...")],
    strict: Annotated[bool, typer.Option("--strict", help="Take warnings for errors.")] = False,
    builds: Annotated[
        bool, typer.Option("--builds/--no-builds", help="Compare with the kernel libraries that are installed here.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Check policy files for what a server or a reviewer would stumble over; exit 1 for an error.

    Example: mla-tune policy lint policies/*.yaml
    """
    from mla_tune.cli.staleness import stale_builds
    from mla_tune.policy.lint import Severity, lint_policy

    found = [finding for file in files for finding in lint_policy(file, stale_builds if builds else None)]
    if as_json:
        print(json.dumps([{"file": of.file, "severity": of.severity, "message": of.message} for of in found]))
    else:
        for finding in found:
            print(finding)
    if any(strict or finding.severity is Severity.ERROR for finding in found):
        raise typer.Exit(1)


def schema(
    out: Annotated[Path | None, typer.Option("--out", help="File to write (default: standard output).")] = None,
) -> None:
    """Print the JSON Schema of a policy file, by which editors complete and check it.

    Example: mla-tune policy schema --out policy.schema.json
    """
    from mla_tune.files import write_atomically
    from mla_tune.policy.file_schema import dump_json_schema

    data = dump_json_schema()
    if out is None:
        sys.stdout.write(data.decode())
    else:
        write_atomically(out, data)
        print(f"schema written to {out}")
