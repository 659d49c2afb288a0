"""The search for one kernel's launch parameters: Optuna's study, asked and told, kept in the measurement database.

A study belongs to an environment, a kernel, a size class and a space of values; it is found again by its name, so that a
search goes on where it was stopped. Its objective is the kernel's time over the default's, both timed in turn: runs on
different days then agree. Optuna's own tables lie beside ours in one SQLite file. Both sides commit at once and hold no
transaction across the other's, and there is one sweep or tuning at a time on a file (:mod:`mla_tune.store.lock`).
"""

from __future__ import annotations

import hashlib
import random
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import QueuePool

from mla_tune.errors import StoreError
from mla_tune.sites.launch_parameters import KernelLaunch
from mla_tune.store.sqlite_file import connect, one_line_errors
from mla_tune.sweep.tuning.space import default_values, launch_at, space_of

_BUSY_TIMEOUT_S = 30.0
CLEARLY_WORSE = 1.25
"""A configuration is given up after its first samples if it takes so much longer than the best one: six samples of a
kernel scatter by a few percent."""


class ClearlyWorse(optuna.pruners.BasePruner):
    """Prunes by the best finished trial, not by the median of those so far: half of a space may be far off."""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the last reported value is past :data:`CLEARLY_WORSE` of the best finished trial's."""
        finished = [t.value for t in study.get_trials(False, (TrialState.COMPLETE,)) if t.value is not None]
        step = trial.last_step
        return bool(finished) and step is not None and trial.intermediate_values[step] > CLEARLY_WORSE * min(finished)


@contextmanager
def study_storage(path: Path) -> Iterator[RDBStorage]:
    """Optuna's tables in the database at ``path``, which exists. Raises :class:`StoreError`, also for what it does inside.

    One connection stays open until the end. A database is not to be opened on the same file in here by the same process:
    its first look at the file would drop this connection's locks when it is closed (SQLite, "How To Corrupt", 2.2). One
    that is open already does no harm.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def connection() -> sqlite3.Connection:
        opened = connect(path, "mode=rw", _BUSY_TIMEOUT_S)
        opened.execute("pragma synchronous = normal")  # a killed process loses nothing, a fallen machine some trials
        return opened

    with one_line_errors(path):
        try:
            storage = RDBStorage("sqlite:///", engine_kwargs={"creator": connection, "poolclass": QueuePool})
            try:
                yield storage
            finally:
                storage.remove_session()
                storage.engine.dispose()
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            said = _of_sqlite(error)
            if said is not None:
                raise said from error
            raise StoreError(
                f"a study must be readable and writable: {path}: {' '.join(str(error).split())[:200]}; "
                "tune into another database with --db"
            ) from error
        except RuntimeError as error:
            if "optuna" not in str(error).lower():
                raise
            raise StoreError(
                f"a study must be of a version that this Optuna reads: {path}: {str(error).splitlines()[0]}; "
                "install another Optuna, or tune into another database with --db"
            ) from error


def _of_sqlite(error: BaseException | None) -> sqlite3.Error | None:
    """What SQLite said, of which ``error`` is a consequence."""
    while error is not None and not isinstance(error, sqlite3.Error):
        error = error.__cause__ or error.__context__
    return error


@dataclass(frozen=True, slots=True)
class Asked:
    """A configuration to try."""

    trial: optuna.Trial
    launch: KernelLaunch


Values = tuple[tuple[str, int], ...]


@dataclass(slots=True)
class Search:
    """A study that asks for configurations until its space is used up. Made by :func:`open_search`."""

    kernel: str
    size_from: int
    study: optuna.Study
    rng: random.Random
    untried: dict[Values, KernelLaunch]
    distributions: dict[str, BaseDistribution]
    tried: dict[Values, FrozenTrial] = field(default_factory=dict)

    def ask(self) -> Asked | None:
        """The next configuration that was never tried; None where there is none left."""
        while self.untried:
            trial = self.study.ask(self.distributions)
            values = tuple(sorted(trial.params.items()))
            launch = self.untried.get(values)
            if launch is not None:
                return Asked(trial, launch)
            self._tell_again(trial, values)
            # The sampler repeats itself where it is sure, and a study must come to an end: the next one is drawn.
            self.study.enqueue_trial(dict(self.rng.choice(sorted(self.untried))))
        return None

    def prune(self, asked: Asked, ratio: float) -> bool:
        """Report the ratio of the first samples; true if the trial has ended by it."""
        asked.trial.report(ratio, 1)
        if not asked.trial.should_prune():
            return False
        self._tell(asked, None, TrialState.PRUNED)
        return True

    def finish(self, asked: Asked, ratio: float) -> None:
        """The trial's result."""
        self._tell(asked, ratio, TrialState.COMPLETE)

    def fail(self, asked: Asked, reason: str) -> None:
        """The trial gave no result; it is never tried again."""
        asked.trial.set_user_attr("reason", reason)
        self._tell(asked, None, TrialState.FAIL)

    def best(self, count: int) -> list[KernelLaunch]:
        """The best finished configurations, the fastest first."""
        done = [
            trial for trial in self.tried.values() if trial.state is TrialState.COMPLETE and trial.value is not None
        ]
        done.sort(key=lambda trial: (trial.value or 0.0, trial.number))
        found = (launch_at(self.kernel, self.size_from, trial.params) for trial in done[:count])
        return [launch for launch in found if launch is not None]

    def _tell(self, asked: Asked, value: float | None, state: TrialState) -> None:
        told = self.study.tell(asked.trial, value, state)
        values = tuple(sorted(asked.trial.params.items()))
        self.tried[values] = told
        self.untried.pop(values, None)

    def _tell_again(self, trial: optuna.Trial, values: Values) -> None:
        """What is known of a configuration that was tried, or of one that cannot run."""
        known = self.tried.get(values)
        if known is not None and known.state is TrialState.COMPLETE:
            self.study.tell(trial, known.value)
        else:
            self.study.tell(trial, state=TrialState.PRUNED)


