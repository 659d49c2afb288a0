"""Builds of kernel libraries: the distribution that brought a module, and its exact release, as ``sgl-flash-mla==1.0.0``.

A threshold and a limit belong to the builds that were timed. This module names and compares them; it never looks at the
machine. Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FLASH_MLA = "flash_mla"
DEEP_GEMM = "deep_gemm"
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    FLASH_MLA: ("sgl-flash-mla", "flash-mla"),
    DEEP_GEMM: ("sgl-deep-gemm", "deep-gemm"),
}
"""Kernel modules, and the distributions that may have brought each of them, the module's own project last."""
UNKNOWN = "unknown"
"""The version of a library without metadata (a source tree on the path). It equals no version, not even itself."""

_TEXT = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)==([A-Za-z0-9][A-Za-z0-9.+!_-]*)")


@dataclass(frozen=True, slots=True, order=True)
class Build:
    """One release of one distribution."""

    name: str
    """The distribution's name as PyPI normalizes it."""
    version: str

    @classmethod
    def parse(cls, text: str) -> Build:
        """Read ``name==version``. Raises ``ValueError`` on anything else."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ValueError(f"not a build: {text!r}")
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"
