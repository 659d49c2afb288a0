"""How many query tokens a candidate can take: doubling, then bisection, each try in a fresh worker.

A failed launch may poison the context or end the process, so no try shares a process with another. The answer is a pair
of neighbours, one count that ran and was correct and the next that failed, both seen; or that nothing failed up to the
largest count asked for.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Self

from mla_tune.hardware.sku import Environment
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import MODELS, Site
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import CAPABILITY, Measurement, Outcome
from mla_tune.sweep.attempt import attempt
from mla_tune.sweep.grid import Point
from mla_tune.sweep.outcomes import is_spoiled
from mla_tune.sweep.runner import Sweep
from mla_tune.sweep.worker.messages import NOTHING_ADDED, Added, Task
from mla_tune.sweep.worker.process import WorkerProcess
from mla_tune.sweep.worker.same_gpu import require_unchanged

_CONTEXT = 8192
"""Context tokens of a try, where it has no more query tokens than that: limits are a matter of query tokens."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a search found."""

    site: Site
    candidate: str
    runs_at: int
    """Largest count seen to run and to be correct; 0 if none was."""
    fails_at: int | None
    """The count after it, which was seen to fail; None if nothing failed, or the search could not end."""
    reason: str
    """Why ``fails_at`` failed, or why the search ended without it; empty where it reached the largest count."""
    tries: tuple[Try, ...]
    """Each in a fresh worker, in the order made."""
    suspect: bool = False
    """Whether it was searched because a sweep saw it fail, around that shape; then nothing above it was tried."""

    @property
    def cleared(self) -> bool:
        """Whether what a sweep saw fail ran in a fresh process."""
        return self.suspect and bool(self.tries) and self.fails_at is None and not self.reason


Search = Generator[int, Outcome, tuple[int, int | None]]
"""Yields the count to try next, is sent its outcome, and returns the last that ran and the first that failed."""


def search(largest: int, runs: int = 0, fails: int | None = None) -> Search:
    """Look for the bound between ``runs`` (0: nothing ran yet) and ``fails`` (None: nothing failed yet).

    Both ends are tried again before they count: what is given is where to look, not evidence. Ends early, with None
    for the failure, at an outcome that is neither a success nor a capability failure.
    """
    tried: dict[int, bool] = {}
    count = max(1, min(runs, largest))
    while fails is None or fails - runs > 1 or not (tried.get(fails) is False and (runs == 0 or tried.get(runs))):
        if fails is not None:
            count = _between(runs, fails, tried)
        outcome = yield count
        if outcome is Outcome.OK:
            tried[count] = True
            runs = count
            if fails is not None and fails <= runs:  # the failure that was given does not happen here
                fails = None
        elif outcome in CAPABILITY:
            tried[count] = False
            fails = count
            runs = runs if runs < count and tried.get(runs, True) else 0
        else:
            return max((c for c, ran in tried.items() if ran), default=0), None
        if fails is None:
            if count >= largest:
                return count, None
            count = min(2 * count, largest)
    return runs, fails


def _between(runs: int, fails: int, tried: dict[int, bool]) -> int:
    """The next count to try: an end that was only given, first the failure, which may not occur again; else the middle."""
    if fails not in tried:
        return fails
    if runs and runs not in tried:
        return runs
    return (runs + fails) // 2


