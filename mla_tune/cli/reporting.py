"""The command ``report``: the policies of a GPU and their measurements as one HTML file, or one map as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mla_tune.cli.answering import checked_engine
from mla_tune.cli.options import checked_provider, chosen_sites, parsed_count
from mla_tune.cli.places import make_folder, policy_sku
from mla_tune.cli.priced import export_behind, measured_costs
from mla_tune.errors import PolicyError, UsageError
from mla_tune.files import write_atomically
from mla_tune.policy.codec import digest, parse_policy, read_policy_file
from mla_tune.policy.evidence import load_evidence
from mla_tune.policy.search import policy_file, policy_files
from mla_tune.sites.engines import Engine
from mla_tune.sites.provider import OWN, PROVIDERS, SGLANG
from mla_tune.sites.site import FORWARD
from mla_tune.sites.site import model as find_model

if TYPE_CHECKING:
    from mla_tune.policy.schema import Table
    from mla_tune.report.contents import MeasuredPolicy, SiteMap, View


def report(
    gpu: Annotated[str, typer.Option("--gpu", help="auto, cpu or a SKU: whose policies are shown.")] = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="HTML file to write (default report.html).")] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Write the map of one table as a PNG instead.")] = None,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="Policy file (default: the user's, else the shipped ones).")
    ] = None,
    measurements: Annotated[
        Path | None, typer.Option("--measurements", help="Export behind --policy (default: the one it names).")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Of --png: deepseek-v3.2, ... (default: the first).")
    ] = None,
    site: Annotated[
        str, typer.Option("--site", help="Of --png: prefill_attention or indexer_metadata.")
    ] = "prefill_attention",
    layer: Annotated[
        str, typer.Option("--layer", help="Of --png: a layer type, or forward for the whole mix.")
    ] = FORWARD,
    h_q: Annotated[
        int | None, typer.Option("--h-q", help="Of --png: query heads a rank (default: the model's own).")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="Of --png: sglang, vllm, vllm-few-heads or own.")] = SGLANG,
    provider: Annotated[
        str | None,
        typer.Option("--provider", help="Of --png: own or sglang (default: the engine's, where it was measured)."),
    ] = None,
    num_reqs: Annotated[
        int, typer.Option("--num-reqs", parser=parsed_count, metavar="COUNT", help="Of --png: requests in the forward.")
    ] = 1,
) -> None:
    """Write a self-contained HTML report of a GPU's policies: maps, slowdowns, stage costs, limits, environment.

    Example: mla-tune report --gpu h200 -o report.html
    """
    if png is not None and out is not None:
        raise UsageError(f"--png writes a picture instead of a page: got --out {out} as well; accepted: one of them")
    files = [policy] if policy is not None else _policy_files(policy_sku(gpu))
    if measurements is not None and policy is None:
        raise UsageError(
            "--measurements is the export of one policy: got it without --policy; next: name that file too"
        )
    if provider is not None:
        checked_provider(provider)
    target = png or out or Path("report.html")
    make_folder(target)
    if png is None:
        data = _page(files, measurements)
    else:
        data = _picture(files, measurements, _wanted(site, model, h_q, layer, engine), provider, num_reqs)
    write_atomically(target, data)
    print(f"{target}: {len(data) / 1e6:.1f} MB" if len(data) >= 1e6 else f"{target}: {len(data) / 1e3:.0f} kB")


_Wanted = tuple[str, str | None, int | None, str, Engine]
"""Site, model, heads, layer and engine of the table to draw."""


def _wanted(site: str, model: str | None, h_q: int | None, layer: str, engine: str) -> _Wanted:
    """The options of ``--png``. Raises :class:`UsageError` for an unknown word."""
    (name,) = chosen_sites([site])
    if model is not None:
        find_model(model)
    return name, model, h_q, layer, checked_engine(engine)[1]


def _page(files: list[Path], measurements: Path | None) -> bytes:
    from mla_tune.report.contents import contents
    from mla_tune.report.page import page, plotly_code

    plotly_code()  # refuses before a minute's work
    return page(contents([_measured(path, measurements) for path in files]))


def _picture(
    files: list[Path], measurements: Path | None, wanted: _Wanted, provider: str | None, num_reqs: int
) -> bytes:
    from mla_tune.report.contents import contents
    from mla_tune.report.picture import empty_figure, picture

    empty_figure()
    measured, table = _chosen_table([_measured(path, measurements) for path in files], wanted, provider)
    found = contents(measured, lambda entry: entry.key == table.key)
    return picture(found, found.maps[0], _chosen_view(found.maps[0], num_reqs))


def _policy_files(sku: str) -> list[Path]:
    """The policies of a GPU, our own kernels' first; of each the user's, else the one that ships."""
    found = []
    for word in PROVIDERS:
        files = (Path(str(file)) for file in policy_files(sku, word))
        # An engine without a policy of its own is served by our kernels', which is there once.
        found += [next((path for path in files if word == OWN or f".{word}." in path.name), None)]
    return [path for path in found if path is not None] or [Path(str(policy_file(sku)))]


def _measured(path: Path, measurements: Path | None) -> MeasuredPolicy:
    from mla_tune.report.contents import MeasuredPolicy

    data = read_policy_file(path)
    found = parse_policy(data, path.name)
    return MeasuredPolicy(
        policy=found,
        digest=digest(data),
        file=path.name,
        evidence=load_evidence(path, digest(data)),
        costs=measured_costs(found, path.name, measurements or export_behind(found, path, path.name)),
    )


def _chosen_table(
    measured: list[MeasuredPolicy], wanted: _Wanted, provider: str | None
) -> tuple[list[MeasuredPolicy], Table]:
    """The table that the options name, with its policy: the last that has it, since an engine's kernels come last."""
    site, model, h_q, layer, engine = wanted
    for entry in reversed(measured):
        if provider is not None and (entry.policy.provider is None) != (provider == OWN):
            continue
        for table in entry.policy.tables:
            same = (table.site, table.layer, table.engine) == (site, layer, engine)
            if same and model in (None, table.model) and h_q in (None, table.h_q):
                return [entry], table
    tables = [table for entry in measured for table in entry.policy.tables if model in (None, table.model)]
    names = {f"{table.site} {table.layer} {table.engine}" for table in tables}
    heads = "" if h_q is None else f", {h_q} heads"
    raise PolicyError(
        f"--png draws one table of the policy: got none for {site} of {model or 'any model'}, {layer}, {engine}{heads}; "
        f"accepted: {', '.join(sorted(names)) or 'another --model'}"
    )


def _chosen_view(entry: SiteMap, num_reqs: int) -> View:
    for view in entry.views:
        if view.num_reqs[0] <= num_reqs <= view.num_reqs[1]:
            return view
    low, high = entry.views[0].num_reqs[0], entry.views[-1].num_reqs[1]
    raise UsageError(f"--num-reqs must be a count that was measured: got {num_reqs}; accepted: {low} to {high}")
