"""The places in an engine where a plugin takes hold, checked before anything is changed.

A hook is one choice of an engine, in the releases whose code was read and run with it. Its seams are the functions that it
wraps, with the parameters it was written for. Any other release, or one in which a seam has moved, keeps the engine's own
choice, with one warning; nothing is patched by guess. Wrappers are wrapt's: they pass on what they do not know, so that a
parameter that an engine appends reaches the engine's own function.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import FunctionType, ModuleType
from typing import Any

import msgspec
import wrapt

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""``wrapper(wrapped, instance, args, kwargs)``: ``wrapped`` is bound to ``instance``, and ``args`` does not hold it."""

_log = logging.getLogger("mla_tune")


class Seam(msgspec.Struct, frozen=True):
    """One function of an engine module."""

    path: str
    """Attribute path inside the module: ``Class.method`` or ``function``."""
    parameters: tuple[str, ...]
    """The names it must start with."""

    @property
    def name(self) -> str:
        """The function's own name."""
        return self.path.rpartition(".")[2]


class Hook(msgspec.Struct, frozen=True):
    """One choice of an engine that the plugin may make."""

    choice: str
    """What is chosen, for the log."""
    releases: tuple[str, ...]
    """The engine's releases in which its seams are there with the same meaning. Each was run: tests/engines."""
    uses: tuple[str, ...] = ()
    """What else the module must have: attribute paths."""


@dataclass(slots=True)
class Hooks:
    """What one plugin has taken hold of in this process."""

    engine: str
    """The engine's distribution name."""
    taken: dict[str, Any] = field(default_factory=dict)
    """Our function by ``module:path``."""
    left: dict[str, str] = field(default_factory=dict)
    """Why a hook was left to the engine, by its choice."""

    def take(self, module: ModuleType, hook: Hook, wrappers: Mapping[Seam, Wrapper]) -> bool:
        """Wrap each seam, all of them or none; False, with one warning, where the engine keeps its own choice.

        A seam that is ours already stays as it is, so that a plugin that is loaded twice counts once.
        """
        release = installed_version(self.engine).partition("+")[0]
        why = None
        if release not in hook.releases:
            why = f"{self.engine} {release} is not a release that it is made for"
        else:
            problems = [problem for seam in wrappers if (problem := _problem(module, seam)) is not None]
            problems += [f"it has no {path}" for path in hook.uses if _found(module, path) is None]
            why = next(iter(problems), None)
        if why is not None:
            self._leave(module, hook, why, release)
            return False
        for seam, wrapper in wrappers.items():
            key = f"{module.__name__}:{seam.path}"
            owner, name = _owner(module, seam.path)
            if self.in_force(key, owner, name):
                continue
            ours = wrapt.FunctionWrapper(vars(owner)[name], wrapper)
            setattr(owner, name, ours)
            self.taken[key] = ours
        return True

    def in_force(self, key: str, owner: Any, name: str) -> bool:
        """Whether what the engine would call, ``name`` of ``owner``, still leads to our function of ``key``."""
        ours, found = self.taken.get(key), inspect.getattr_static(owner, name, None)
        while found is not None and ours not in (found, getattr(found, "_self_parent", None)):
            found = getattr(found, "__wrapped__", None)  # other plugins' wrappers name what they wrap
        return ours is not None and found is not None

    def _leave(self, module: ModuleType, hook: Hook, why: str, release: str) -> None:
        said = why in self.left.values()  # one warning for an unknown release, however many hooks it has
        self.left[hook.choice] = why
        _log.log(
            logging.INFO if said else logging.WARNING,
            "mla-tune leaves %s to %s: %s; this is %s %s, tested with %s",
            *(hook.choice, module.__name__, why, self.engine, release, ", ".join(hook.releases)),
        )


def installed_version(distribution: str) -> str:
    """The version of an installed distribution, or ``of unknown version``."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str) -> Any:
    """An argument of a wrapped call, by place or by name; None where the caller left it to its default."""
    return args[index] if index < len(args) else kwargs.get(name)


def lost(instance: object, seam: Seam) -> str:
    """What to say of a seam that is ours no more."""
    return f"{type(instance).__name__}.{seam.name} is somebody else's, who does not call ours"


def _owner(module: ModuleType, path: str) -> tuple[Any, str]:
    *parents, name = path.split(".")
    owner: Any = module
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def _found(module: ModuleType, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _problem(module: ModuleType, seam: Seam) -> str | None:
    """Why a seam is not the function that was expected; None if it is."""
    try:
        owner, name = _owner(module, seam.path)
        found = vars(owner)[name]
    except (AttributeError, KeyError):
        return f"it has no {seam.path}"
    plain = inspect.unwrap(found) if callable(found) else found
    if not isinstance(plain, FunctionType) or isinstance(found, (staticmethod, classmethod)):
        return f"its {seam.path} is no plain function"
    names = tuple(inspect.signature(plain).parameters)
    if names[: len(seam.parameters)] != seam.parameters:
        return f"its {seam.path} takes ({', '.join(names)}), not ({', '.join(seam.parameters)}, ...)"
    return None


def after_import(module: str, patch: Callable[[ModuleType], object]) -> None:
    """Call ``patch(module)`` once the module of that name has been imported, by whoever imports it; at once if it was.

    Most processes of an engine never load an attention backend: one that waits for the import costs them nothing. An
    exception of ``patch`` is logged and goes no further: an engine that cannot be patched still has to start.
    """

    def guarded(loaded: ModuleType) -> None:
        try:
            patch(loaded)
        # Whatever it is, it is the plugin's fault and must not become the engine's.
        except Exception:
            _log.exception("mla-tune could not hook %s, which stays as it is", module)

    wrapt.register_post_import_hook(guarded, module)
