"""What two policies of one GPU answer differently: the shapes, and everything else that a server sees.

Thresholds that stand elsewhere in the file, brackets and provenance change no answer. So tables are compared by what they
answer on a grid of shapes, or at recorded ones, and a refit of unchanged data gives no difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mla_tune.errors import UsageError
from mla_tune.policy.decision import Choose, Decision, constant
from mla_tune.policy.evidence import PolicyEvidence
from mla_tune.policy.schema import Policy, Range, Table, TableKey
from mla_tune.sites.engines import Engine
from mla_tune.sites.served_shapes import Traffic

GridShape = tuple[int, int, int]
"""Query tokens, context tokens and requests of one forward."""
_QUERY_STEPS = 4
_CONTEXT_STEPS = 2


@dataclass(frozen=True, slots=True)
class MovedAnswers:
    """Shapes whose answer goes from one candidate to another, and where they lie."""

    before: str
    after: str
    shapes: int
    forwards: int
    query_tokens: tuple[int, int]
    context: tuple[int, int]
    requests: tuple[int, int]


@dataclass(frozen=True, slots=True)
class TableChange:
    """One table in which a server sees a difference."""

    before: Table | None
    """None for a table that is new: the engine's own choice came before it."""
    after: Table | None
    shapes: int
    """Shapes that were asked."""
    forwards: int
    """What they count for: themselves on a grid, their forwards in traffic."""
    moves: tuple[MovedAnswers, ...]
    settings: tuple[str, ...]
    """What else changed: limits, builds, ranges, candidates; one line each."""

    @property
    def table(self) -> Table:
        """The one there is, the new one of two."""
        found = self.after or self.before
        assert found is not None
        return found

    @property
    def key(self) -> TableKey:
        """What both have."""
        return self.table.key

    @property
    def changed(self) -> int:
        """Forwards whose answer changes."""
        return sum(move.forwards for move in self.moves)

    @property
    def share(self) -> float:
        """Share of the forwards whose answer changes."""
        return self.changed / self.forwards if self.forwards else 0.0


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """Everything in which two policies differ."""

    before: Policy
    after: Policy
    served: tuple[str, ...]
    """What a server sees beside the tables, one line each."""
    tables: tuple[TableChange, ...]
    provenance: tuple[str, ...]
    """What no server sees: where the policy comes from."""
    shapes: int
    """Shapes that were asked, over all tables of both."""
    forwards: int
    traffic: bool
    """Whether the shapes were recorded ones."""

    @property
    def serves_alike(self) -> bool:
        """Whether no server sees a difference."""
        return not self.served and not self.tables

    @property
    def changed(self) -> int:
        """Forwards whose answer changes, over all tables."""
        return sum(table.changed for table in self.tables)


def compare_policies(before: Policy, after: Policy, traffic: Traffic | None = None) -> PolicyChange:
    """How ``after`` differs from ``before``: on a grid, or at the shapes of ``traffic``.

    Raises :class:`UsageError` for policies of different GPUs and for traffic that meets no table of either.
    """
    if not set(before.gpu.skus) & set(after.gpu.skus):
        raise UsageError(
            f"two policies of one GPU are compared: got {before.gpu.sku} and {after.gpu.sku}; name two files of one"
        )
    old, new = ({table.key: table for table in policy.tables} for policy in (before, after))
    changes: list[TableChange] = []
    shapes = forwards = 0
    for key in dict.fromkeys([*(table.key for table in after.tables), *old]):
        asked = asked_shapes(old.get(key), new.get(key), traffic)
        shapes, forwards = shapes + len(asked), forwards + sum(asked.values())
        change = _table_change(old.get(key), new.get(key), asked)
        if change is not None:
            changes.append(change)
    if traffic is not None and not forwards:
        met = sorted({f"{shape.site} of {shape.model}" for shape in traffic.forwards})
        raise UsageError(
            f"--traffic must have a forward that a table of the policies is for: got {', '.join(met) or 'none'}"
        )
    return PolicyChange(
        before=before,
        after=after,
        served=tuple(_served(before, after)),
        tables=tuple(changes),
        provenance=tuple(_provenance(before, after)),
        shapes=shapes,
        forwards=forwards,
        traffic=traffic is not None,
    )


