"""The command ``plan``: mixed batches in one part or two, as predicted and, on the policy's own GPU, as measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mla_tune.cli.answering import AllowModelledOption, EngineOption, GpuOption, PolicyOption, Question, answering
from mla_tune.cli.options import JsonOption, parsed_count, token_count
from mla_tune.cli.places import this_device
from mla_tune.cli.policies import HeadsOption, MeasurementsOption, ModelOption
from mla_tune.cli.priced import Evidence, evidence
from mla_tune.errors import EnvironmentMismatchError, MlaTuneError, UsageError
from mla_tune.sites.provider import SGLANG
from mla_tune.sites.shape import RaggedShape
from mla_tune.sites.site import model as find_model

if TYPE_CHECKING:
    from mla_tune.policy.schema import Table
    from mla_tune.replay.mixed import Outlook, Timed


EACH = "each"


def plan(
    model: ModelOption,
    h_q: HeadsOption = None,
    layer: Annotated[
        str,
        typer.Option("--layer", help="each: every layer type by a plan of its own; forward: one for all; or a type."),
    ] = EACH,
    batches: Annotated[
        int,
        typer.Option(
            "--batches", parser=parsed_count, metavar="COUNT", help="Batches to draw; every fifth is a control."
        ),
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", help="Of the batches, and of their inputs.")] = 0,
    fresh: Annotated[str, typer.Option("--fresh", help="Tokens of the fresh prompt, LOW:HIGH.")] = "2048:8192",
    extends: Annotated[str, typer.Option("--extends", help="Requests with a cached context, LOW:HIGH.")] = "8:63",
    new: Annotated[str, typer.Option("--new", help="New tokens of each of them, LOW:HIGH.")] = "4:128",
    context: Annotated[str, typer.Option("--context", help="Cached tokens of each, LOW:HIGH.")] = "65536:524288",
    measure: Annotated[bool, typer.Option("--measure", help="Time both single paths and the split here.")] = False,
    gpu: GpuOption = "auto",
    engine: EngineOption = SGLANG,
    policy: PolicyOption = None,
    allow_modelled: AllowModelledOption = False,
    measurements: MeasurementsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw batches of one fresh prompt and many short extends; tell what serving each request by its own path gains.

    Example: mla-tune plan --model deepseek-v4-pro --gpu h200 --batches 20
    """
    from mla_tune.cli.output import planning_output
    from mla_tune.fit.batch_split import Planner
    from mla_tune.replay.mixed import Mix, draw_batches, outlooks

    find_model(model)  # before anything about the server is asked
    mix = Mix(_ends("--fresh", fresh), _ends("--extends", extends), _ends("--new", new), _ends("--context", context))
    found = evidence(model, h_q, answering(Question(engine, gpu, policy, allow_modelled)), measurements)
    tables = _tables(found, layer)
    drawn = draw_batches(mix, batches, seed, found.pricer.model.max_context)
    planners = [(Planner(found.pricer.costs, table, found.noise_band(table)), layers) for table, layers in tables]
    predicted = outlooks(planners, drawn)
    taken = list(_measured(found, tables, predicted, gpu, seed, as_json)) if measure else None
    if taken is not None and all(t.best_us is None for timed in taken for t in timed or ()):
        raise MlaTuneError(f"a split is measured beside a path that runs here: none did at {len(drawn)} batches")
    planning_output.report(
        planning_output.Told(found.answering, tables[0][0], layer, mix, seed, predicted, taken), as_json
    )


def _ends(option: str, text: str) -> tuple[int, int]:
    low, colon, high = text.partition(":")
    try:
        if not colon:
            raise UsageError("no colon")
        return token_count(low), token_count(high)
    except UsageError:
        raise UsageError(
            f"{option} must be two numbers: got {text[:60]!r}; accepted: for example 8:64, or 64K:512K"
        ) from None


def _tables(found: Evidence, layer: str) -> list[tuple[Table, int]]:
    """Tables to plan by, each with how many layers its times count for."""
    tables, config = found.pricer.tables, found.pricer.model
    if layer == EACH:
        return [(table, count) for table, (_, count) in zip(tables.layers, config.layers, strict=True)]
    known = {table.layer: table for table in (*tables.layers, tables.attention)}
    if layer not in known:
        accepted = ", ".join((EACH, *known))
        raise UsageError(f"--layer must be one of {config.name}: got {layer[:40]!r}; accepted: {accepted}")
    return [(known[layer], 1)]


def _measured(
    found: Evidence,
    tables: Sequence[tuple[Table, int]],
    predicted: Sequence[Outlook],
    gpu: str,
    seed: int,
    quiet: bool,
) -> Iterator[tuple[Timed, ...] | None]:
    """Each batch as timed on this machine, in the order of ``predicted``; None where there is no split to time."""
    device = this_device(gpu)
    if device.sku != found.sku:
        raise EnvironmentMismatchError(
            f"a split is measured on the GPU that it is predicted for: {found.policy} is for {found.sku}, this machine is "
            f"{device.sku}; pass --gpu and its policy, or run this on that GPU"
        )
    provider = found.pricer.costs.observations.conditions.provider
    if provider is not None:
        raise UsageError(
            f"a split is measured with this project's own kernels: {found.policy} is of {provider}; accepted: a policy "
            "without a provider; pass --engine own, or leave --measure out"
        )
    from mla_tune.cli.output.render import note
    from mla_tune.fit.evaluation import table_scope
    from mla_tune.replay.mixed import timed
    from mla_tune.sweep.splitting import SplitMeasurer

    scopes = [table_scope(table) for table, _ in tables]
    singles = [table.candidates for table, _ in tables]
    measurer = SplitMeasurer(device.kind, seed)
    for number, outlook in enumerate(predicted, 1):
        splits = [entry.split for entry in outlook.layers]
        if None in splits:
            yield None
            continue
        shape = RaggedShape(tuple((r.num_qo_tokens, r.kv_tokens) for r in outlook.batch.requests))
        taken = []
        for where, names, split in zip(scopes, singles, splits, strict=True):
            cached = split.parts[1].requests if split else ()
            rows = [r for site, _ in where.parts for r in measurer.measure(site, shape, cached, names)]
            taken.append(timed(where, names, rows))
        if not quiet:
            note(f"batch {number} of {len(predicted)}")
        yield tuple(taken)
