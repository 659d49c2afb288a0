"""Variants of one path as candidates of their own: where they win, and under which model of the inputs."""

from dataclasses import replace

import pytest

from mla_tune.fit.costs import CostModel
from mla_tune.fit.explanation import explain
from mla_tune.fit.table_rows import fit_policy
from mla_tune.fit.usable import usable
from mla_tune.policy.codec import dump_policy, parse_policy
from mla_tune.policy.schema import Policy, Table
from mla_tune.sites.engines import Engine
from mla_tune.sites.launch_parameters import CombineConfig, KernelLaunch
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Conditions, LayerType, Site, SiteName
from mla_tune.store.measurement import Measurement, Role
from mla_tune.store.tuned import Tuned
from tests.fit.synthetic import ENVIRONMENT, SOURCE, World, fit_shapes, held_out_shapes

C4A = Site(SiteName.PREFILL_ATTENTION, LayerType.C4A, 64, 512)
ALL = World(not_measured=())


def measured(site: Site, world: World = ALL) -> list[Measurement]:
    return [*world.measure(site, fit_shapes()), *world.measure(site, held_out_shapes(), Role.HELD_OUT)]


def fitted(rows: list[Measurement], tuned: tuple[Tuned, ...] = ()) -> Policy:
    return fit_policy(ENVIRONMENT, rows, source=SOURCE, tuned=tuned).policy


def own_table(policy: Policy) -> Table:
    """What whoever runs these kernels chooses by."""
    (table,) = (t for t in policy.tables if (t.layer, t.model, t.engine) == ("c4a", "deepseek-v4-flash", Engine.OWN))
    return table


def chosen(policy: Policy) -> set[str]:
    table = own_table(policy)
    return {choice.candidate for row in table.rows for choice in row.choices}


@pytest.fixture(scope="module")
def overlapping() -> Policy:
    return fitted(measured(replace(C4A, overlap=95)))


def test_dequantizing_the_selected_rows_alone_wins_where_neighbours_share_them(overlapping: Policy) -> None:
    assert "sparse_fwd_selected" in chosen(overlapping)
    assert overlapping.overlap == 95
    assert parse_policy(dump_policy(overlapping), "again") == overlapping
    assert b"\noverlap: 95\n" in dump_policy(overlapping)


def test_no_engine_is_told_to_take_a_kernel_that_it_lacks(overlapping: Policy) -> None:
    for table in overlapping.tables:
        if table.engine is not Engine.OWN:
            assert not any(name.startswith("sparse_fwd_") for name in table.candidates)


def test_a_policy_is_of_one_overlap_and_independent_without_a_word() -> None:
    both = [*measured(C4A), *measured(replace(C4A, overlap=95))]
    independent = fitted(list(usable(both)))
    assert independent == fitted(measured(C4A))
    assert independent.overlap == 0
    assert b"overlap" not in dump_policy(independent)
    assert fitted(list(usable(both, conditions=Conditions(overlap=95)))).overlap == 95


def test_what_ran_with_other_launch_parameters_is_not_fitted() -> None:
    tuned = (Tuned(KernelLaunch("combine_topk", 0, CombineConfig(1, 1024, 4)), 3.0, 4.0, 9),)
    stale = measured(C4A)
    assert {m.candidate for m in usable(stale, tuned) if m.part != "attention"} == {"with_kvcache", "sparse_fwd_fused"}
    digest = "x" * 12
    left = usable([replace(m, launches=digest) for m in stale])
    assert {m.part for m in left} == {"attention", "schedule"}  # no kernel of ours is in these
    policy = fitted(stale, tuned)
    assert [(entry.kernel, entry.size_from) for entry in policy.kernel_config] == [("combine_topk", 0)]


def test_every_stage_of_a_variant_is_explained(overlapping: Policy) -> None:
    costs = CostModel(ENVIRONMENT, measured(replace(C4A, overlap=95)))
    explained = {c.candidate: c for c in explain(costs, own_table(overlapping), Shape(1, 64, 1 << 20)).candidates}
    assert [line.stage for line in explained["sparse_fwd_fused"].stages] == ["prepare", "attention"]
    assert {"mark", "compact", "dequantize_selected"} < {line.stage for line in explained["sparse_fwd_selected"].stages}
    selected, whole = (explained[name].total_us for name in ("sparse_fwd_selected", "sparse_fwd"))
    assert selected < whole
