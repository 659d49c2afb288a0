"""Measurements of an engine's kernels beside those of our own: kept apart from the store to what ``explain`` prints."""

from dataclasses import replace
from pathlib import Path

import pytest

from mla_tune.errors import PolicyError, UsageError
from mla_tune.fit.costs import CostModel
from mla_tune.fit.explanation import explain
from mla_tune.fit.limits import limits
from mla_tune.fit.observations import Observations
from mla_tune.fit.table_rows import fit_policy
from mla_tune.fit.usable import stored_provider, usable
from mla_tune.policy.codec import dump_policy, parse_policy
from mla_tune.policy.schema import Policy
from mla_tune.sites.candidates import DEEP_GEMM, JIT, SPARSE_FWD, names_at, stages
from mla_tune.sites.engines import Engine
from mla_tune.sites.provider import OWN, Provider
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Conditions, Site
from mla_tune.store.database import Database
from mla_tune.store.export import export_lines, read_export, to_export_precision, write_export
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import Measurement, Outcome, Role
from tests.fit.synthetic import C4A, ENVIRONMENT, METADATA, SOURCE, World, fit_shapes, held_out_shapes, stage_us

RELEASE = Provider("sglang", "0.5.23")
TRANSFORMS = Provider("sglang", "0.5.23", "0.4.10")


def slower(site: Site, candidate: str, stage: str, shape: Shape) -> float:
    """SGLang's dequantize kernel at half of our speed: the crossover moves."""
    return stage_us(site, candidate, stage, shape) * (2 if stage == "dequantize_compressed" else 1)


def measured(site: Site, law: World) -> list[Measurement]:
    return [*law.measure(site, fit_shapes()), *law.measure(site, held_out_shapes(), Role.HELD_OUT)]


def fitted(rows: list[Measurement] | tuple[Measurement, ...]) -> Policy:
    return fit_policy(ENVIRONMENT, rows, source=SOURCE).policy


OURS = measured(C4A, World())
THEIRS = measured(Conditions(provider=RELEASE).at(C4A), World(slower))
TRANSFORMED = measured(Conditions(provider=TRANSFORMS).at(C4A), World(slower))


@pytest.mark.parametrize("provider", [RELEASE, TRANSFORMS, Provider("sglang", "0.6.0rc1+cu130", "0.4.10")])
def test_a_site_says_whose_kernels_ran_only_where_they_are_not_ours(provider: Provider) -> None:
    for site in (C4A, METADATA, replace(C4A, overlap=80)):
        provided = replace(site, provider=provider)
        assert provided.key == f"{site.key}/{provider.key}"
        assert Site.parse(provided.key) == provided


@pytest.mark.parametrize(
    "key",
    [
        "sglang",
        "sglang@",
        "vllm@0.33.0",
        "own@1",
        "sglang@0.5 23",
        "@0.5.23",
        "sglang@a@b",
        "sglang@0.5.23+sglang-kernel@",
        "sglang@0.5.23+sglang-kernel@a@b",
    ],
)
def test_what_is_no_key_of_a_provider_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="not the key of a provider"):
        Provider.parse(key)


def test_timings_of_two_providers_are_stored_and_exported_side_by_side(tmp_path: Path) -> None:
    both = [*OURS, *THEIRS]
    with Database.open(tmp_path / "a.db") as database:
        database.record(ENVIRONMENT, OURS)
        database.record(ENVIRONMENT, THEIRS)
        stored = database.measurements(ENVIRONMENT.id)
    assert len(stored) == len(both)
    write_export(tmp_path / "a.jsonl", ENVIRONMENT, stored)
    found = read_export(tmp_path / "a.jsonl").measurements
    ours, theirs = (list(map(to_export_precision, rows)) for rows in (OURS, THEIRS))
    assert fitted(usable(found)) == fitted(ours)
    assert fitted(usable(found, conditions=Conditions(provider=RELEASE))) == fitted(theirs)


def test_only_an_export_of_another_provider_asks_for_a_newer_reader() -> None:
    versions = [next(iter(export_lines(ENVIRONMENT, rows)))[:60] for rows in (OURS[:1], THEIRS[:1])]
    assert ['"version":2' in versions[0], '"version":4' in versions[1]] == [True, True]


def test_a_policy_is_of_one_provider_and_says_which() -> None:
    ours, theirs = fitted(OURS), fitted(THEIRS)
    assert b"provider" not in dump_policy(ours)
    assert b"\nprovider: " in dump_policy(theirs)
    assert b"the kernels of sglang@0.5.23" in b" ".join(dump_policy(theirs).replace(b"\n#", b"").split())
    assert parse_policy(dump_policy(theirs), "again") == theirs
    assert {table.engine for table in theirs.tables} == {Engine.SGLANG}
    first = {name: policy.tables[0].rows[-1] for name, policy in (("ours", ours), ("theirs", theirs))}
    assert first["ours"] != first["theirs"]  # the slower kernel moves the crossover


