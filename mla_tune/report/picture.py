"""The map of one table as a PNG, for a README or a pull request: 1600 pixels wide, on white."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from math import atan2, degrees, log2
from typing import Any

from mla_tune.errors import MissingPackageError
from mla_tune.report.contents import Boundary, Contents, SiteMap, View, is_whole_forward
from mla_tune.report.measured_points import MeasuredPoint
from mla_tune.report.modelled_cells import ModelledCell
from mla_tune.report.page import INSTALL
from mla_tune.report.palette import device_words, look, model_words, request_words, site_words, tokens

_INCHES, _DOTS = (10.0, 6.9), 160
_TEXT, _QUIET = "#1b1f24", "#57606a"
_DASHES = ((0, (6, 3)), (0, (6, 2, 1.5, 2)), (0, (1.5, 2)))
_ALONG = 0.72
"""How far along a slanted line its label stands."""
_SIDE = 1.09
"""Shapes that differ only in their requests are drawn side by side, each this factor to the right of the one before."""


def picture(found: Contents, entry: SiteMap, view: View) -> bytes:
    """The map of ``entry`` for the requests of ``view``. Raises :class:`MissingPackageError` without matplotlib."""
    figure = empty_figure()
    axes = figure.add_axes((0.085, 0.205, 0.895, 0.61))
    _answers(axes, entry, view)
    _brackets(axes, entry, view)
    _typed(axes, view)
    _signs(axes, entry, view)
    _frame(axes, entry, view)
    _line(figure, 0.95, _title(found, entry), 18, fontweight="bold", color=_TEXT)
    _line(figure, 0.895, _subtitle(found, entry, view), 10.8, color=_QUIET)
    _line(figure, 0.848, _told(entry), 10.8, color=_TEXT)
    figure.legend(
        handles=_legend(entry, view),
        loc="lower center",
        ncols=3,
        fontsize=10.6,
        frameon=False,
        bbox_to_anchor=(0.53, 0.0),
        columnspacing=1.6,
        handletextpad=0.5,
    )
    data = BytesIO()
    figure.savefig(data, format="png", dpi=_DOTS, facecolor="white", metadata={"Software": None})
    return _small(data.getvalue())


def empty_figure() -> Any:
    """A figure to draw on. Raises :class:`MissingPackageError` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"a picture is drawn by matplotlib: {error.name} is not installed; next: {INSTALL}"
        ) from None
    figure = Figure(figsize=_INCHES, dpi=_DOTS, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _small(data: bytes) -> bytes:
    """The same picture with a palette of 256 colours, which a map needs no more of: a third of its size."""
    from PIL import Image

    small = BytesIO()
    Image.open(BytesIO(data)).convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT).save(
        small, "PNG", optimize=True
    )
    return small.getvalue()


def _title(found: Contents, entry: SiteMap) -> str:
    return f"{model_words(entry.model, entry.h_q)}, on {device_words(found.sku)}"


def _subtitle(found: Contents, entry: SiteMap, view: View) -> str:
    origin = found.policies[entry.policy]
    kind = f"modelled from {origin.modelled_from}" if origin.modelled_from else "GPU time"
    layer = "whole forward" if is_whole_forward(entry) else f"{entry.layer} layers"
    where = f"{site_words(entry.site)}, {layer}, {request_words(view.num_reqs)}"
    default = entry.candidates[entry.incumbent]
    return f"{where}; {kind}, {origin.provider}. {entry.engine_words}'s default: always {default}."


def _told(entry: SiteMap) -> str:
    """The verdict, short."""
    win, kind = entry.win, "modelled" if entry.views[0].cells else "measured"
    if not win.other_path:
        return f"The policy keeps the default at all {win.shapes} {kind} shapes."
    reqs = f"{entry.views[0].num_reqs[0]} to {entry.views[-1].num_reqs[1]} requests"
    slower = f"over 1 % slower at {win.slower}" if win.slower else "slower nowhere"
    return (
        f"The policy leaves it at {win.other_path} of {win.shapes} {kind} shapes of {reqs}: "
        f"{win.mean:.2f}x faster there (geometric mean; at best {win.best:.2f}x), {slower}."
    )


