"""Which builds a fitted table names: those whose kernels its stages ran, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from mla_tune.fit.scope import scope
from mla_tune.fit.table_builds import builds_of
from mla_tune.hardware.builds import Build
from mla_tune.hardware.sku import Environment
from mla_tune.policy.codec import load_policy
from mla_tune.policy.schema import CandidateBuilds
from mla_tune.sites.engines import Engine
from mla_tune.sites.provider import Provider
from mla_tune.sites.site import MODELS, Conditions, SiteName
from mla_tune.store.export import read_export

ROOT = Path(__file__).parents[2]
FLASH_MLA, DEEP_GEMM, SGLANG = "sgl-flash-mla==1.0.0", "sgl-deep-gemm==0.1.2", "sglang==0.5.23"
DEEP_GEMM_ALONE = (CandidateBuilds(candidate="deep_gemm", builds=(DEEP_GEMM,)),)
PROVIDED = Conditions(provider=Provider("sglang", "0.5.23", "0.4.5"))


@pytest.fixture(scope="module")
def h200() -> Environment:
    """What the sweep of the H200 recorded."""
    return read_export(ROOT / "db" / "nvidia-h200.jsonl").environment


def test_attention_depends_on_flash_mla_and_on_nothing_else(h200: Environment) -> None:
    for engine, candidates in (
        (Engine.SGLANG, ("sparse_fwd", "with_kvcache")),
        (Engine.VLLM, ("sparse_fwd", "with_kvcache_mixed")),
    ):
        of = scope(SiteName.PREFILL_ATTENTION, MODELS["deepseek-v3.2"], "dsa", 64, engine)
        assert builds_of(h200, of, "sparse_fwd", candidates) == ((FLASH_MLA,), ())


def test_the_schedule_depends_on_deep_gemm_in_the_candidate_that_calls_it(h200: Environment) -> None:
    flash = MODELS["deepseek-v4-flash"]
    ours = scope(SiteName.INDEXER_METADATA, flash, "c4a", None)
    assert builds_of(h200, ours, "jit", ("deep_gemm", "jit")) == ((), DEEP_GEMM_ALONE)
    theirs = scope(SiteName.INDEXER_METADATA, flash, "c4a", None, conditions=PROVIDED)
    assert builds_of(h200, theirs, "jit", ("deep_gemm", "jit")) == ((SGLANG,), DEEP_GEMM_ALONE)


def test_an_engines_stages_depend_on_the_release_they_were_timed_with(h200: Environment) -> None:
    of = scope(SiteName.PREFILL_ATTENTION, MODELS["deepseek-v4-flash"], "forward", 64, conditions=PROVIDED)
    names = ("sparse_fwd", "with_kvcache")
    assert builds_of(h200, of, "sparse_fwd", names) == ((FLASH_MLA, SGLANG), ())
    untransformed = Conditions(provider=Provider("sglang", "0.5.23"))
    of = scope(SiteName.PREFILL_ATTENTION, MODELS["deepseek-v4-flash"], "forward", 64, conditions=untransformed)
    assert builds_of(h200, of, "sparse_fwd", names) == ((FLASH_MLA, SGLANG), ())


def test_what_was_timed_without_a_record_of_its_build_names_one_that_is_nowhere(h200: Environment) -> None:
    from dataclasses import replace

    of = scope(SiteName.PREFILL_ATTENTION, MODELS["deepseek-v3.2"], "dsa", 64)
    bare = replace(h200, libraries=())
    assert builds_of(bare, of, "with_kvcache", ("sparse_fwd", "with_kvcache")) == (("flash-mla==unknown",), ())
    assert builds_of(replace(bare, sku="cpu"), of, "with_kvcache", ("sparse_fwd", "with_kvcache")) == ((), ())


def test_every_shipped_table_names_its_builds_and_none_but_the_processors_depends_on_nothing() -> None:
    for path in sorted((ROOT / "policies").glob("*.yaml")):
        for table in load_policy(path).tables:
            named = [*table.builds, *(build for entry in table.candidate_builds for build in entry.builds)]
            assert (not named) == (path.stem == "cpu")
            assert table.site == SiteName.INDEXER_METADATA or DEEP_GEMM not in named
            assert [str(Build.parse(build)) for build in named] == named
