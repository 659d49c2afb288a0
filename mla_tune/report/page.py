"""The report as one HTML file that needs nothing else: its data, its style, its script and plotly's are all inside.

plotly.js comes from the installed Python package and goes in compressed, which the browser undoes: a third of its size.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import msgspec

from mla_tune import __version__
from mla_tune.errors import MissingPackageError
from mla_tune.hardware.datasheet import DATASHEETS
from mla_tune.report.contents import CandidateBound, Contents, Origin, SiteMap, is_whole_forward
from mla_tune.report.palette import device_words, look, model_words, site_words, unit_words
from mla_tune.report.roofline import MEASURED_COPY_GBPS
from mla_tune.sites.engines import Engine
from mla_tune.sites.site import SiteName

INSTALL = "pip install 'mla-tune[report]'"
"""What brings the packages that draw."""
_EVEN = (
    "Shapes are spread evenly over the logarithms of their sizes, as traffic is not: full prefill chunks all lie at one "
    "count of query tokens. `mla-tune traffic` weighs a policy by what a server recorded."
)


_LONG_CALL_S = 0.05
"""First calls from here up have a line of their own: fifty times what a launch with everything loaded takes."""


def page(found: Contents) -> bytes:
    """The whole file. Equal contents and packages give equal bytes. Raises :class:`MissingPackageError` without plotly."""
    code, version = plotly_code()
    packed = base64.b64encode(gzip.compress(code.encode(), 9, mtime=0)).decode()
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>mla-tune: {escape(found.sku)}</title>",
        f"<style>{_asset('page.css')}</style></head><body>",
        *_head(found),
        *_verdicts(found),
        _asset("charts.html"),
        *_bounds(found),
        *_origins(found),
        _asset("words.html"),
        f'<p class="quiet">Made by mla-tune {__version__}. Charts: plotly.js (Python package {escape(version)}, MIT).</p>',
        f'<script type="application/json" id="data">{_data(found)}</script>',
        f'<script type="text/plain" id="plotly">{packed}</script>',
        f"<script>{_asset('page.js')}</script>",
        "</body></html>",
    ]
    return "\n".join(parts).encode()


def plotly_code() -> tuple[str, str]:
    """plotly.js and the version of the package that has it. Raises :class:`MissingPackageError` without that."""
    try:
        import plotly
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"a report is drawn by plotly: {error.name} is not installed; next: {INSTALL}"
        ) from None
    return str(get_plotlyjs()), str(plotly.__version__)


def _asset(name: str) -> str:
    return files("mla_tune.report").joinpath(name).read_text(encoding="utf-8")


def _data(found: Contents) -> str:
    """All that the script draws, as JSON that cannot end its own element."""
    models = {f"{entry.model}|{entry.h_q or ''}": model_words(entry.model, entry.h_q) for entry in found.maps}
    value: dict[str, Any] = {
        **msgspec.to_builtins(found),
        "looks": {name: look(name) for entry in found.maps for name in entry.candidates},
        "words": {"models": models, "sites": {entry.site: site_words(entry.site) for entry in found.maps}},
        "roofline": _roofline_words(found.sku),
    }
    return msgspec.json.encode(value).decode().replace("<", "\\u003c")


def _roofline_words(sku: str) -> dict[str, str]:
    sheet = next((sheet for sheet in DATASHEETS if sheet.sku == sku), None)
    copy = MEASURED_COPY_GBPS.get(sku)
    bound = (
        f"roofline: every byte once at {sheet.memory_bandwidth_gbps.value / 1e3:g} TB/s, or all multiply-adds at "
        f"{sheet.bf16_tflops.value:g} dense bf16 TFLOP/s, by the datasheet"
        if sheet
        else ""
    )
    return {"words": bound, "copy": f"the same bytes at a measured copy's {copy.value / 1e3:g} TB/s" if copy else ""}


def _head(found: Contents) -> Iterable[str]:
    yield '<div class="top"><div>'
    yield f"<h1>Which attention kernel is faster on {escape(device_words(found.sku))}</h1>"
    kinds = {"modelled" if origin.modelled_from else "measured" for origin in found.policies}
    timed = sum(origin.measurements for origin in found.policies)
    yield (
        f'<p class="quiet">{found.sm_count} {unit_words(found.sku)}; {" and ".join(sorted(kinds))} policies: '
        f"{', '.join(escape(origin.file) for origin in found.policies)}; {timed:,} timings behind them.</p></div>"
    )
    yield '<button id="theme" class="screen" type="button">Theme: auto</button></div>'
    for origin in found.policies:
        if origin.modelled_from:
            yield f'<p class="warning">{escape(_modelled(found.sku, origin))}</p>'
    yield '<p class="warning" id="failed">This browser cannot draw the charts: it needs DecompressionStream (2023).</p>'
    yield "<noscript><p class='warning'>The charts need JavaScript; the tables do not.</p></noscript>"


def _modelled(sku: str, origin: Origin) -> str:
    off = ""
    if origin.uncertainty:
        low, high = (round(2.718281828459045**width, 2) for width in origin.uncertainty)
        off = f" A predicted time may be off by a factor of {low} to {high} both ways, by candidate and layer type."
    return (
        f"{origin.file} is modelled: scaled from {origin.modelled_from}'s curves by the vendor's datasheets. Nothing "
        f"was timed on {sku}.{off} Where two predictions are closer than that, the engine's default stays."
    )


def _verdicts(found: Contents) -> Iterable[str]:
    """One sentence for each model on top, for what engines run; the other tables of whole forwards below."""
    yield '<section aria-label="Verdict"><h2>What the policy wins over the engine\'s own choice</h2>'
    best = len(found.policies) - 1  # an engine's kernels come after our own
    headline = [
        (index, entry)
        for index, entry in enumerate(found.maps)
        if is_whole_forward(entry) and entry.site == SiteName.PREFILL_ATTENTION and entry.engine == Engine.SGLANG
    ]
    for index, entry in headline:
        if entry.policy == best:
            where = f"in {entry.engine_words}, {found.policies[entry.policy].provider}"
            yield (
                f'<p class="verdict"><strong>{_button(index, model_words(entry.model, entry.h_q))} '
                f'<span class="quiet">{escape(where)}</span></strong>{escape(entry.win.sentence)}</p>'
            )
    yield f'<p class="quiet">{escape(_EVEN).replace("`mla-tune traffic`", "<code>mla-tune traffic</code>")}</p>'
    others = [
        (index, entry)
        for index, entry in enumerate(found.maps)
        if is_whole_forward(entry) and not any(index == shown and entry.policy == best for shown, _ in headline)
    ]
    if others:
        yield f"<details><summary>{len(others)} more tables of whole forwards</summary>"
        yield from _table(
            ("model", "site", "chooses", "kernels around attention", "verdict"),
            [
                (
                    _button(index, model_words(entry.model, entry.h_q)),
                    escape(site_words(entry.site)),
                    escape(entry.engine_words),
                    escape(found.policies[entry.policy].provider),
                    escape(entry.win.sentence),
                )
                for index, entry in others
            ],
        )
        yield "</details>"
    yield "</section>"


def _button(index: int, words: str) -> str:
    return f'<button type="button" class="link" data-map="{index}">{escape(words)}</button>'


def _bounds(found: Contents) -> Iterable[str]:
    yield "<section><h2>Limits and first calls</h2>"
    yield (
        "<p>A limit is the most query tokens that a kernel build runs on this GPU, found by trying neighbours in processes "
        "of their own; past it a candidate is never answered. A first call is what a server waits for at a query token "
        "count that it has not met; above the bound of the fit a candidate does not serve.</p>"
    )
    for index, _ in enumerate(found.policies):
        yield f'<div data-policy="{index}">'
        bounds = _by_candidate([entry for entry in found.maps if entry.policy == index])
        told = [entry for entry in bounds if entry[2].limit is not None or entry[2].first_call_s >= _LONG_CALL_S]
        heads = ("layer, heads", "candidate", "runs up to", "fails at", "first call", "why")
        if told:
            yield from _table(heads, [_bound_row(*entry) for entry in told], numbers=(2, 3, 4))
        others = [entry[2] for entry in bounds if entry not in told]
        if others:
            names = ", ".join(dict.fromkeys(bound.candidate for bound in others))
            longest = 1e3 * max(bound.first_call_s for bound in others)
            yield f"<p>No limit was found elsewhere ({escape(names)}). First calls there take up to {longest:.0f} ms.</p>"
        yield "</div>"
    yield "</section>"


def _by_candidate(maps: Sequence[SiteMap]) -> list[tuple[str, str, CandidateBound]]:
    """Site, layer type with heads, and bound of each candidate: once, however many models and engines share it."""
    found: dict[tuple[str, str, str], tuple[str, str, CandidateBound]] = {}
    for entry in maps:
        where = entry.layer if entry.h_q is None else f"{entry.layer}, {entry.h_q} heads"
        for bound in () if is_whole_forward(entry) else entry.bounds:
            found.setdefault((entry.site, where, bound.candidate), (entry.site, where, bound))
    return list(found.values())


def _bound_row(site: str, where: str, bound: CandidateBound) -> tuple[str, ...]:
    where = where if site == SiteName.PREFILL_ATTENTION else f"{where} ({site_words(site).lower()})"
    return (
        escape(where),
        escape(bound.candidate),
        "no limit found" if bound.limit is None else f"{bound.limit:,}",
        "" if bound.fails_at is None else f"{bound.fails_at:,}",
        f"{bound.first_call_s:.2f} s" if bound.first_call_s >= _LONG_CALL_S else f"{1e3 * bound.first_call_s:.0f} ms",
        escape("; ".join(filter(None, ("does not serve: its first calls are too long" * bound.barred, bound.reason)))),
    )


def _origins(found: Contents) -> Iterable[str]:
    yield "<section><h2>Environment and provenance</h2>"
    for index, origin in enumerate(found.policies):
        rows = [
            ("policy", f"{origin.file}, SHA-256 {origin.sha256}"),
            ("measurements", f"{origin.source}, SHA-256 {origin.source_sha256}; {origin.measurements:,} timings"),
            ("made by", origin.command),
            ("kernels around attention", origin.provider),
            ("regime", "GPU time by graph replay, cold L2" if origin.regime == "graph" else "host included"),
            *origin.environment,
        ]
        yield f'<div data-policy="{index}">'
        yield from _table(("", ""), [(escape(name), f"<code>{escape(value)}</code>") for name, value in rows])
        yield "</div>"
    yield "</section>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> Iterable[str]:
    """A table whose rows become cards on a phone; cells are HTML."""
    kinds = [' class="number"' if index in numbers else "" for index in range(len(heads))]
    yield '<div class="scroll"><table class="cards">'
    if any(heads):
        yield "<thead><tr>"
        yield from (f'<th scope="col"{kind}>{escape(head)}</th>' for head, kind in zip(heads, kinds, strict=True))
        yield "</tr></thead>"
    yield "<tbody>"
    for row in rows:
        yield "<tr>"
        yield from (
            f'<td{kind} data-label="{escape(head)}">{cell}</td>'
            for cell, head, kind in zip(row, heads, kinds, strict=True)
        )
        yield "</tr>"
    yield "</tbody></table></div>"
