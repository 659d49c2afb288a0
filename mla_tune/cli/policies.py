"""Commands on policies: ``fit``, ``lookup``, ``explain``, ``policy show``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mla_tune.cli.named_policy import measured_costs, named_digest, named_evidence, named_policy
from mla_tune.cli.options import (
    OverlapOption,
    PolicyOption,
    ProviderOption,
    StrictOption,
    TrafficOption,
    byte_count,
    checked_overlap,
    chosen_regime,
    parsed_count,
)
from mla_tune.cli.places import export_path, policy_path, policy_sku
from mla_tune.errors import PolicyError, UsageError
from mla_tune.policy.schema import Table
from mla_tune.runtime.dispatcher import Dispatcher
from mla_tune.sites.engines import Engine
from mla_tune.sites.provider import OWN
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import FORWARD
from mla_tune.sites.site import model as find_model

GpuOption = Annotated[str, typer.Option("--gpu", help="auto, cpu or a SKU: whose policy is meant.")]
MeasurementsOption = Annotated[
    Path | None, typer.Option("--measurements", help="Export to read (default db/<sku>.jsonl).")
]
SiteOption = Annotated[str, typer.Option("--site", help="prefill_attention or indexer_metadata.")]
ModelOption = Annotated[str, typer.Option("--model", help="deepseek-v4-flash, deepseek-v4-pro or deepseek-v3.2.")]
LayerOption = Annotated[str, typer.Option("--layer", help="A layer type of the model, or forward for its whole mix.")]
EngineOption = Annotated[Engine, typer.Option("--engine", help="The engine that chooses, where engines differ (V3.2).")]
HeadsOption = Annotated[int | None, typer.Option("--h-q", help="Query heads per rank (default: the model's own).")]
TokensArgument = Annotated[
    int, typer.Argument(parser=parsed_count, metavar="QUERY_TOKENS", help="Query tokens of the forward.")
]
ContextArgument = Annotated[
    int,
    typer.Argument(
        parser=parsed_count, metavar="CONTEXT_TOKENS", help="Context tokens of all requests together: 131072, 128K, 1M."
    ),
]
ModelsOption = Annotated[list[str] | None, typer.Option("--model", help="Only this model; may be repeated.")]
LayersOption = Annotated[
    list[str] | None, typer.Option("--layer", help="Only this layer type, row by row; may be repeated.")
]
NumReqsOption = Annotated[
    int, typer.Option("--num-reqs", parser=parsed_count, metavar="COUNT", help="Requests in the forward.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def fit(
    gpu: GpuOption = "auto",
    measurements: MeasurementsOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Policy file to write (default policies/<sku>.yaml).")
    ] = None,
    first_call_bound: Annotated[
        float, typer.Option("--first-call-bound", help="Longest first call on a new shape, s, of a served candidate.")
    ] = 1.0,
    regime: Annotated[
        str | None, typer.Option("--regime", help="Time to minimize: graph (the GPU's) or eager (the host's too).")
    ] = None,
    traffic: TrafficOption = None,
    cap: Annotated[
        str | None, typer.Option("--max-workspace-bytes", help="Most workspace of a choice, for example 512MiB.")
    ] = None,
    overlap: OverlapOption = 0,
    provider: ProviderOption = OWN,
    strict: StrictOption = False,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check", help="Policy file to make again by its own command and to compare; nothing is written."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a policy from an export, without a GPU. The same export gives the same bytes."""
    if check is not None:
        _check(check)
        return
    if not first_call_bound >= 0:
        raise UsageError(
            f"--first-call-bound must be seconds, at least 0: got {first_call_bound}; accepted: 1.0, or inf"
        )
    from mla_tune.cli import pipeline
    from mla_tune.cli.fit_options import Wishes
    from mla_tune.cli.output import policy_output, render
    from mla_tune.store.export import read_export

    wishes = Wishes(
        regime=chosen_regime(regime),
        traffic=traffic,
        max_workspace_bytes=None if cap is None else byte_count("--max-workspace-bytes", cap),
    )
    source = measurements or export_path(policy_sku(gpu), provider)
    overlap = checked_overlap(overlap)
    target = out or policy_path(read_export(source).environment.sku, provider, overlap)
    fitted = pipeline.fit(source, target, first_call_bound, overlap, provider=provider, wishes=wishes)
    policy_output.policy_summary(fitted.policy, fitted.evidence, target, as_json)
    if not as_json:
        render.judgement(fitted.evidence.overall, fitted.left_out, fitted.lost)
        render.unsettled(fitted.unsupported, fitted.suspects)
        render.weighted(fitted.weighted)
        render.next_command(fitted.policy, target)
    render.lost_points(fitted.lost_points, strict=strict)


