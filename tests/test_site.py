"""Sites and models: keys read back, layers and heads are checked, and each model is what its config says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.sites.candidates import names_at, stages
from mla_tune.sites.engines import Engine, engine_choice
from mla_tune.sites.site import (
    DEEPSEEK_V3_2,
    DEEPSEEK_V4_FLASH,
    DEEPSEEK_V4_PRO,
    MODELS,
    LayerType,
    ModelConfig,
    Site,
    SiteName,
    model,
)
from mla_tune.sites.stages import Amortization
from tests.shapes import every_site

any_site = st.builds(
    Site,
    st.sampled_from(SiteName),
    st.sampled_from(LayerType),
    st.none() | st.integers(1, 1 << 20),
    st.none() | st.integers(1, 1 << 20),
)
models = st.sampled_from(list(MODELS.values()))


@given(any_site)
def test_a_key_reads_back_as_its_site(site: Site) -> None:
    assert Site.parse(site.key) == site


@given(any_site, any_site)
def test_different_sites_have_different_keys(one: Site, other: Site) -> None:
    assert (one.key == other.key) == (one == other)


@given(any_site, st.integers(0, 60), st.sampled_from(["", "/", "x", "0", " ", "/h64", "/k1", "h-1"]))
def test_an_edited_key_is_refused_unless_it_is_another_sites_key(site: Site, at: int, inserted: str) -> None:
    edited = site.key[:at] + inserted + site.key[at:]
    try:
        parsed = Site.parse(edited)
    except ValueError:
        return
    assert parsed.key == edited


@pytest.mark.parametrize(
    "key", ["", "prefill_attention", "prefill_attention/c5a", "x/c4a", "prefill_attention/c4a/k512/h64", "a/b/h٣"]
)
def test_what_no_site_writes_is_no_key(key: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Site.parse(key)


@given(models, st.sampled_from(SiteName), st.sampled_from(LayerType), st.none() | st.integers(-1, 200))
def test_a_model_has_a_site_exactly_at_its_own_layers_and_heads(
    config: ModelConfig, name: SiteName, layer: LayerType, h_q: int | None
) -> None:
    has_layer = layer in config.site_layers(name)
    has_heads = name is SiteName.INDEXER_METADATA or h_q is None or h_q in config.heads
    if has_layer and has_heads:
        site = config.site(name, layer, h_q)
        assert (site.name, site.layer) == (name, layer)
        assert site in every_site(name)
        return
    with pytest.raises(UsageError, match=r"got .*; accepted: ") as caught:
        config.site(name, layer, h_q)
    assert "\n" not in str(caught.value)


def test_layer_counts_add_up_to_the_published_models() -> None:
    assert [m.num_layers for m in (DEEPSEEK_V4_FLASH, DEEPSEEK_V4_PRO, DEEPSEEK_V3_2)] == [43, 61, 61]
    for config in MODELS.values():
        assert sum(config.layer_count(layer) for layer in LayerType) == config.num_layers


def test_models_share_the_measurements_of_layers_that_agree() -> None:
    flash, pro = (
        {m.site(SiteName.PREFILL_ATTENTION, layer, 64) for layer in m.site_layers(SiteName.PREFILL_ATTENTION)}
        for m in (DEEPSEEK_V4_FLASH, DEEPSEEK_V4_PRO)
    )
    assert {site.key for site in flash & pro} == {"prefill_attention/c128a/h64"}


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"got 'v4'; accepted: deepseek-v4-flash, deepseek-v4-pro, deepseek-v3\.2"):
        model("v4")


@pytest.mark.parametrize("site", every_site(), ids=lambda site: site.key)
def test_every_sites_incumbent_is_one_of_its_candidates(site: Site) -> None:
    for engine in Engine:
        choice = engine_choice(engine, site.name, site.layer)
        assert choice.incumbent in choice.candidates
        assert set(choice.candidates) <= set(names_at(site))
    assert list(names_at(site)) == sorted(names_at(site))


@pytest.mark.parametrize("site", every_site(), ids=lambda site: site.key)
def test_stages_of_a_whole_forward_come_first(site: Site) -> None:
    order = [Amortization.PER_FORWARD, Amortization.PER_LAYER_TYPE, Amortization.PER_LAYER]
    for candidate in names_at(site):
        ranks = [order.index(stage.amortization) for stage in stages(site, candidate)]
        assert ranks
        assert ranks == sorted(ranks)


def test_a_site_says_the_overlap_of_its_inputs_only_where_there_is_one() -> None:
    site = Site(SiteName.PREFILL_ATTENTION, LayerType.C4A, 64, 512)
    assert site.key == "prefill_attention/c4a/h64/k512"
    assert site.overlapping(80).key == "prefill_attention/c4a/h64/k512/o80"
    assert Site.parse(site.overlapping(80).key) == site.overlapping(80)
    assert site.overlapping(80).overlapping(0) == site
    windowed = Site(SiteName.PREFILL_ATTENTION, LayerType.SWA_ONLY, 64)
    assert windowed.overlapping(80) == windowed
