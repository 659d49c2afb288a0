"""Sites and shapes that tests draw from."""

from __future__ import annotations

from hypothesis import strategies as st

from mla_tune.sites.shape import RaggedShape, Shape
from mla_tune.sites.site import MODELS, Site, SiteName


def every_site(*names: SiteName) -> list[Site]:
    """Every site of every model and head count, once; of these names only, where some are given."""
    sites = [
        model.site(name, layer, h_q)
        for model in MODELS.values()
        for name in names or SiteName
        for h_q in model.heads
        for layer in model.site_layers(name)
    ]
    return list(dict.fromkeys(sites))


@st.composite
def shapes(draw: st.DrawFn, max_reqs: int = 6, max_extend: int = 40, max_context: int = 3000) -> Shape:
    """A shape with ragged requests: at most so many, of so many new tokens and so much context each."""
    num_reqs = draw(st.integers(1, max_reqs))
    num_qo_tokens = draw(st.integers(num_reqs, num_reqs * max_extend))
    kv_tokens = draw(st.integers(num_qo_tokens, max(num_qo_tokens, num_reqs * max_context)))
    return Shape(num_reqs, num_qo_tokens, kv_tokens)


@st.composite
def ragged_shapes(draw: st.DrawFn, max_reqs: int = 6, max_extend: int = 40, max_context: int = 3000) -> RaggedShape:
    """A forward whose requests have nothing in common."""
    requests = draw(
        st.lists(st.tuples(st.integers(1, max_extend), st.integers(0, max_context)), min_size=1, max_size=max_reqs)
    )
    return RaggedShape(tuple((extend, extend + before) for extend, before in requests))


def one_by_one(shape: Shape) -> RaggedShape:
    """The requests of ``shape``, each listed."""
    return RaggedShape(tuple(zip(shape.extend_lens(), shape.seq_lens(), strict=True)))
