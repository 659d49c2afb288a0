"""Fixtures shared by all tests. Without a GPU, Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from mla_tune.fit.costs import CostModel
    from mla_tune.kernels.backend import Backend

settings.register_profile("mla-tune", deadline=None)  # a first example may compile a kernel
settings.load_profile("mla-tune")

# Threads that wait for each other make a test of milliseconds take seconds wherever the machine has other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in every worker


# What a developer's own sweeps have left is no part of a test.
os.environ["MLA_TUNE_HOME"] = "/dev/null/mla-tune"  # a place that not even root can write to


def _has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


HAS_CUDA = _has_cuda()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch for the long forms of some tests."""
    parser.addoption(
        "--all", action="store_true", help="also run what tests/README.md lists as too long for every change"
    )


@pytest.fixture(scope="session")
def everything(request: pytest.FixtureRequest) -> bool:
    """Whether this run takes the long form of a test that has one."""
    return bool(request.config.getoption("--all"))


REPORTS = pytest.StashKey[dict[str, list[str]]]()
"""Title and lines of what tests want to be read at the end of the run."""


def pytest_configure(config: pytest.Config) -> None:
    """Start without reports, and collect those of pytest-xdist's processes where it runs the tests."""
    config.stash[REPORTS] = {}
    config.pluginmanager.register(_Gathered(config.stash[REPORTS]))


class _Gathered:
    """Takes over the reports of test processes as they end."""

    def __init__(self, reports: dict[str, list[str]]) -> None:
        self.reports = reports

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Add what one process reported; one that crashed reports nothing."""
        self.reports.update(getattr(node, "workeroutput", {}).get("reports", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand this process's reports to the one that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["reports"] = session.config.stash[REPORTS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the reports."""
    for title, lines in config.stash[REPORTS].items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.line(line)


@dataclass(frozen=True, slots=True)
class Target:
    """One implementation of the kernels, and where its tensors lie."""

    device: str
    backend: Backend

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs the kernels."""
        return self.device == "cpu" and self.backend == "triton"


@pytest.fixture(scope="session")
def h200_costs() -> CostModel:
    """Curves of the committed H200 measurements, each fitted when it is first asked for."""
    from mla_tune.fit.costs import CostModel
    from mla_tune.fit.usable import usable
    from mla_tune.store.export import read_export

    found = read_export(Path(__file__).parent.parent / "db" / "nvidia-h200.jsonl")
    return CostModel(found.environment, usable(found.measurements, found.tuned), found.tries)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that the machine has."""
    return str(request.param)


@pytest.fixture(scope="session", params=["triton", "torch"])
def target(request: pytest.FixtureRequest, device: str) -> Target:
    """Every implementation on every device; the interpreter only stands in for a GPU."""
    from mla_tune.kernels.backend import Backend

    chosen = Target(device, Backend(request.param))
    if chosen.interpreted and HAS_CUDA:
        pytest.skip("the GPU compiles these kernels, so the interpreter is off")
    return chosen
