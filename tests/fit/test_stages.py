"""The list that kernels, sweep and fit share."""

from __future__ import annotations

import pytest

from mla_tune.errors import UsageError
from mla_tune.sites.candidates import names_at, stages
from mla_tune.sites.site import LayerType, Site
from mla_tune.sites.stages import Amortization
from tests.fit.synthetic import C4A, METADATA, attention_sites


def test_only_c4a_combines_its_indices_in_every_layer() -> None:
    combine = {
        site.layer: stage.amortization
        for site in attention_sites()
        for stage in stages(site, "sparse_fwd")
        if stage.name == "combine"
    }
    assert combine == {
        LayerType.SWA_ONLY: Amortization.PER_LAYER_TYPE,
        LayerType.C4A: Amortization.PER_LAYER,
        LayerType.C128A: Amortization.PER_LAYER_TYPE,
    }


def test_metadata_is_one_stage_of_every_candidate() -> None:
    for candidate in names_at(METADATA):
        (stage,) = stages(METADATA, candidate)
        assert (stage.name, stage.amortization) == ("metadata", Amortization.PER_LAYER_TYPE)


def test_stage_names_are_unique_and_attention_comes_last() -> None:
    for site in [*attention_sites(), Site.parse("prefill_attention/dsa/h128/k2048")]:
        for candidate in names_at(site):
            names = [stage.name for stage in stages(site, candidate)]
            assert len(set(names)) == len(names)
            assert names[-1] == "attention"


def test_a_candidate_of_another_site_is_refused_with_the_accepted_ones() -> None:
    with pytest.raises(UsageError, match="accepted: sparse_fwd, "):
        stages(C4A, "jit")