def test_a_policy_of_an_unknown_provider_is_refused() -> None:
    text = dump_policy(fitted(THEIRS)).replace(b'provider: "sglang@0.5.23"', b"provider: vllm")
    with pytest.raises(
        PolicyError, match="provider must be the key of a provider: got 'vllm'; accepted: sglang@VERSION"
    ):
        parse_policy(text, "a.yaml")


def test_a_fit_takes_the_one_release_that_was_measured_and_asks_where_there_are_more() -> None:
    assert stored_provider([*OURS, *THEIRS], OWN) is None
    assert stored_provider([*OURS, *THEIRS], "sglang") == RELEASE
    assert stored_provider([*THEIRS, *TRANSFORMED], TRANSFORMS.key) == TRANSFORMS
    accepted = r"accepted: own, sglang@0\.5\.23, sglang@0\.5\.23\+sglang-kernel@0\.4\.10; next: "
    with pytest.raises(UsageError, match=f"got 'sglang'; {accepted}"):
        stored_provider([*THEIRS, *TRANSFORMED], "sglang")
    with pytest.raises(UsageError, match="got 'sglang'; accepted: own; next: `mla-tune sweep --provider sglang`"):
        stored_provider(OURS, "sglang")


def test_every_stage_is_explained_with_whose_kernel_runs_it() -> None:
    table = fitted(TRANSFORMED).tables[0]
    explained = explain(CostModel(ENVIRONMENT, TRANSFORMED), table, Shape(1, 64, 1 << 20))
    lines = {c.candidate: {line.stage: line.provider for line in c.stages} for c in explained.candidates}
    theirs = dict.fromkeys(("topk_transform", "dequantize_compressed", "dequantize_window", "combine"), "sglang 0.5.23")
    slots = {"window_ids": "own", "row_ids": "own"}
    assert lines["sparse_fwd"] == slots | theirs | {"attention": "flash_mla"}
    assert lines["with_kvcache"] == {
        "schedule": "flash_mla",
        "topk_transform": "sglang 0.5.23",
        "attention": "flash_mla",
    }
    own = explain(CostModel(ENVIRONMENT, OURS), fitted(OURS).tables[0], Shape(1, 64, 1 << 20))
    assert {line.provider for c in own.candidates for line in c.stages} == {"own", "flash_mla"}


def test_a_limit_of_a_kernel_that_no_provider_replaces_holds_for_every_provider() -> None:
    site = Conditions(provider=TRANSFORMS).at(C4A)
    shapes = [(Shape(1, 40_000, 40_000), Outcome.OK), (Shape(1, 40_001, 40_001), Outcome.CRASH)]
    tries = [Try(C4A, name, shape, outcome) for name in ("with_kvcache", "sparse_fwd") for shape, outcome in shapes]
    (limit,) = limits(Observations(TRANSFORMED, tries), [site], names_at(site))
    assert (limit.candidate, limit.num_qo_tokens, limit.fails_at) == ("with_kvcache", 40_000, 40_001)
    (theirs,) = fit_policy(ENVIRONMENT, TRANSFORMED, tries, source=SOURCE).policy.tables
    assert [(entry.candidate, entry.num_qo_tokens) for entry in theirs.limits] == [
        ("with_kvcache", 40_000)
    ]  # SGLang's own dequantize is another kernel than the one that was tried


def test_the_transform_is_paid_by_both_paths_in_every_layer() -> None:
    for name, shares in (("sparse_fwd", 2), ("with_kvcache", 1)):
        names = [stage.name for stage in stages(Conditions(provider=TRANSFORMS).at(C4A), name)]
        assert names.index("topk_transform") == shares  # behind what runs once a forward, before all that needs it
        assert "topk_transform" not in [stage.name for stage in stages(Conditions(provider=RELEASE).at(C4A), name)]


def test_launch_parameters_of_our_kernels_matter_only_where_ours_run() -> None:
    provided = Conditions(provider=RELEASE).at(C4A)
    assert SPARSE_FWD.own_kernels(provided) == ("slot_ids",)
    assert set(SPARSE_FWD.own_kernels(C4A)) == {"slot_ids", "dequantize_v4", "combine_topk"}
    assert JIT.own_kernels(replace(METADATA, provider=RELEASE)) == ()
    assert DEEP_GEMM.stages(METADATA)[0].run_by(METADATA) == "deep_gemm"