def _line(figure: Any, height: float, text: str, size: float, **style: Any) -> None:
    """A line of text from the left edge, smaller where it would pass the right one."""
    drawn = figure.text(0.02, height, text, fontsize=size, **style)
    room = 0.97 * _INCHES[0] * _DOTS - drawn.get_window_extent().x0
    drawn.set_fontsize(size * min(1.0, room / drawn.get_window_extent().width))


def _answers(axes: Any, entry: SiteMap, view: View) -> None:
    for region in view.regions:
        corners = [(max(qo, 0.5), kv) for qo, kv in region.corners]
        axes.fill(*zip(*corners, strict=True), color=look(entry.candidates[region.candidate]).light, alpha=0.16, lw=0)


def _brackets(axes: Any, entry: SiteMap, view: View) -> None:
    least, most = entry.num_qo_tokens
    for line in view.boundaries:
        if line.bracket:
            low, high = (
                [max(least, min(edges[side], most, kv)) for edges, kv in zip(line.bracket, line.kv_tokens, strict=True)]
                for side in (0, 1)
            )
            axes.fill_betweenx(line.kv_tokens, low, high, color="#000000", alpha=0.13, lw=0)
    for line in view.boundaries:
        axes.plot(_at_least(line), line.kv_tokens, color=_TEXT, lw=2.6, solid_capstyle="round", zorder=3)


def _at_least(line: Boundary) -> Sequence[float]:
    return [max(count, 0.5) for count in line.num_qo_tokens]


def _typed(axes: Any, view: View) -> None:
    uprights = 0
    for dashes, rule in zip(_DASHES, view.typed_rules, strict=False):
        if not rule.ends:
            continue
        (x0, y0), (x1, y1) = rule.ends
        axes.plot([x0, x1], [y0, y1], color=_QUIET, lw=1.6, ls=dashes, zorder=2)
        ground = {"facecolor": "white", "alpha": 0.65, "edgecolor": "none", "pad": 1.0}
        style = {"fontsize": 11, "color": _QUIET, "zorder": 3.5, "bbox": ground}
        if x0 == x1:
            top = uprights == 0
            uprights += 1
            y, side = (y1 / 1.3, "top") if top else (y0 * 1.3, "bottom")
            axes.text(x0 / 1.04, y, rule.label, rotation=90, ha="right", va=side, **style)
        else:  # along the line, just above it
            x, y = x0 * (x1 / x0) ** _ALONG, y0 * (y1 / y0) ** _ALONG
            axes.text(
                *(x, y, rule.label),
                **{**style, "bbox": None},
                rotation=degrees(atan2(y1, x1)),
                transform_rotates_text=True,
                rotation_mode="anchor",
                ha="center",
                va="bottom",
            )


def _signs(axes: Any, entry: SiteMap, view: View) -> None:
    """Draws points, or a modelled table's cells."""
    points = _points(entry, view)
    unsure = [cell for cell in view.cells if cell.undecided]
    _scatter(axes, unsure, s=26, marker="o", facecolors="none", edgecolors=_QUIET, linewidths=0.9)
    for index, name in enumerate(entry.candidates):
        shape = look(name)
        won = [point for point in points if point.fastest == index and not point.failures and None not in point.costs]
        vague = [point for point in won if point.ambiguous]
        _scatter(axes, vague, s=50, marker=shape.marker, facecolors="none", edgecolors=_QUIET, linewidths=1.3)
        for held_out, edge, width in ((False, "white", 0.6), (True, _TEXT, 1.9)):
            clear = [point for point in won if not point.ambiguous and point.held_out is held_out]
            sizes = [_size(point.gain) for point in clear]
            _scatter(axes, clear, s=sizes, marker=shape.marker, color=shape.light, edgecolors=edge, linewidths=width)
        cells = [cell for cell in view.cells if cell.fastest == index and not cell.undecided]
        _scatter(axes, cells, s=34, marker=shape.marker, color=shape.light, alpha=0.75, lw=0)
    failed = [point for point in points if point.failures]
    _scatter(axes, failed, s=40, marker="x", color=_TEXT, linewidths=1.3)


