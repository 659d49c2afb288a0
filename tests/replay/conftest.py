"""The committed H200 policy with the measurements behind it, and servers small enough to think through."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from hypothesis import strategies as st

from mla_tune.fit.costs import CostModel
from mla_tune.fit.usable import usable
from mla_tune.policy.codec import load_policy
from mla_tune.policy.schema import Table
from mla_tune.replay.prices import Pricer, Tables
from mla_tune.replay.requests import Request
from mla_tune.replay.scheduler import Server
from mla_tune.replay.trace import Trace
from mla_tune.sites.engines import Engine as Chooser
from mla_tune.sites.site import FORWARD, MODELS, SiteName
from mla_tune.store.export import Export, read_export

ROOT = Path(__file__).parents[2]
EVERY = [(model.name, h_q) for model in MODELS.values() for h_q in model.heads]
"""Every model with every head count."""


@cache
def export() -> Export:
    """The committed measurements of an H200."""
    return read_export(ROOT / "db" / "nvidia-h200.jsonl")


@cache
def _costs() -> CostModel:
    return CostModel(export().environment, usable(export().measurements, export().tuned), export().tries)


@cache
def pricer(model: str = "deepseek-v4-flash", h_q: int = 64) -> Pricer:
    """Prices by the committed policy and measurements."""
    tables = load_policy(ROOT / "policies" / "nvidia-h200.yaml").tables
    found = {(t.site, t.model, t.h_q, t.layer): t for t in tables if t.engine == Chooser.SGLANG}

    def table(site: SiteName, heads: int | None, layer: str) -> Table:
        return found[str(site), model, heads, layer]

    attention = SiteName.PREFILL_ATTENTION
    layers = tuple(table(attention, h_q, layer) for layer in MODELS[model].site_layers(attention))
    metadata = table(SiteName.INDEXER_METADATA, None, FORWARD)
    return Pricer(_costs(), Tables(table(attention, h_q, FORWARD), layers, metadata))


@st.composite
def small_traces(draw: st.DrawFn) -> Trace:
    """A few short prompts over few distinct blocks of 8 tokens, so that prefixes are shared and prompts repeat."""
    sizes = draw(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 60), st.integers(0, 12)), max_size=12))
    requests = []
    for arrival_us, prompt_tokens, output_tokens in sorted(sizes):
        count = -(-prompt_tokens // 8)
        blocks = tuple(draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
        requests.append(Request(float(arrival_us), prompt_tokens, output_tokens, blocks, 8))
    return Trace(tuple(requests))


engines = st.builds(
    Server,
    chunk_tokens=st.integers(1, 64),
    concurrency=st.integers(1, 6),
    rest_us=st.sampled_from([0.0, 7.5]),
    rest_us_per_token=st.sampled_from([0.0, 0.5]),
    decode_us=st.sampled_from([0.0, 3.0, 40.0]),
)
