"""What a decision does not do: touch a file, the environment or the device, read a value from a tensor, import a module.

Seen with Python's own tracers while the real, hooked method of the real class runs: audit events for files, imports and
sockets; every C function that is called; and torch's dispatcher, which sees every operation, views included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

import pytest

from tests.engines.sglang.conftest import batch, v4_backend
from tests.engines.sglang.test_dsa import dsa_backend

pytestmark = pytest.mark.usefixtures("serving")

_watched: list[list[str]] = []


def _audit(event: str, _: Any) -> None:
    if _watched and event.split(".")[0] in {"open", "import", "os", "socket", "subprocess", "ctypes", "mmap"}:
        _watched[0].append(f"audit {event}")


@pytest.fixture(scope="module", autouse=True)
def _hook() -> None:
    sys.addaudithook(_audit)  # for good: Python has no way to remove one


def seen_in(decide: Callable[[], object]) -> tuple[list[str], list[str]]:
    """Forbidden events of one call, and the names of all functions, Python's and C's, that it called."""
    from torch.utils._python_dispatch import TorchDispatchMode

    forbidden: list[str] = []
    called: list[str] = []

    class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            forbidden.append(f"torch operation {func}")
            return func(*args, **(kwargs or {}))

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            called.append(f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}")
        elif event == "c_call":
            owner = getattr(argument, "__self__", None)
            called.append(f"{type(owner).__module__}.{type(owner).__name__}.{argument.__name__}")

    with Operations():  # type: ignore[no-untyped-call]
        _watched.append(forbidden)
        sys.setprofile(profile)
        try:
            decide()
        finally:
            sys.setprofile(None)
            _watched.clear()
    called = [name for name in called if not name.endswith((".setprofile", ".list.clear"))]
    forbidden += [name for name in called if name.startswith(("torch", "os.")) or name.endswith(".item")]
    return forbidden, called


def test_the_tracers_see_what_they_are_there_for() -> None:
    import torch

    lengths = torch.tensor([1, 2])
    forbidden, _ = seen_in(lambda: lengths.sum().item())
    assert "torch operation aten.sum.default" in forbidden
    assert any(name.endswith(".item") for name in forbidden)
    assert "os.get" in " ".join(seen_in(lambda: __import__("os").getenv("HOME"))[0])
    forbidden, _ = seen_in(lambda: open(__file__, "rb").close())
    assert "audit open" in forbidden


@pytest.mark.parametrize("new", [64, 8192], ids=["with_kvcache", "sparse_fwd"])
def test_a_v4_decision_reads_host_integers_only(new: int, v4: ModuleType) -> None:
    backend = v4_backend(v4)
    backend._use_sparse_prefill(batch((1000, 64)), num_qo_tokens=64)  # what is imported late by others is there now
    forward = batch((100_000, new), (5, 7))
    for _ in ("the decision of a forward", "its answer in a further layer"):
        forbidden, called = seen_in(lambda: backend._use_sparse_prefill(forward, num_qo_tokens=new + 7))
        assert forbidden == []
        assert "mla_tune.integrations.sglang.v4_hooks.use_sparse" in called
    assert "mla_tune.runtime.decider.__call__" not in called  # decided once


def test_a_dsa_decision_adds_host_integers_only(dsa: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD", "2048")
    backend = dsa_backend(dsa)
    forward = batch((100_000, 64))
    backend.set_dsa_prefill_impl(forward)
    forbidden, called = seen_in(lambda: backend._mla_tune.impl(backend, forward))
    assert forbidden == []
    assert "mla_tune.runtime.decider.__call__" in called
