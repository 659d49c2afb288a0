"""A candidate is a value: code asks its properties, and its name stands in definitions, adapters and messages only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mla_tune.fit.bases import Chip, basis
from mla_tune.fit.work import work
from mla_tune.sites.candidates import CANDIDATES, PAGED, WITH_KVCACHE, Candidate, candidates_at
from mla_tune.sites.engines import Engine, engine_choice
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import LayerType, SiteName
from mla_tune.sites.stages import KernelSource, Law
from tests.shapes import every_site

PACKAGE = Path(__file__).parents[1] / "mla_tune"
EVERY = [candidate for found in CANDIDATES.values() for candidate in found]
DEFINITIONS = {"sites/candidates.py"}
"""Where the names are defined."""
LIBRARIES = {"sites/stages.py": {"deep_gemm"}, "hardware/builds.py": {"deep_gemm"}}
"""Names of a kernel library that a candidate shares: its module, and what is looked for in an environment."""


def strings(tree: ast.Module) -> Iterator[str]:
    """Every string of a file that is no docstring."""
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.value


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_code_holds_the_name_of_a_candidate(path: Path) -> None:
    where = path.relative_to(PACKAGE).as_posix()
    if where in DEFINITIONS:
        return
    names = {candidate.name for candidate in EVERY} - LIBRARIES.get(where, set())
    assert names & set(strings(ast.parse(path.read_text()))) == set()


def laws(candidate: Candidate) -> set[Law]:
    """Laws of all its stages, at every layer type."""
    return {stage.law for _, stages in candidate.stages_by_layer for stage in stages}


def test_every_law_is_some_stages_and_has_a_formula() -> None:
    """A formula that no stage reaches is how one candidate came to be fitted by another's law."""
    used = set().union(*map(laws, EVERY))
    assert used | {Law.TOPK_TRANSFORM, Law.WHOLE} == set(Law)
    for site in every_site():
        for law in Law:
            terms = basis(site, law, Chip(132)).terms(work(site, [Shape(1, 64, 8192)]))
            assert all(np.isfinite(term).all() and (term >= 0).all() for term in terms)


def test_no_two_laws_of_attention_are_the_same_formula() -> None:
    site = next(s for s in every_site(SiteName.PREFILL_ATTENTION) if s.layer is LayerType.DSA)
    load = work(site, [Shape(1, q, 131072) for q in (3, 50, 131, 133, 1000, 9000)])
    attention = [law for law in Law if law.endswith("_attention")]
    assert len(attention) == 4
    rows = {tuple(np.round(np.concatenate(basis(site, law, Chip(132)).terms(load)), 6)) for law in attention}
    assert len(rows) == len(attention)


def test_one_entry_is_cut_into_as_many_parts_as_there_are_sms_for_a_query() -> None:
    site = next(s for s in every_site(SiteName.PREFILL_ATTENTION) if s.layer is LayerType.DSA and s.h_q == 64)
    load = work(site, [Shape(1, q, 131072) for q in (1, 33, 66, 67, 132, 133)])
    _, _, waves, wave_tiles, split, *_ = basis(site, Law.ONE_ENTRY_ATTENTION, Chip(132)).terms(load)
    assert waves.tolist() == [1, 1, 1, 1, 1, 2]
    assert wave_tiles.tolist() == [1, 8, 16, 32, 32, 64]
    assert split.tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("candidate", EVERY, ids=str)
def test_a_candidate_is_hashable_sorted_and_says_what_it_needs(candidate: Candidate) -> None:
    assert len({candidate, candidate}) == 1
    names = [entry.name for entry in CANDIDATES[candidate.site]]
    assert names == sorted(names)
    sources = {stage.source for _, stages in candidate.stages_by_layer for stage in stages} - {None}
    assert sources == ({candidate.library} if candidate.library else set())
    assert (candidate.buffers is not None) == (candidate.library is KernelSource.FLASH_MLA)
    assert (candidate.name in PAGED) == candidate.paged


def test_an_engine_takes_only_what_serves_the_site() -> None:
    for site in every_site():
        for engine in Engine:
            choice = engine_choice(engine, site.name, site.layer)
            assert choice.default in choice.options
            assert set(choice.options) <= set(candidates_at(site))


def test_every_candidate_is_some_engines() -> None:
    options = {
        option
        for site in every_site()
        for engine in Engine
        for option in engine_choice(engine, site.name, site.layer).options
    }
    assert options == set(EVERY)
    assert WITH_KVCACHE in options
