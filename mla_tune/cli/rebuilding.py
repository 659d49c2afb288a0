"""Making a committed policy again from its measurements, to see that it is what its command makes."""

from __future__ import annotations

import difflib
import io
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from itertools import takewhile
from pathlib import Path

from mla_tune.errors import PolicyError
from mla_tune.policy.codec import parse_policy, read_policy_file
from mla_tune.policy.evidence import evidence_path

_WHOLE_DIFFERENCE = 2000
"""Lines up to which all differences of a file are named; of a longer one the first."""


def differences(path: Path) -> list[str]:
    """Run the command that the policy at ``path`` names, from this folder, and compare the policy and its evidence.

    Gives a line for each that differs, none where both are the same bytes. Raises :class:`PolicyError` where the command
    fails.
    """
    words = shlex.split(parse_policy(read_policy_file(path), str(path)).source.command)
    if words[:1] != ["mla-tune"] or words[1:2] not in (["fit"], ["model"]):
        raise PolicyError(f"{path}: source.command must be a fit or a model of mla-tune: got {words[:2]}")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        _run([*words[1:], "--out", str(made)], path)
        files = ((path, made), (evidence_path(path), evidence_path(made)))
        return [line for committed, again in files for line in _compared(committed, again)]


def _run(words: list[str], path: Path) -> None:
    from mla_tune.cli import run

    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        code = run(words)
    if code:
        reason = " ".join(said.getvalue().split())
        raise PolicyError(f"{path}: its command must run here, where its measurements are: {reason}")


def _compared(committed: Path, again: Path) -> Iterator[str]:
    """Lines that differ: ``file:line: - committed``, ``file:line: + made``."""
    before, after = (file.read_text().splitlines() if file.is_file() else [] for file in (committed, again))
    if before == after:
        return
    if max(len(before), len(after)) > _WHOLE_DIFFERENCE:  # comparing all of them is quadratic
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
        yield f"{committed.name}:{same + 1}: the first line that differs"
        return
    number = 0
    for line in difflib.ndiff(before, after):
        number += line[0] in " -"
        if line[0] in "+-":
            yield f"{committed.name}:{number}: {line[0]} {line[2:].strip()}"