def asked_shapes(before: Table | None, after: Table | None, traffic: Traffic | None) -> dict[GridShape, int]:
    """The shapes at which two versions of a table are asked, each with how often it counts."""
    tables = [table for table in (before, after) if table is not None]
    if traffic is None:
        return dict.fromkeys(grid_shapes([table.measured for table in tables]), 1)
    site, model = tables[0].site, tables[0].model
    met: Counter[GridShape] = Counter()
    for shape, count in traffic.forwards.items():
        if (shape.site, shape.model) == (site, model):
            met[shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs] += count
    return dict(met)


def grid_shapes(ranges: Sequence[Range]) -> Iterator[GridShape]:
    """Shapes over all that ``ranges`` cover: quarter octaves of query tokens, half octaves of context, requests doubled."""
    query_tokens = _steps([of.num_qo_tokens for of in ranges], _QUERY_STEPS)
    context = _steps([of.kv_tokens for of in ranges], _CONTEXT_STEPS)
    for num_reqs in _steps([of.num_reqs for of in ranges], 1):
        for kv_tokens in context:
            for num_qo_tokens in query_tokens:
                if num_reqs <= num_qo_tokens <= kv_tokens:
                    yield num_qo_tokens, kv_tokens, num_reqs


def _steps(ranges: Sequence[tuple[int, int]], per_octave: int) -> list[int]:
    """From the least to the largest end of ``ranges``, both included, evenly in the logarithm."""
    low, high = min(start for start, _ in ranges), max(end for _, end in ranges)
    found, step = {low, high}, 0
    while (value := round(low * 2 ** (step / per_octave))) < high:
        found.add(value)
        step += 1
    return sorted(found)


def rule_of(table: Table | None, other: Table | None) -> Choose:
    """What is taken where ``table`` serves; without one the engine's own choice, as ``other`` names it."""
    if table is not None:
        return Decision(table).choose
    assert other is not None
    return constant(other.incumbent)


def _table_change(before: Table | None, after: Table | None, asked: Mapping[GridShape, int]) -> TableChange | None:
    if before == after:
        return None
    old, new = rule_of(before, after), rule_of(after, before)
    found: dict[tuple[str, str], list[GridShape]] = {}
    for shape in asked:
        answers = old(*shape), new(*shape)
        if answers[0] != answers[1]:
            found.setdefault(answers, []).append(shape)
    moves = (_move(*names, shapes, asked) for names, shapes in sorted(found.items()))
    return TableChange(
        before=before,
        after=after,
        shapes=len(asked),
        forwards=sum(asked.values()),
        moves=tuple(moves),
        settings=tuple(_settings(before, after)),
    )


def _move(before: str, after: str, shapes: Sequence[GridShape], asked: Mapping[GridShape, int]) -> MovedAnswers:
    query_tokens, context, requests = zip(*shapes, strict=True)
    return MovedAnswers(
        before=before,
        after=after,
        shapes=len(shapes),
        forwards=sum(asked[shape] for shape in shapes),
        query_tokens=(min(query_tokens), max(query_tokens)),
        context=(min(context), max(context)),
        requests=(min(requests), max(requests)),
    )


def _settings(before: Table | None, after: Table | None) -> Iterator[str]:
    """What a server sees of a table beside its answers."""
    if before is None or after is None:
        yield "the table is new" if before is None else "the table is gone: the engine's own choice serves"
        return
    yield from _changed("incumbent", before.incumbent, after.incumbent)
    yield from _changed("candidates", ", ".join(before.candidates), ", ".join(after.candidates))
    yield from _changed("builds", ", ".join(before.builds) or "none", ", ".join(after.builds) or "none")
    own = [{entry.candidate: ", ".join(entry.builds) for entry in of.candidate_builds} for of in (before, after)]
    yield from _entries("builds of", *own)
    for name, low_high in _ranges(before.measured).items():
        yield from _changed(f"measured {name}", low_high, _ranges(after.measured)[name])
    most = [{limit.candidate: str(limit.num_qo_tokens) for limit in of.limits} for of in (before, after)]
    yield from _entries("limit of", *most)
    slow = [{entry.candidate: f"{entry.first_call_s:g} s" for entry in of.ineligible} for of in (before, after)]
    yield from _entries("slow first call of", *slow)