def open_search(storage: RDBStorage, environment: str, kernel: str, size_from: int, seed: int) -> Search:
    """The search for ``kernel`` in a size class on an environment, begun or gone on with.

    A trial that a killed process left running counts as untried. The same seed and the same results ask for the same
    configurations, however often the search is interrupted between two of them.
    """
    space = space_of(kernel, size_from)
    name = f"{environment}/{kernel}/{size_from}/{_space_name(kernel, size_from)}"
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, pruner=ClearlyWorse())
    for stale in study.get_trials(False, (TrialState.RUNNING,)):
        study.tell(stale.number, state=TrialState.FAIL)
    trials = study.get_trials(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(trials), multivariate=True)
    search = Search(
        kernel=kernel,
        size_from=size_from,
        study=study,
        rng=random.Random(f"{seed}/{len(trials)}"),
        untried=_points(kernel, size_from),
        distributions={key: CategoricalDistribution(choices) for key, choices in space.items()},
    )
    for trial in trials:
        values = tuple(sorted(trial.params.items()))
        if trial.state is TrialState.FAIL and "reason" not in trial.user_attrs:
            continue  # interrupted
        if trial.state.is_finished() and values in search.untried:
            search.tried[values] = trial
            del search.untried[values]
    first = tuple(sorted(default_values(kernel, size_from).items()))
    if first in search.untried and not any(trial.state is TrialState.WAITING for trial in trials):
        study.enqueue_trial(dict(first))
    return search


def _points(kernel: str, size_from: int) -> dict[Values, KernelLaunch]:
    space = space_of(kernel, size_from)
    points = (dict(zip(space, values, strict=True)) for values in product(*space.values()))
    launches = ((tuple(sorted(values.items())), launch_at(kernel, size_from, values)) for values in points)
    return {values: launch for values, launch in launches if launch is not None}


def _space_name(kernel: str, size_from: int) -> str:
    """Part of a study's name: one with other values is another study, since Optuna refuses to change them."""
    space = sorted(space_of(kernel, size_from).items())
    return hashlib.sha256(repr(space).encode()).hexdigest()[:8]