class Prober:
    """Searches bounds on one device. A context manager: its tries share what kernel libraries compile, and it is removed.

    So a first call is as slow as it can be at the first try of a shape bucket, and cheaper at the next ones.
    """

    def __init__(self, kind: str, timeout_s: float, added: Added = NOTHING_ADDED) -> None:
        """``timeout_s`` is for one try, compilation included.

        Raises :class:`EnvironmentMismatchError` if the device cannot be used.
        """
        self._kind, self._timeout_s, self._added = kind, timeout_s, added
        worker = WorkerProcess(kind, added.module)
        worker.stop()
        self._jit_cache = tempfile.TemporaryDirectory(prefix="mla-tune-probe-", ignore_cleanup_errors=True)
        self.environment: Environment = worker.hello.environment

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._jit_cache.cleanup()

    def bound(
        self,
        site: Site,
        candidate: str,
        largest: int,
        note: Callable[[Try], None],
        known: Iterable[tuple[int, bool]] = (),
        deadline: float = float("inf"),
        around: Shape | None = None,
    ) -> Bound:
        """Search up to ``largest`` query tokens, telling ``note`` of every try.

        ``known`` are counts that were seen to run or to fail: the search starts between them. At ``deadline``, by
        ``time.monotonic()``, it ends where it is. Tries have the requests and the context of ``around``, as far as their
        query tokens allow; without it one request of 8K of context.
        """
        runs, fails = _start(known)
        asked = search(min(largest, max_query_tokens(site)), runs, fails)
        tries: dict[int, Try] = {}
        try:
            count = next(asked)
            while time.monotonic() < deadline:
                tries[count] = self.attempt(site, candidate, count, around)
                note(tries[count])
                count = asked.send(tries[count].outcome)
            made = tuple(tries.values())
            ran = _largest_that_ran(tries)
            return Bound(site, candidate, ran, None, "the budget is used up", made, around is not None)
        except StopIteration as end:
            runs, fails = end.value
        reason = tries[fails].detail if fails is not None else next(reversed(tries.values())).detail
        return Bound(site, candidate, runs, fails, reason, tuple(tries.values()), around is not None)

    def support(self, sites: Iterable[Site]) -> dict[tuple[Site, str], str | None]:
        """See :meth:`mla_tune.sweep.runner.Sweep.ask_support`."""
        with Sweep(self._kind, self._timeout_s, self._added) as sweep:
            return sweep.ask_support(sites)

    def attempt(self, site: Site, candidate: str, num_qo_tokens: int, around: Shape | None = None) -> Try:
        """Run and compare ``candidate`` once, in a worker of its own; once more where something else spoiled it."""
        attempted = self._attempt(site, candidate, try_shape(num_qo_tokens, around))
        if is_spoiled(attempted.outcome, attempted.detail):
            return self._attempt(site, candidate, attempted.shape)
        return attempted

    def _attempt(self, site: Site, candidate: str, shape: Shape) -> Try:
        point = Point(site, shape)
        worker = WorkerProcess(self._kind, self._added.module, self._jit_cache.name)
        try:
            require_unchanged(self.environment, worker.hello.environment)
            result = attempt(worker, Task(point, (candidate,), timed=False), self._timeout_s)
        finally:
            worker.stop()
        if result.failure is not None:
            if result.running is None and result.failure.outcome is not Outcome.TIMEOUT:
                detail = f"building the inputs failed: {result.failure.detail}"
                return Try(site, candidate, point.shape, Outcome.DISTURBED, " ".join(detail.split()))
            return Try(site, candidate, point.shape, result.failure.outcome, " ".join(result.failure.detail.split()))
        row = result.rows[0]
        return Try(site, candidate, point.shape, row.outcome, row.detail, row.first_call_s)


Known = dict[tuple[Site, str], list[tuple[int, bool]]]
"""Counts of query tokens that each (site, candidate) was tried at, and whether it ran there."""


def known_counts(measurements: Iterable[Measurement], tries: Iterable[Try]) -> Known:
    """What a sweep and earlier probes have seen of each candidate. One that ever failed at a count fails there."""
    entries: list[Measurement | Try] = [*measurements, *tries]
    known: dict[tuple[Site, str], dict[int, bool]] = {}
    for entry in entries:
        if entry.outcome is Outcome.OK or entry.outcome in CAPABILITY:
            counts = known.setdefault((entry.site, entry.candidate), {})
            count = entry.shape.num_qo_tokens
            counts[count] = counts.get(count, True) and entry.outcome is Outcome.OK
    return {key: sorted(counts.items()) for key, counts in known.items()}


def try_shape(num_qo_tokens: int, around: Shape | None = None) -> Shape:
    """The shape of a try at so many query tokens, with the requests and the context of ``around`` as far as they go."""
    if around is None:
        return Shape(1, num_qo_tokens, max(num_qo_tokens, _CONTEXT))
    return Shape(min(around.num_reqs, num_qo_tokens), num_qo_tokens, max(num_qo_tokens, around.kv_tokens))


def max_query_tokens(site: Site) -> int:
    """Longest context of any model that has ``site``: one request cannot have more query tokens."""
    return max(
        model.max_context
        for model in MODELS.values()
        if site.layer in model.site_layers(site.name) and (site.h_q is None or site.h_q in model.heads)
    )


def _largest_that_ran(tries: dict[int, Try]) -> int:
    return max((count for count, entry in tries.items() if entry.outcome is Outcome.OK), default=0)


def _start(known: Iterable[tuple[int, bool]]) -> tuple[int, int | None]:
    """Where to look: the first count that failed, and the largest below it that ran."""
    counts = sorted(known)
    fails = next((count for count, ran in counts if not ran), None)
    return max((count for count, ran in counts if ran and (fails is None or count < fails)), default=0), fails
