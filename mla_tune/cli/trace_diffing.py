"""The command ``trace-diff``: two traces of torch.profiler compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mla_tune.cli.options import JsonOption
from mla_tune.errors import UsageError

_SIDE = (
    "a trace (.json or .json.gz), a folder with one trace a rank, a pattern in quotes, or several with commas between."
)


def trace_diff(
    a: Annotated[str, typer.Argument(metavar="A", help=f"The run before: {_SIDE}")],
    b: Annotated[str, typer.Argument(metavar="B", help="The run after, in the same form.")],
    top: Annotated[
        int, typer.Option("--top", metavar="COUNT", help="Names shown of each list on the terminal; 0 shows all.")
    ] = 20,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with every name to this file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two traces of torch.profiler: what ran on the GPU, how often and how long.

    Example: mla-tune trace-diff before.json.gz after.json.gz --html diff.html
    """
    if top < 0:
        raise UsageError(f"--top must be a number of names, 0 for all: got {top}; accepted: for example 20")
    from mla_tune.cli.output import trace_output
    from mla_tune.files import write_atomically
    from mla_tune.trace.diff_page import diff_page
    from mla_tune.trace.difference import compare_traces
    from mla_tune.trace.side import trace_files

    paths = trace_files(a), trace_files(b)
    with trace_output.reading(paths[0] + paths[1]):
        found = compare_traces(*paths)
    if as_json:
        trace_output.diff_json(found)
    else:
        trace_output.diff(found, top)
    if html is not None:
        write_atomically(html, diff_page(found).encode())
        trace_output.written(html)
