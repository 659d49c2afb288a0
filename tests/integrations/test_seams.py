"""Patching a module of an engine when it is imported, by real imports of real files."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mla_tune.integrations import seams
from mla_tune.integrations.seams import Hook, Hooks, Seam, Wrapper, after_import


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
    monkeypatch.setattr(seams, "installed_version", lambda _: "1.0+cu130")
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


def test_a_patch_that_fails_is_logged_and_the_import_succeeds(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    after_import(f"{engine}.backend", lambda module: 1 / 0)
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


HOOK = Hook("the choice", ("1.0", "1.1"))
CHOOSE = Seam("Backend.choose", ("self", "batch", "rows"))


def ours(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> str:
    """A wrapper that says so, and passes on everything."""
    return f"ours over {wrapped(*args, **kwargs)}"


@pytest.mark.parametrize(
    ("seam", "reason"),
    [
        (CHOOSE, None),
        (Seam("Backend.decide", ("self",)), "it has no Backend.decide"),
        (Seam("Other.choose", ("self",)), "it has no Other.choose"),
        (Seam("Backend.choose", ("self", "forward_batch")), "its Backend.choose takes (self, batch, rows)"),
        (Seam("Backend.made", ("self",)), "its Backend.made is no plain function"),
    ],
)
def test_all_seams_of_a_hook_are_taken_or_none(
    seam: Seam, reason: str | None, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = importlib.import_module(f"{engine}.backend")
    theirs = module.Backend.choose
    hooks = Hooks("an-engine")
    wrappers: dict[Seam, Wrapper] = {seam: ours, Seam("Backend.choose", ("self",)): ours}
    took = hooks.take(module, HOOK, wrappers)
    assert took is (reason is None)
    assert module.Backend().choose(None, rows=1) == ("ours over theirs" if took else "theirs")
    if reason is not None:
        assert module.Backend.choose is theirs
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert reason in caplog.text
        assert "this is an-engine 1.0, tested with 1.0, 1.1" in caplog.text
        assert reason in hooks.left["the choice"]


def test_another_release_keeps_its_own_choices_with_one_warning(
    engine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(seams, "installed_version", lambda _: "1.2")
    module = importlib.import_module(f"{engine}.backend")
    hooks = Hooks("an-engine")
    for choice in ("the choice", "another choice"):
        assert not hooks.take(module, Hook(choice, HOOK.releases), {CHOOSE: ours})
    assert module.Backend().choose(None, rows=1) == "theirs"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "an-engine 1.2 is not a release that it is made for" in warning


def test_a_parameter_that_the_engine_appends_reaches_the_engine_s_function(engine: str) -> None:
    module = importlib.import_module(f"{engine}.backend")
    module.Backend.choose = lambda self, batch, rows, appended=0: f"theirs with {appended}"
    Hooks("an-engine").take(module, HOOK, {CHOOSE: ours})
    assert module.Backend().choose(None, rows=1, appended=7) == "ours over theirs with 7"
    assert module.Backend().choose(None, 1, 8) == "ours over theirs with 8"


def test_a_plugin_that_is_loaded_twice_wraps_once(engine: str) -> None:
    module = importlib.import_module(f"{engine}.backend")
    hooks = Hooks("an-engine")
    for _ in range(2):
        assert hooks.take(module, HOOK, {CHOOSE: ours})
    assert module.Backend().choose(None, rows=1) == "ours over theirs"


def test_a_hook_is_in_force_also_under_another_plugin_s_wrapper(engine: str) -> None:
    import functools

    module = importlib.import_module(f"{engine}.backend")
    hooks = Hooks("an-engine")
    hooks.take(module, HOOK, {CHOOSE: ours})
    key = f"{engine}.backend:Backend.choose"

    def in_force(key: str = key) -> bool:
        return hooks.in_force(key, module.Backend, "choose")

    assert in_force()
    assert not in_force("somewhere:else")
    mine = module.Backend.choose
    module.Backend.choose = functools.wraps(mine)(lambda *arguments, **named: mine(*arguments, **named))
    assert in_force()
    module.Backend.choose = lambda self, batch: None
    assert not in_force()
