"""Ranks that share a forward compare what decides, once, before they serve.

One that takes another kernel path computes with other rounding, and one that waits in another collective hangs them all.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any, TypeVar

from mla_tune.errors import EnvironmentMismatchError
from mla_tune.runtime.dispatcher import Dispatcher
from mla_tune.runtime.switches import RANKS_VARIABLE, RankMismatch

_Value = TypeVar("_Value")
PATIENCE_S = 120.0
"""How long a rank waits for the others to come here; they load the same model, which takes them about as long."""


def agree(dispatcher: Dispatcher, *, group: Any = None, engine: str = "") -> Dispatcher:
    """``dispatcher``, if all ranks decide by the same policy and mode; a collective call of every rank of ``group``.

    ``group`` is a process group of ``torch.distributed`` (preferably one on the CPU), None for the default one; ``engine``
    is whatever else decides in this process, such as the user's settings for the engine, and is compared too. Where
    torch is not loaded or no group is initialised, this process is alone and agrees with itself; torch is never
    imported.

    If they differ, every rank raises :class:`EnvironmentMismatchError`, or, with ``MLA_TUNE_RANKS=incumbent`` on any of
    them, gets a dispatcher that answers the incumbent. A rank that never comes is an error that names it, where the
    group's backend can tell (gloo), and otherwise the group's own timeout.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return dispatcher
    decides_by = f"{dispatcher.decides_by}, {engine}" if engine else dispatcher.decides_by
    ours = (decides_by, dispatcher.source, dispatcher.switches.on_rank_mismatch.value)
    theirs = _gather(distributed, ours, group)
    if len({decides_by for decides_by, _, _ in theirs}) == 1:
        return dispatcher
    reason = _difference(theirs)
    if RankMismatch.INCUMBENT.value not in {setting for _, _, setting in theirs}:
        raise EnvironmentMismatchError(
            f"{reason}; give all ranks the same file and MLA_TUNE_* settings, or set {RANKS_VARIABLE}="
            f"{RankMismatch.INCUMBENT} to serve without a policy"
        )
    return Dispatcher(None, source=reason, fallback="incumbent", switches=dispatcher.switches)


def gather(value: _Value, *, group: Any = None) -> list[_Value]:
    """Every rank's ``value``, by rank; a collective call of every rank of ``group``, as :func:`agree` is."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return [value]
    return _gather(distributed, value, group)


def _gather(distributed: Any, ours: _Value, group: Any) -> list[_Value]:
    if distributed.get_backend(group) == "gloo":
        try:
            distributed.monitored_barrier(group, timeout=timedelta(seconds=PATIENCE_S), wait_all_ranks=True)
        except RuntimeError as error:
            raise EnvironmentMismatchError(
                f"every rank must compare its policy within {PATIENCE_S:g} s: {str(error).splitlines()[0]}; "
                "install the same mla-tune on all of them"
            ) from None
    theirs: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(theirs, ours, group)
    return theirs


def _difference(theirs: list[tuple[str, str, str]]) -> str:
    ranks: dict[str, list[str]] = {}
    for rank, (decides_by, source, _) in enumerate(theirs):
        ranks.setdefault(f"{decides_by} ({source})", []).append(str(rank))
    parts = (f"{what} on rank {', '.join(which)}" for what, which in ranks.items())
    return f"all ranks must decide alike: got {'; '.join(parts)}"
