"""Which builds a table depends on: those whose kernels its stages run, and no other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mla_tune.fit.scope import Scope
from mla_tune.hardware.builds import DISTRIBUTIONS, UNKNOWN, Build
from mla_tune.hardware.sku import CPU, Environment
from mla_tune.policy.schema import CandidateBuilds
from mla_tune.sites.candidates import TOPK_TRANSFORM, Candidate, candidate_at
from mla_tune.sites.site import LayerType, Site
from mla_tune.sites.stages import Stage


def builds_of(
    environment: Environment, scope: Scope, incumbent: str, candidates: Sequence[str]
) -> tuple[tuple[str, ...], tuple[CandidateBuilds, ...]]:
    """The incumbent's builds, which the whole table depends on, and what each other candidate needs besides."""
    needed = {name: _candidate_builds(environment, scope, name) for name in candidates}
    shared = needed[incumbent]
    own = {name: builds - shared for name, builds in sorted(needed.items())}
    return _texts(shared), tuple(
        CandidateBuilds(candidate=name, builds=_texts(builds)) for name, builds in own.items() if builds
    )


def _candidate_builds(environment: Environment, scope: Scope, name: str) -> set[Build]:
    return {
        build
        for site, _ in scope.parts
        for candidate in (candidate_at(site, name),)
        for stage in candidate.stages(site)
        for build in _stage_builds(environment, site, candidate, stage)
    }


def _stage_builds(environment: Environment, site: Site, candidate: Candidate, stage: Stage) -> Iterator[Build]:
    """None for a kernel of this project, and none on the CPU, where all of them are."""
    if environment.sku == CPU:
        return
    if stage.source is not None:
        names = DISTRIBUTIONS[stage.source]
        found = [Build(library.name, library.version) for library in environment.libraries if library.name in names]
        # What was timed without a record of its build is served with none.
        yield from found or [Build(names[-1], UNKNOWN)]
    elif site.provider is not None and stage.replaced:
        # V3.2's transform for the KV-cache kernel is sglang-kernel's, of which no table names the release: left out of both
        # paths, or timed with it, the tables choose equally well (tests/test_artefacts.py). All other kernels are sglang's.
        if stage == TOPK_TRANSFORM and site.layer is LayerType.DSA and candidate.paged:
            return
        yield Build(site.provider.name, site.provider.version)


def _texts(builds: set[Build]) -> tuple[str, ...]:
    return tuple(map(str, sorted(builds)))
