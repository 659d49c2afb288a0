"""The command ``model``: a policy for a GPU that is not at hand, scaled from another one's measurements."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mla_tune.cli.options import JsonOption
from mla_tune.cli.places import make_folder, policy_path, readable_export
from mla_tune.errors import EnvironmentMismatchError, PolicyError, UsageError
from mla_tune.hardware.datasheet import DATASHEETS, Datasheet, same_figures

if TYPE_CHECKING:
    from mla_tune.fit.costs import CostModel
    from mla_tune.fit.table_rows import FittedPolicy


def model(
    to: Annotated[
        list[str] | None, typer.Option("--to", help="GPU to model: h100, b200, ...; may be repeated.")
    ] = None,
    source: Annotated[str, typer.Option("--from", help="GPU whose measurements are scaled.")] = "nvidia-h200",
    measurements: Annotated[
        Path | None,
        typer.Option(
            "--measurements", help="Its export (default db/<sku>.jsonl of the user's folder, else of the checkout)."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Policy file to write (default: the user's, policies/<sku>.yaml).")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with every published figure; without --to nothing is written.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Model the policy of a GPU that nobody measured, with a stated uncertainty, and check it by published figures.

    Example: mla-tune model --to b200 --from h200
    """
    measured = _with_datasheet("--from", source)
    targets = _without_twins([_with_datasheet("--to", word) for word in dict.fromkeys(to or ())])
    _check_wishes(measured, targets, out, check)
    export = measurements or readable_export(measured.sku)
    paths = [out or policy_path(target.sku) for target in targets]
    for path in paths:
        _refuse_measured(path)
    from mla_tune.cli.output import model_output
    from mla_tune.fit.published import PUBLISHED
    from mla_tune.fit.published_check import check as check_figures
    from mla_tune.policy.codec import write_policy

    costs = _costs(export, measured.sku)
    for path in paths:
        make_folder(path)
    policies = []
    for target, path in zip(targets, paths, strict=True):
        policies.append(_policy(costs, export, target))
        write_policy(path, policies[-1].policy, policies[-1].evidence)
    told = {sku for fitted in policies for sku in fitted.policy.gpu.skus}
    figures = [figure for figure in PUBLISHED if check or figure.sku in told]
    model_output.modelled(list(zip(policies, paths, strict=True)), check_figures(costs, figures), as_json)


def _without_twins(targets: list[Datasheet]) -> list[Datasheet]:
    """``targets`` less those whose figures are those of one before: its policy serves them too."""
    kept: list[Datasheet] = []
    for target in targets:
        if not any(target in same_figures(other.sku) for other in kept):
            kept.append(target)
    return kept


def _with_datasheet(option: str, word: str) -> Datasheet:
    """The product that ``word`` names (``h100``, ``nvidia-h100``). Raises :class:`UsageError`."""
    name = word.strip().lower()
    for found in DATASHEETS:
        if name in (found.sku, found.sku.removeprefix("nvidia-")):
            return found
    accepted = ", ".join(found.sku.removeprefix("nvidia-") for found in DATASHEETS)
    raise UsageError(f"{option} must be a GPU whose datasheet mla-tune has: got {word!r}; accepted: {accepted}")


def _check_wishes(measured: Datasheet, targets: list[Datasheet], out: Path | None, check: bool) -> None:
    others = ", ".join(found.sku.removeprefix("nvidia-") for found in DATASHEETS if found.sku != measured.sku)
    if not targets and not check:
        raise UsageError(f"--to must name the GPU to model: got none; accepted: {others}; or --check alone")
    if measured in targets:
        raise UsageError(
            f"--to must be another GPU than --from: got {measured.sku} for both; accepted: {others}; "
            "its own policy is made by `mla-tune fit`"
        )
    if out is not None and len(targets) != 1:
        raise UsageError(f"--out must be the file of one policy: got {len(targets)} GPUs with --to; accepted: one --to")


def _refuse_measured(path: Path) -> None:
    """Raises :class:`PolicyError` if ``path`` is a measured policy, of whatever schema: those win over modelled ones."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return
    if re.search(r"^evidence: measured\b", text, re.MULTILINE):
        raise PolicyError(
            f"a modelled policy never replaces a measured one: {path} is measured; keep it, or name another file with --out"
        )


def _costs(export: Path, sku: str) -> CostModel:
    from mla_tune.fit.costs import CostModel
    from mla_tune.fit.usable import usable
    from mla_tune.store.export import read_export

    found = read_export(export)
    if found.environment.sku != sku:
        raise EnvironmentMismatchError(
            f"--measurements must be of the GPU that --from names: {export} was measured on {found.environment.sku}, "
            f"not on {sku}; name that one with --from"
        )
    return CostModel(found.environment, usable(found.measurements, found.tuned), found.tries)


def _policy(costs: CostModel, export: Path, target: Datasheet) -> FittedPolicy:
    """The modelled policy, with the command that makes it again."""
    from mla_tune.fit.modelled import model_policy
    from mla_tune.policy.schema import Source
    from mla_tune.store.export import export_sha256

    words = ["mla-tune", "model", "--from", costs.environment.sku, "--to", target.sku]
    words += ["--measurements", export.as_posix()]
    return model_policy(
        costs,
        target,
        Source(
            file=export.as_posix(),
            sha256=export_sha256(export),
            measurements=costs.observations.measurements,
            command=shlex.join(words),
        ),
        same_figures(target.sku)[1:],
    )