def _scatter(axes: Any, shapes: Sequence[MeasuredPoint | ModelledCell], **style: Any) -> None:
    shifts = [shape.shift if isinstance(shape, MeasuredPoint) else 0 for shape in shapes]
    queries = [shape.num_qo_tokens * _SIDE**shift for shape, shift in zip(shapes, shifts, strict=True)]
    axes.scatter(queries, [shape.kv_tokens for shape in shapes], zorder=4, **style)


def _points(entry: SiteMap, view: View) -> list[MeasuredPoint]:
    low, high = view.num_reqs
    return [point for point in entry.points if low <= point.num_reqs <= high]


def _legend(entry: SiteMap, view: View) -> list[Any]:
    """What everything on the map means, in words; only what is there."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    points = _points(entry, view)
    kind = "predicted" if view.cells else "measured"
    won = {point.fastest for point in points if not point.ambiguous} | {cell.fastest for cell in view.cells}
    signs: list[tuple[bool, str, dict[str, Any]]] = [
        (index in won, f"{name} {kind} faster", {"marker": look(name).marker, "color": look(name).light})
        for index, name in enumerate(entry.candidates)
    ]
    hollow = {"marker": "o", "color": _QUIET, "mfc": "none"}
    held_out = {"marker": "o", "color": "#b8bec6", "mec": _TEXT, "mew": 1.9}
    signs += [
        (any(point.held_out for point in points), "held out: the fit never saw it", held_out),
        (any(point.ambiguous for point in points), "cannot be told apart", hollow),
        (any(cell.undecided for cell in view.cells), "undecided: closer than the model is sure", hollow),
        (any(point.failures for point in points), "a path failed", {"marker": "x", "color": _TEXT}),
    ]
    handles: list[Any] = [
        Line2D([], [], ls="", markersize=8, label=words, **style) for there, words, style in signs if there
    ]
    names = dict.fromkeys(entry.candidates[region.candidate] for region in view.regions)
    handles += [Patch(color=look(name).light, alpha=0.3, lw=0, label=f"the policy takes {name}") for name in names]
    if view.boundaries:
        handles.append(Line2D([], [], color=_TEXT, lw=2.6, label="the policy's threshold"))
    if any(line.bracket for line in view.boundaries):
        handles.append(Patch(color="#000000", alpha=0.2, lw=0, label="bracket: the crossing lies inside"))
    return handles


def _size(gain: float | None) -> float:
    """Area of a sign: larger where the engine's default and its best alternative are farther apart."""
    return (6.5 + 2.6 * min(abs(log2(gain or 1.0)) * 1.6, 3.0)) ** 2


def _frame(axes: Any, entry: SiteMap, view: View) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    counts = [point.num_qo_tokens for point in entry.points if view.num_reqs[0] <= point.num_reqs <= view.num_reqs[1]]
    ends = entry.num_qo_tokens[0], max([entry.num_qo_tokens[1], *counts])
    for axis, (low, high) in (("x", ends), ("y", view.kv_tokens)):
        marks = [1 << octave for octave in range(0, 40, 2) if low / 1.2 <= 1 << octave <= high * 1.2]
        getattr(axes, f"set_{axis}lim")(low / 1.4, high * 1.4)
        getattr(axes, f"set_{axis}ticks")(marks, [tokens(mark) for mark in marks], fontsize=12)
    axes.minorticks_off()
    axes.grid(color="#e3e7eb", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("query tokens of the forward", fontsize=13, color=_TEXT)
    axes.set_ylabel("context tokens of the forward", fontsize=13, color=_TEXT)
    for spine in axes.spines.values():
        spine.set_color("#c3c9d0")