def _check(path: Path) -> None:
    """Raises :class:`PolicyError` for a policy that its command does not make again, after the lines that differ."""
    from mla_tune.cli.output.render import note
    from mla_tune.cli.rebuilding import differences

    found = differences(path)
    for line in found:
        note(line)
    if found:
        raise PolicyError(
            f"{path} must be what its command makes of its measurements: {len(found)} lines differ; fit it again, or take "
            "back what changed the fit"
        )
    print(f"{path} is what its command makes of its measurements, byte for byte")


def lookup(
    num_qo_tokens: TokensArgument,
    kv_tokens: ContextArgument,
    model: ModelOption,
    gpu: GpuOption = "auto",
    policy: PolicyOption = None,
    site: SiteOption = "prefill_attention",
    layer: LayerOption = FORWARD,
    h_q: HeadsOption = None,
    engine: EngineOption = Engine.SGLANG,
    num_reqs: NumReqsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Print the candidate that a policy answers for one forward."""
    Shape(num_reqs, num_qo_tokens, kv_tokens)  # refuses counts that no forward has
    loaded, name = named_policy(policy, gpu)
    resolved = Dispatcher(loaded, source=name).resolve(site, model=model, layer=layer, h_q=h_q, engine=engine)
    answer = resolved.explain(num_qo_tokens, kv_tokens, num_reqs)
    print(json.dumps(asdict(answer)) if as_json else answer.candidate)


def explain(
    num_qo_tokens: TokensArgument,
    kv_tokens: ContextArgument,
    model: ModelOption,
    gpu: GpuOption = "auto",
    policy: PolicyOption = None,
    measurements: MeasurementsOption = None,
    site: SiteOption = "prefill_attention",
    layer: LayerOption = FORWARD,
    h_q: HeadsOption = None,
    engine: EngineOption = Engine.SGLANG,
    num_reqs: NumReqsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Print the choice, the threshold behind it, and what each candidate costs, stage by stage."""
    shape = Shape(num_reqs, num_qo_tokens, kv_tokens)
    loaded, name = named_policy(policy, gpu)
    resolved = Dispatcher(loaded, source=name).resolve(site, model=model, layer=layer, h_q=h_q, engine=engine)
    from mla_tune.cli.output import render
    from mla_tune.fit.explanation import explain as explain_choice

    table = _require_table(resolved.table, name)
    costs = measured_costs(loaded, name, measurements)
    render.explanation(explain_choice(costs, table, shape), table, named_evidence(policy, gpu), as_json)


def show(
    gpu: GpuOption = "auto",
    policy: PolicyOption = None,
    model: ModelsOption = None,
    layer: LayersOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every table, row by row, and where it all is from.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a line for each choice, for a spreadsheet.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print a policy on one screen: what it is for, what it takes for each model, and how that did on held-out points.

    Example: mla-tune policy show --gpu h200 --layer c4a
    """
    from mla_tune.cli.output import policy_output

    loaded, name = named_policy(policy, gpu)
    shown = policy_output.ShownPolicy(
        policy=loaded,
        name=name,
        sha256=named_digest(policy, gpu),
        stated=named_evidence(policy, gpu),
        models=tuple(find_model(word).name for word in model or ()),
        layers=tuple(layer or ()),
        everything=everything,
    )
    policy_output.print_policy(shown, as_csv=as_csv, as_json=as_json)


def _require_table(table: Table | None, name: str) -> Table:
    if table is None:
        raise PolicyError(f"a choice is explained by its table: {name} has none there; see `mla-tune policy show`")
    return table
