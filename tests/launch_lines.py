"""How the documents and examples start a server: the arguments that the engine is given."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from tests.checkout import ROOT
from tests.fenced_lines import fenced

_STAND_IN = """#!/bin/sh
printf '%s\\n' "$@"
"""


def readme_lines(start: str) -> list[list[str]]:
    """The arguments of each line of README that begins with the words ``start``."""
    lines = fenced((ROOT / "README.md").read_text(), "", "bash")
    return [shlex.split(line.removeprefix(start)) for line in lines if line.startswith(f"{start} ")]


def example_arguments(folder: Path, script: str, program: str, *arguments: str) -> list[str]:
    """What an example script hands to ``program``, which is not started."""
    (folder / program).write_text(_STAND_IN)
    (folder / program).chmod(0o755)
    environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = [str(ROOT / "scripts" / "examples" / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
