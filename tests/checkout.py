"""A copy of the checkout, for tests that build a wheel: pip builds inside the tree, where two builds disturb each other."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc")


def copy_checkout(to: Path) -> None:
    """Copy all that packaging reads into the existing folder ``to``."""
    for name in ("mla_tune", "policies", "scripts"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=_IGNORED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, to)
