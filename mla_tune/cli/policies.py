"""Commands on policies: ``fit``, ``lookup``, ``explain``, ``policy show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from mla_tune.cli.answering import (
    AllowModelledOption,
    Answering,
    EngineOption,
    GpuOption,
    PolicyOption,
    Question,
    answering,
    as_served,
)
from mla_tune.cli.options import (
    JsonOption,
    OverlapOption,
    ProviderOption,
    StrictOption,
    TrafficOption,
    byte_count,
    checked_overlap,
    chosen_regime,
    parsed_count,
)
from mla_tune.cli.places import policy_path, policy_sku, readable_export
from mla_tune.cli.priced import costs_behind
from mla_tune.errors import PolicyError, UsageError
from mla_tune.policy.schema import Policy
from mla_tune.sites.provider import OWN, SGLANG
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import FORWARD
from mla_tune.sites.site import model as find_model

MeasurementsOption = Annotated[
    Path | None, typer.Option("--measurements", help="Export to read (default: the one that the policy was made of).")
]
SiteOption = Annotated[str, typer.Option("--site", help="prefill_attention or indexer_metadata.")]
ModelOption = Annotated[
    str, typer.Option("--model", help="deepseek-v4-flash, deepseek-v4-pro, deepseek-v3.2, or a checkpoint's id.")
]
LayerOption = Annotated[str, typer.Option("--layer", help="A layer type of the model, or forward for its whole mix.")]
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


def fit(
    gpu: Annotated[str, typer.Option("--gpu", help="auto, cpu or a SKU: whose measurements are meant.")] = "auto",
    measurements: Annotated[
        Path | None,
        typer.Option("--measurements", help="Export to read (default db/<sku>.jsonl of the user's folder)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Policy file to write (default: the user's, policies/<sku>.yaml).")
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
    """Fit a policy from an export, without a GPU. The same export gives the same bytes.

    Example: mla-tune fit --gpu h200 --out policy.yaml
    """
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
    source = measurements or readable_export(policy_sku(gpu), provider)
    overlap = checked_overlap(overlap)
    target = out or policy_path(read_export(source).environment.sku, provider, overlap)
    fitted = pipeline.fit(source, target, first_call_bound, overlap, provider=provider, wishes=wishes)
    policy_output.policy_summary(fitted.policy, fitted.evidence, str(target), as_json)
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
    engine: EngineOption = SGLANG,
    policy: PolicyOption = None,
    allow_modelled: AllowModelledOption = False,
    served: Annotated[
        bool,
        typer.Option("--as-served", help="Answer for this machine: what is installed, and the MLA_TUNE_ variables."),
    ] = False,
    site: SiteOption = "prefill_attention",
    layer: LayerOption = FORWARD,
    h_q: HeadsOption = None,
    num_reqs: NumReqsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Print the candidate that a server answers for one forward, and by which policy; or why the engine's own stays.

    Example: mla-tune lookup 8192 128K --model deepseek-v4-pro --gpu h200
    """
    Shape(num_reqs, num_qo_tokens, kv_tokens)  # refuses counts that no forward has
    from mla_tune.cli.output import render

    question = Question(engine, gpu, policy, allow_modelled)
    found = as_served(question) if served else answering(question)
    resolved = found.resolve(site, model, layer, h_q)
    answer = resolved.explain(num_qo_tokens, kv_tokens, num_reqs)
    render.choice(found, resolved, answer, as_json)


def explain(
    num_qo_tokens: TokensArgument,
    kv_tokens: ContextArgument,
    model: ModelOption,
    gpu: GpuOption = "auto",
    engine: EngineOption = SGLANG,
    policy: PolicyOption = None,
    allow_modelled: AllowModelledOption = False,
    measurements: MeasurementsOption = None,
    site: SiteOption = "prefill_attention",
    layer: LayerOption = FORWARD,
    h_q: HeadsOption = None,
    num_reqs: NumReqsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Print the choice, the threshold behind it, and what each candidate costs, stage by stage.

    Example: mla-tune explain 512 128K --model deepseek-v4-pro --gpu h200
    """
    shape = Shape(num_reqs, num_qo_tokens, kv_tokens)
    found = answering(Question(engine, gpu, policy, allow_modelled))
    table = found.table(site, model, layer, h_q)
    from mla_tune.cli.output import render
    from mla_tune.fit.explanation import explain as explain_choice

    told = explain_choice(costs_behind(found, measurements), table, shape)
    render.explanation(found, told, table, as_json)


def show(
    gpu: GpuOption = "auto",
    engine: Annotated[
        str | None, typer.Option("--engine", help="Only what this engine reads (default sglang; of a named file, all).")
    ] = None,
    policy: PolicyOption = None,
    model: ModelsOption = None,
    layer: LayersOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every table, row by row, and where it all is from.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a line for each choice, for a spreadsheet.")] = False,
    allow_modelled: AllowModelledOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print a policy on one screen: what it is for, what it takes for each model, and how that did on held-out points.

    Example: mla-tune policy show --gpu h200 --layer c4a
    """
    from mla_tune.cli.output import policy_output

    reader = engine or (SGLANG if policy is None else OWN)
    found = answering(Question(reader, gpu, policy, allow_modelled))
    shown = policy_output.ShownPolicy(
        policy=_as_read(found),
        name=found.serving.name,
        sha256=found.serving.digest,
        stated=found.stated,
        models=tuple(find_model(word).name for word in model or ()),
        layers=tuple(layer or ()),
        everything=everything,
        path=None if found.serving.file is None else Path(str(found.serving.file)),
        reader=_reader(found),
        of_own_engine=engine == OWN,
    )
    policy_output.print_policy(shown, as_csv=as_csv, as_json=as_json, answered_by=found.as_json())


def _reader(found: Answering) -> str:
    """Who reads how many of the tables, and why not all of them; empty where that goes without saying."""
    serving = found.serving
    reasons = [serving.fault] if serving.fault else [*map(str, serving.left_out), *serving.passed_over]
    told = f"{len(serving.tables)} of {serving.total} tables serve {found.word} with the builds below"
    return "; ".join([told, *reasons])


def _as_read(found: Answering) -> Policy:
    """The policy with the tables alone that the engine reads, whether they serve or not."""
    serving = found.serving
    read = {table.key for group in serving.left_out for table in group.tables} | {table.key for table in serving.tables}
    tables = tuple(table for table in found.policy.tables if table.key in read)
    return msgspec.structs.replace(found.policy, tables=tables)
