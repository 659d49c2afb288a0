"""The places in an engine where a plugin takes hold, checked before anything is changed.

A seam is a method with the parameters that the plugin was written for. An engine version in which it has moved keeps its
own choice, with one warning; nothing is patched by guess.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import FunctionType, ModuleType
from typing import Any

import msgspec

_log = logging.getLogger("mla_tune")


class Seam(msgspec.Struct, frozen=True):
    """One function of an engine module."""

    path: str
    """Attribute path inside the module: ``Class.method`` or ``function``."""
    parameters: tuple[str, ...]
    """The names it must start with."""


@dataclass(slots=True)
class Hooks:
    """What one plugin has taken hold of in this process."""

    engine: str
    """The engine's distribution name."""
    tested: tuple[str, ...]
    """Versions that the plugin was tested with."""
    taken: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """Our function by ``module:path``."""
    moved: dict[str, str] = field(default_factory=dict)
    """Why a seam was left alone, by ``module:path``."""

    def take(self, module: ModuleType, wrappers: dict[Seam, Callable[[Any], Callable[..., Any]]]) -> bool:
        """Replace each seam by ``wrapper(original)``, all of them or none; False, with one warning, if one has moved."""
        originals = {seam: _original(module, seam) for seam in wrappers}
        problems = [problem for problem in originals.values() if isinstance(problem, str)]
        if problems:
            for seam in wrappers:
                self.moved[f"{module.__name__}:{seam.path}"] = problems[0]
            _log.warning(
                "mla-tune leaves %s on its own choice: %s; this is %s %s, tested with %s",
                *(module.__name__, problems[0], self.engine, installed_version(self.engine), ", ".join(self.tested)),
            )
            return False
        for seam, wrapper in wrappers.items():
            ours = wrapper(originals[seam])
            ours.__wrapped__ = originals[seam]  # type: ignore[attr-defined]  # what tools follow to the original
            owner, name = _owner(module, seam.path)
            setattr(owner, name, ours)
            self.taken[f"{module.__name__}:{seam.path}"] = ours
        return True

    def in_force(self, key: str, found: Any) -> bool:
        """Whether ``found``, what the engine would call, still leads to our function of ``key``."""
        ours = self.taken.get(key)
        while found is not None and found is not ours:
            found = getattr(found, "__wrapped__", None)
        return ours is not None and found is ours


def installed_version(distribution: str) -> str:
    """The version of an installed distribution, or ``of unknown version``."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


def _owner(module: ModuleType, path: str) -> tuple[Any, str]:
    *parents, name = path.split(".")
    owner: Any = module
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def _original(module: ModuleType, seam: Seam) -> FunctionType | str:
    """The function of a seam, or why it is not what was expected."""
    try:
        owner, name = _owner(module, seam.path)
        found = vars(owner)[name]
    except (AttributeError, KeyError):
        return f"it has no {seam.path}"
    plain = inspect.unwrap(found) if callable(found) else found
    if not isinstance(plain, FunctionType) or not isinstance(found, FunctionType):
        return f"its {seam.path} is no plain function"
    names = tuple(inspect.signature(plain).parameters)
    if names[: len(seam.parameters)] != seam.parameters:
        return f"its {seam.path} takes ({', '.join(names)}), not ({', '.join(seam.parameters)}, ...)"
    return found
