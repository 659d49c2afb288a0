"""Builds of kernel libraries: the distribution that brought a module, and its exact release, as ``sgl-flash-mla==1.0.0``.

A threshold and a limit belong to the builds that were timed: this module names them, and says which are installed. It reads
metadata and files, and imports no library. Standard library only.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distributions
from importlib.util import find_spec
from pathlib import Path

FLASH_MLA = "flash_mla"
SGL_KERNEL = "sgl_kernel"
"""SGLang's own kernels. Up to SGLang 0.5.22 they have a build of FlashMLA in them, and SGLang calls no other."""
DEEP_GEMM = "deep_gemm"
VLLM = "vllm"
"""vLLM's wheel has builds of its own of both libraries; its FlashMLA is ``vllm/_flashmla_C.abi3.so``."""
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    FLASH_MLA: ("sglang-kernel", "sgl-flash-mla", "flash-mla"),
    DEEP_GEMM: ("sgl-deep-gemm", "deep-gemm"),
    VLLM: ("vllm",),
}
"""Kernel libraries, and the distributions that may have brought each of them, the library's own project last."""
_PACKAGES = {"sglang-kernel": SGL_KERNEL}
"""The package of a distribution that has another library in it; of any other it has the library's name."""
UNKNOWN = "unknown"
"""The version of a library whose metadata do not state one. It equals no version, not even itself."""

_TEXT = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)==([A-Za-z0-9][A-Za-z0-9.+!_-]*)")
_REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+")


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


def module_of(distribution: str) -> str | None:
    """The kernel library that ``distribution`` brings; None for one that is none, such as an engine."""
    return next((module for module, names in DISTRIBUTIONS.items() if distribution in names), None)


def package_of(distribution: str) -> str | None:
    """The package that has the kernels of ``distribution``; None for one that is no kernel library."""
    return _PACKAGES.get(distribution) or module_of(distribution)


def distributions_of(package: str) -> tuple[str, ...]:
    """The distributions of kernel libraries that may have brought ``package``."""
    return tuple(name for names in DISTRIBUTIONS.values() for name in names if package_of(name) == package)


def flash_mla_package(engine: str = "sglang") -> str:
    """The package whose FlashMLA runs here: what the installed ``engine`` calls, or the one that is there."""
    asked = {requires(engine, name) for name in distributions_of(FLASH_MLA)}
    if True in asked:
        return FLASH_MLA
    inside = module_folder(SGL_KERNEL)
    if inside is None or not (inside / "flash_mla.py").is_file():
        return FLASH_MLA
    return SGL_KERNEL if None not in asked or module_folder(FLASH_MLA) is None else FLASH_MLA


def module_folder(module: str) -> Path | None:
    """Where a top-level package lies, without importing it; None if there is no such package.

    A folder without ``__init__.py``, as an uninstall leaves it where something was cached, is none. Nor is one inside a
    zip, from which no kernel can be loaded.
    """
    spec = find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec and spec.origin else []
    folder = Path(folders[0]) if folders else None
    return folder if folder is not None and folder.is_dir() else None


def installed_version(distribution: str) -> str | None:
    """The installed release; None where there is none, and :data:`UNKNOWN` where its metadata state none or several.

    Metadata beside the package that the distribution brings are its own; of an editable install they lie elsewhere. An
    upgrade that broke off leaves metadata behind, empty or of another release.
    """
    found = list(distributions(name=distribution))
    if not found:
        return None
    package = package_of(distribution)
    where = None if package is None else module_folder(package)
    folder = _folder(found[0]) if where is None else where.parent
    beside = [one for one in found if _folder(one) == folder]
    stated = {_stated(one) for one in beside or found[:1]} - {""}
    return stated.pop() if len(stated) == 1 else UNKNOWN


def requires(distribution: str, other: str) -> bool | None:
    """Whether an installed ``distribution`` requires ``other``; None where its metadata don't say."""
    found = next(iter(distributions(name=distribution)), None)
    stated = None
    if found is not None:
        with suppress(OSError, KeyError, TypeError):
            stated = found.requires
    if stated is None:
        return None
    names = (_REQUIREMENT.match(requirement) for requirement in stated)
    return other in {re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name}


def _folder(installed: Distribution) -> Path:
    return Path(str(installed.locate_file("")))


def _stated(installed: Distribution) -> str:
    """Empty where the metadata cannot be read: Python's own answer is then None or an exception, by its version."""
    with suppress(KeyError, TypeError, OSError, PackageNotFoundError):
        return str(installed.metadata["Version"] or "")
    return ""