def _ranges(measured: Range) -> dict[str, str]:
    return {
        "query tokens": "{} to {}".format(*measured.num_qo_tokens),
        "context": "{} to {}".format(*measured.kv_tokens),
        "requests": "{} to {}".format(*measured.num_reqs),
    }


def _served(before: Policy, after: Policy) -> Iterator[str]:
    yield from _changed("GPU", ", ".join(before.gpu.skus), ", ".join(after.gpu.skus))
    yield from _changed("SM count", before.gpu.sm_count, after.gpu.sm_count)
    yield from _changed("evidence", before.evidence, after.evidence)
    yield from _changed(
        "provider", before.provider or "mla-tune's own kernels", after.provider or "mla-tune's own kernels"
    )
    # A library's digest tells builds of one release apart: where it differs, tables fall away.
    built = [
        {one.name: f"{one.version} ({one.sha256[:12]})" for one in of.environment.libraries} for of in (before, after)
    ]
    yield from _entries("library", *built)
    launches = [
        {
            f"{entry.kernel} from size {entry.size_from}": ", ".join(
                f"{k} {v}" for k, v in entry.launch.given().items()
            )
            for entry in of.kernel_config
        }
        for of in (before, after)
    ]
    yield from _entries("launch parameters of", *launches)


def _provenance(before: Policy, after: Policy) -> Iterator[str]:
    old, new = before.environment, after.environment
    for name in ("driver", "cuda", "torch", "triton", "shared_memory_optin_bytes"):
        yield from _changed(name, getattr(old, name), getattr(new, name))
    yield from _changed("regime", before.regime, after.regime)
    yield from _changed("overlap", before.overlap, after.overlap)
    yield from _changed("scaled from", before.scaled_from or "nothing", after.scaled_from or "nothing")
    yield from _changed("measurements", before.source.measurements, after.source.measurements)
    yield from _changed("export", before.source.file, after.source.file)
    yield from _changed("export's sha256", before.source.sha256[:12], after.source.sha256[:12])
    yield from _changed("made by", before.source.command, after.source.command)


def evidence_changes(before: PolicyEvidence | None, after: PolicyEvidence | None) -> Iterator[str]:
    """How the judgement on held-out points differs, which no server reads."""
    if before is None or after is None:
        yield from _changed("evidence beside the policy", *("there" if of else "none" for of in (before, after)))
        return
    yield from _changed("longest first call of a served candidate", before.first_call_bound_s, after.first_call_bound_s)
    old, new = before.overall, after.overall
    yield from _changed("held-out shapes", old.points if old else 0, new.points if new else 0)
    if old and new:
        told = [(rules.slowdown[0].mean, rules.slowdown[0].worst) for rules in (old, new)]
        yield from _changed("slowdown there, mean and worst", *(f"{mean:.3f} and {worst:.2f}" for mean, worst in told))


def _changed(name: str, before: object, after: object) -> Iterator[str]:
    if before != after:
        yield f"{name}: {before} -> {after}"


def _entries(name: str, before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    for key in dict.fromkeys((*before, *after)):
        yield from _changed(f"{name} {key}", before.get(key, "none"), after.get(key, "none"))


def table_name(table: Table) -> str:
    """``prefill_attention of deepseek-v3.2 (vllm), 64 heads, dsa``."""
    engine = "" if table.engine is Engine.SGLANG else f" ({table.engine})"
    heads = "" if table.h_q is None else f", {table.h_q} heads"
    return f"{table.site} of {table.model}{engine}{heads}, {table.layer}"
