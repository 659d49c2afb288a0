"""The form that a policy's file has, and what it means.

Tables that agree in all but their keys are one entry, what most entries share stands once in ``common``, and every choice
is one line. :mod:`mla_tune.policy.codec` reads and writes the file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

import msgspec

from mla_tune.errors import PolicyError
from mla_tune.policy.kernel_config import KernelConfig, LaunchParameters
from mla_tune.policy.rules import shown
from mla_tune.policy.schema import (
    ALWAYS,
    CandidateBuilds,
    Choice,
    Gpu,
    Ineligible,
    Limit,
    Policy,
    PolicyEnvironment,
    Range,
    Row,
    Source,
    Table,
)
from mla_tune.policy.threshold import Threshold
from mla_tune.sites.engines import Engine
from mla_tune.sites.site import MODELS, SiteName

SCHEMA_VERSION = 4
_Value = TypeVar("_Value")
Tokens = int | str
"""Context tokens as a file has them: 1024, 1K, 64M."""


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Base of the parts of a file; keys are in the order in which they are written."""


class _Line(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """One choice."""

    requests_from: int = 0
    context_from: Tokens = 0
    take: str
    query_tokens_from: int | dict[Tokens, int] = 0


class _Measured(_Part, frozen=True, kw_only=True, omit_defaults=True):
    query_tokens: tuple[int, int]
    context: tuple[Tokens, Tokens]
    requests: tuple[int, int]


class _Keys(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """The tables that an entry stands for: every combination."""

    models: tuple[str, ...]
    heads: tuple[int, ...] = ()
    """Query heads per rank as the kernel sees them; none where they play no role."""
    layers: tuple[str, ...]
    engine: Engine = Engine.SGLANG
    """Written only where it is another than SGLang."""


class _Choose(_Part, frozen=True, kw_only=True, omit_defaults=True):
    among: tuple[str, ...]
    incumbent: str


class _Common(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """What holds for every entry that does not say otherwise."""

    builds: tuple[str, ...]
    measured: _Measured


class _Tables(_Part, frozen=True, kw_only=True, omit_defaults=True, rename={"keys": "for"}):
    """Tables that agree in all but their keys."""

    keys: _Keys
    choose: _Choose
    builds: tuple[str, ...] | None = None
    """What the incumbent ran on; None for the common ones."""
    candidate_builds: dict[str, tuple[str, ...]] = {}
    """What a candidate depends on besides."""
    measured: _Measured | None = None
    """None for the common one."""
    limits: dict[str, int] = {}
    """Query tokens up to which a candidate runs."""
    slow_first_call_s: dict[str, float] = {}
    """Candidates that are never taken, each with the seconds that a new shape costs."""
    choices: tuple[_Line, ...]


class _Sites(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """A field for each :class:`SiteName`."""

    prefill_attention: tuple[_Tables, ...] = ()
    indexer_metadata: tuple[_Tables, ...] = ()


class FileForm(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """A whole file."""

    schema: int
    gpu: Gpu
    evidence: str
    scaled_from: str | None = None
    regime: str
    environment: PolicyEnvironment
    source: Source
    overlap: int = 0
    provider: str | None = None
    kernel_config: dict[str, tuple[dict[str, int], ...]] = {}
    """Of each kernel its launch parameters by ``size_from``, ascending."""
    common: _Common
    tables: _Sites


_AS_IT_IS = ("gpu", "evidence", "scaled_from", "regime", "environment", "source", "overlap", "provider")
"""Fields of a policy that its file has in the same form."""


def to_policy(file: FileForm) -> Policy:
    """What a file says. Raises :class:`FormError`."""
    tables = [
        table
        for site in SiteName
        for index, entry in enumerate(getattr(file.tables, site))
        for table in _expanded(site.value, entry, file.common, f"tables.{site}[{index}]")
    ]
    return Policy(
        **{name: getattr(file, name) for name in _AS_IT_IS},
        kernel_config=tuple(_launches(file.kernel_config)),
        tables=tuple(sorted(tables, key=_order)),
    )


def _launches(config: Mapping[str, Sequence[Mapping[str, int]]]) -> Iterator[KernelConfig]:
    for kernel, entries in config.items():
        for index, entry in enumerate(entries):
            given = {name: value for name, value in entry.items() if name != "size_from"}
            try:
                launch = msgspec.convert(given, LaunchParameters, strict=True)
            except msgspec.ValidationError as error:
                raise FormError(f"kernel_config.{kernel}[{index}]", f"must be launch parameters: {error}") from None
            yield KernelConfig(kernel=kernel, size_from=entry.get("size_from", 0), launch=launch)


def _expanded(site: str, entry: _Tables, common: _Common, path: str) -> Iterator[Table]:
    """Every table that an entry of the file stands for."""
    measured = entry.measured or common.measured
    place = f"{path}.measured.context" if entry.measured else "common.measured.context"
    low, high = (_tokens(end, place) for end in measured.context)
    keys = entry.keys
    shared: dict[str, Any] = {
        "site": site,
        "engine": keys.engine,
        "incumbent": entry.choose.incumbent,
        "candidates": entry.choose.among,
        "builds": common.builds if entry.builds is None else entry.builds,
        "candidate_builds": tuple(
            CandidateBuilds(candidate=name, builds=builds) for name, builds in entry.candidate_builds.items()
        ),
        "measured": Range(num_qo_tokens=measured.query_tokens, kv_tokens=(low, high), num_reqs=measured.requests),
        "limits": tuple(Limit(candidate=name, num_qo_tokens=most) for name, most in entry.limits.items()),
        "ineligible": tuple(
            Ineligible(candidate=name, first_call_s=seconds) for name, seconds in entry.slow_first_call_s.items()
        ),
        "rows": tuple(_rows(entry.choices, f"{path}.choices")),
    }
    for model in keys.models:
        for h_q in keys.heads or (None,):
            for layer in keys.layers:
                yield Table(model=model, h_q=h_q, layer=layer, **shared)


def _rows(lines: Sequence[_Line], path: str) -> Iterator[Row]:
    read = [
        (line.requests_from, _tokens(line.context_from, f"{path}[{index}].context_from"), index, line)
        for index, line in enumerate(lines)
    ]
    for (num_reqs, kv_tokens), members in groupby(read, lambda entry: entry[:2]):
        choices = (
            Choice(threshold=_threshold(line, f"{path}[{index}].query_tokens_from"), candidate=line.take)
            for _, _, index, line in members
        )
        yield Row(num_reqs_from=num_reqs, kv_tokens_from=kv_tokens, choices=tuple(choices))


def _threshold(line: _Line, path: str) -> Threshold:
    counts = line.query_tokens_from
    if isinstance(counts, int):
        return Threshold.level(counts) if counts else ALWAYS
    points = [(_tokens(context, path), count) for context, count in counts.items()]
    if len(points) == 2 and points[0][0] < points[1][0] and points[0][1] < points[1][1]:
        return Threshold((points[0][1], points[1][1]), (points[0][0], points[1][0]))
    rule = "must be a count, or two rising counts at two rising contexts such as {1K: 15, 80K: 54}"
    raise FormError(path, f"{rule}: got {shown(counts)}")


class FormError(Exception):
    """A value of the right type that means nothing; its arguments are the place in the file and the rule."""


_UNITS = {"K": 1 << 10, "M": 1 << 20}
_TOKENS = re.compile(r"([1-9][0-9]{0,15})([KM])")


def _tokens(value: Tokens, path: str) -> int:
    """The number that ``value`` is."""
    if isinstance(value, int):
        return value
    found = _TOKENS.fullmatch(value)
    if found is None:
        raise FormError(path, f"must be context tokens: got {shown(value)}; accepted: 1280, 80K, 64M")
    return int(found[1]) * _UNITS[found[2]]


def written_tokens(count: int) -> Tokens:
    """``count`` as a file has it: with the largest unit that is exact."""
    for unit in ("M", "K"):
        if count > 0 and count % _UNITS[unit] == 0:
            return f"{count // _UNITS[unit]}{unit}"
    return count


def to_file(policy: Policy) -> FileForm:
    """``policy`` as its file has it. Raises :class:`PolicyError` for one without tables."""
    config: dict[str, tuple[dict[str, int], ...]] = {}
    for entry in policy.kernel_config:
        launch = {"size_from": entry.size_from, **entry.launch.given()}
        config[entry.kernel] = (*config.get(entry.kernel, ()), launch)
    if not policy.tables:
        raise PolicyError("a policy must hold at least one table: got none")
    common = _Common(
        builds=_most_common(table.builds for table in policy.tables),
        measured=_measured(_most_common(table.measured for table in policy.tables)),
    )
    return FileForm(
        schema=SCHEMA_VERSION,
        **{name: getattr(policy, name) for name in _AS_IT_IS},
        kernel_config=config,
        common=common,
        tables=_Sites(**{site: tuple(_merged(of, common)) for site, of in _by_site(policy.tables).items()}),
    )


def _most_common(values: Iterable[_Value]) -> _Value:
    """The one that occurs most often, the first of equals."""
    return Counter(values).most_common(1)[0][0]


def _by_site(tables: Sequence[Table]) -> dict[str, list[Table]]:
    found: dict[str, list[Table]] = {}
    for table in sorted(tables, key=_order):
        found.setdefault(table.site, []).append(table)
    return found


def _merged(tables: Sequence[Table], common: _Common) -> Iterator[_Tables]:
    """The entries of one site: tables that agree in all but model, heads and layer stand once."""
    alike: dict[Table, list[Table]] = {}
    for table in tables:
        alike.setdefault(msgspec.structs.replace(table, model="", h_q=None, layer=""), []).append(table)
    for members in alike.values():
        layers: dict[tuple[str, int | None], tuple[str, ...]] = {}
        for table in members:
            key = (table.model, table.h_q)
            layers[key] = (*layers.get(key, ()), table.layer)
        heads: dict[tuple[str, tuple[str, ...]], tuple[int | None, ...]] = {}
        for (model, h_q), of_layers in layers.items():
            heads[model, of_layers] = (*heads.get((model, of_layers), ()), h_q)
        models: dict[tuple[tuple[str, ...], tuple[int | None, ...]], tuple[str, ...]] = {}
        for (model, of_layers), counts in heads.items():
            models[of_layers, counts] = (*models.get((of_layers, counts), ()), model)
        for (of_layers, counts), names in models.items():
            first = members[0]
            keys = _Keys(
                models=names,
                heads=tuple(count for count in counts if count is not None),
                layers=of_layers,
                engine=first.engine,
            )
            yield _entry(first, keys, common)


def _entry(table: Table, keys: _Keys, common: _Common) -> _Tables:
    return _Tables(
        keys=keys,
        choose=_Choose(among=table.candidates, incumbent=table.incumbent),
        builds=None if table.builds == common.builds else table.builds,
        candidate_builds={entry.candidate: entry.builds for entry in table.candidate_builds},
        measured=None if (measured := _measured(table.measured)) == common.measured else measured,
        limits={limit.candidate: limit.num_qo_tokens for limit in table.limits},
        slow_first_call_s={entry.candidate: entry.first_call_s for entry in table.ineligible},
        choices=tuple(_line(row, choice) for row in table.rows for choice in row.choices),
    )


def _measured(measured: Range) -> _Measured:
    low, high = measured.kv_tokens
    return _Measured(
        query_tokens=measured.num_qo_tokens,
        context=(written_tokens(low), written_tokens(high)),
        requests=measured.num_reqs,
    )


def _line(row: Row, choice: Choice) -> _Line:
    threshold = choice.threshold
    counts: int | dict[Tokens, int] = threshold.num_qo_tokens[0]
    if not threshold.is_level:
        counts = {
            written_tokens(context): count
            for context, count in zip(threshold.kv_tokens, threshold.num_qo_tokens, strict=True)
        }
    return _Line(
        requests_from=row.num_reqs_from,
        context_from=written_tokens(row.kv_tokens_from),
        take=choice.candidate,
        query_tokens_from=counts,
    )


def _order(table: Table) -> tuple[int, ...]:
    """Where a table stands among all that there can be; behind them what is not known."""
    places: list[int] = []
    axes: tuple[tuple[object, Sequence[object]], ...] = (
        (table.site, list(SiteName)),
        (table.model, list(MODELS)),
        (table.engine, list(Engine)),
        (table.h_q, MODELS[table.model].heads if table.model in MODELS else ()),
        (table.layer, [*(str(layer) for layer, _ in MODELS[table.model].layers)] if table.model in MODELS else ()),
    )
    for value, known in axes:
        places.append(known.index(value) if value in known else len(known))
    return tuple(places)
