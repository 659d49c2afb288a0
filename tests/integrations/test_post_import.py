"""Patching a module of an engine when it is imported, by real imports of real files."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mla_tune.integrations.post_import import after_import, forget

from mla_tune.integrations import post_import
from mla_tune.integrations.seams import Hooks, Seam


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a package that nobody has imported."""
    (tmp_path / "an_engine").mkdir()
    (tmp_path / "an_engine" / "__init__.py").write_text("")
    (tmp_path / "an_engine" / "backend.py").write_text(
        "class Backend:\n    def choose(self, batch, *, rows):\n        return 'theirs'\n    made = staticmethod(len)\n"
    )
    (tmp_path / "an_engine" / "broken.py").write_text("raise ImportError('no GPU')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("an_engine", "an_engine.backend", "an_engine.broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        forget(name)
    return "an_engine"


def test_a_patch_runs_when_the_module_is_imported_and_not_before(engine: str) -> None:
    seen: list[str] = []
    after_import(f"{engine}.backend", lambda module: seen.append(module.Backend.__name__))
    importlib.import_module(engine)
    assert seen == []
    importlib.import_module(f"{engine}.backend")
    assert seen == ["Backend"]
    importlib.reload(sys.modules[f"{engine}.backend"])
    assert seen == ["Backend"]


def test_a_module_that_is_there_already_is_patched_at_once(engine: str) -> None:
    importlib.import_module(f"{engine}.backend")
    seen: list[ModuleType] = []
    after_import(f"{engine}.backend", seen.append)
    assert seen == [sys.modules[f"{engine}.backend"]]


def test_once_nothing_is_waited_for_the_import_system_is_as_it_was(engine: str) -> None:
    before = list(sys.meta_path)
    for _ in range(2):
        after_import(f"{engine}.backend", lambda module: None)
    assert len(sys.meta_path) == len(before) + (post_import._FINDER not in before)
    importlib.import_module(f"{engine}.backend")
    assert post_import._FINDER not in sys.meta_path


def test_a_patch_that_fails_is_logged_and_the_import_succeeds(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    after_import(f"{engine}.backend", lambda module: 1 / 0)  # type: ignore[arg-type]
    after_import(f"{engine}.backend", lambda module: setattr(module, "second", True))
    assert importlib.import_module(f"{engine}.backend").second is True
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "could not hook an_engine.backend" in caplog.text


def test_an_import_that_fails_fails_as_before_and_can_be_tried_again(engine: str) -> None:
    seen: list[ModuleType] = []
    after_import(f"{engine}.broken", seen.append)
    for _ in range(2):
        with pytest.raises(ImportError, match="no GPU"):
            importlib.import_module(f"{engine}.broken")
    assert seen == []
    forget(f"{engine}.broken")


def _wrappers(*seams: Seam) -> dict[Seam, Callable[[Any], Callable[..., Any]]]:
    """Something else in the place of each."""

    def ours(original: Any) -> Callable[..., Any]:
        return lambda self, batch, *, rows: "ours"

    return dict.fromkeys(seams, ours)


@pytest.mark.parametrize(
    ("seam", "reason"),
    [
        (Seam("Backend.choose", ("self", "batch", "rows")), None),
        (Seam("Backend.decide", ("self",)), "it has no Backend.decide"),
        (Seam("Other.choose", ("self",)), "it has no Other.choose"),
        (Seam("Backend.choose", ("self", "forward_batch")), "its Backend.choose takes (self, batch, rows)"),
        (Seam("Backend.made", ("self",)), "its Backend.made is no plain function"),
    ],
)
def test_all_seams_of_a_module_are_taken_or_none(
    seam: Seam, reason: str | None, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = importlib.import_module(f"{engine}.backend")
    theirs = module.Backend.choose
    hooks = Hooks("an-engine", ("1.0",))
    also = Seam("Backend.choose", ("self",))
    took = hooks.take(module, _wrappers(seam, also))
    assert took is (reason is None)
    assert (module.Backend().choose(None, rows=1) == "ours") is took
    if reason is not None:
        assert module.Backend.choose is theirs
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert reason in caplog.text
        assert "this is an-engine of unknown version, tested with 1.0" in caplog.text
        assert reason in next(iter(hooks.moved.values()))


def test_a_hook_is_in_force_also_under_another_plugin_s_wrapper(engine: str) -> None:
    import functools

    module = importlib.import_module(f"{engine}.backend")
    hooks = Hooks("an-engine", ("1.0",))
    seam = Seam("Backend.choose", ("self", "batch", "rows"))
    hooks.take(module, _wrappers(seam, seam))
    key = f"{engine}.backend:Backend.choose"
    ours = module.Backend.choose
    assert hooks.in_force(key, ours)
    assert hooks.in_force(key, functools.wraps(ours)(lambda *arguments, **named: ours(*arguments, **named)))
    assert not hooks.in_force(key, lambda self, batch: None)
    assert not hooks.in_force("somewhere:else", ours)
