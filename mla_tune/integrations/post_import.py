"""Run a function right after a module of an engine has been imported, by whoever imports it.

Most processes of an engine (tokenizer, API server, launcher) never load an attention backend. A plugin that imported it
to patch it would cost each of them seconds; one that waits for the import costs them nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Patch = Callable[[ModuleType], None]

_log = logging.getLogger("mla_tune")


def after_import(module: str, patch: Patch) -> None:
    """Call ``patch(module)`` once the module of that name has been executed; at once if it was already.

    An exception of ``patch`` is logged and goes no further: an engine that cannot be patched still has to start.
    """
    loaded = sys.modules.get(module)
    if loaded is not None and not getattr(getattr(loaded, "__spec__", None), "_initializing", False):
        _run(patch, loaded)
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.waiting.setdefault(module, []).append(patch)


def forget(module: str) -> None:
    """Drop what waits for ``module``; where nothing waits any more the import system is as it was."""
    _FINDER.waiting.pop(module, None)
    if not _FINDER.waiting and _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)


class _Finder(MetaPathFinder):
    """Finds nothing itself: lets the finders behind it find a module that is waited for, and extends its loader."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Patch]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        spec = self._others(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            try:
                execute(module)
            finally:  # a second import, after a failure, starts over
                loader.exec_module = execute
            patches = self.waiting.get(fullname, [])
            forget(fullname)
            for patch in patches:
                _run(patch, module)

        try:
            loader.exec_module = execute_and_patch
        except (AttributeError, TypeError) as error:
            _log.warning("mla-tune cannot follow the import of %s, which stays as it is: %s", fullname, error)
        return spec

    def _others(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec: ModuleSpec | None = find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


_FINDER = _Finder()


def _run(patch: Patch, module: ModuleType) -> None:
    try:
        patch(module)
    # Whatever it is, it is the plugin's fault and must not become the engine's.
    except Exception:
        _log.exception("mla-tune could not hook %s, which stays as it is", module.__name__)
