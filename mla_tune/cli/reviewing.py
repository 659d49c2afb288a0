"""Commands for whoever reviews a policy: ``policy diff``, ``policy lint``, ``policy schema``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def schema(
    out: Annotated[Path | None, typer.Option("--out", help="File to write (default: standard output).")] = None,
) -> None:
    """Print the JSON Schema of a policy file, by which editors complete and check it."""
    from mla_tune.files import write_atomically
    from mla_tune.policy.file_schema import dump_json_schema

    data = dump_json_schema()
    if out is None:
        sys.stdout.write(data.decode())
    else:
        write_atomically(out, data)
        print(f"schema written to {out}")
