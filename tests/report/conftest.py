"""A report of the committed H100 measurements, of two models: enough for every toggle, and made once for all processes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from filelock import FileLock

from mla_tune.cli.priced import measured_costs
from mla_tune.policy.codec import digest, load_policy
from mla_tune.policy.evidence import load_evidence
from mla_tune.policy.schema import Table
from mla_tune.report.contents import Contents, MeasuredPolicy, contents
from mla_tune.sites.engines import Engine

ROOT = Path(__file__).parents[2]
MODELS = ("deepseek-v4-flash", "deepseek-v3.2")


def measured(name: str) -> MeasuredPolicy:
    """One committed policy with its measurements."""
    path = ROOT / "policies" / f"{name}.yaml"
    policy = load_policy(path)
    sha256 = digest(path.read_bytes())
    costs = measured_costs(policy, name, ROOT / policy.source.file)
    return MeasuredPolicy(policy, sha256, path.name, load_evidence(path, sha256), costs)


def in_short(table: Table) -> bool:
    """Whether a table is part of the short report."""
    return table.model in MODELS and table.h_q in (None, 64) and table.engine in (Engine.SGLANG, Engine.VLLM)


def _made_once(
    folders: pytest.TempPathFactory, worker: str, models: tuple[str, ...], name: str, *policies: str
) -> Contents:
    """The short report on ``models`` of ``policies``, made by whichever test process of this run comes first."""
    own = folders.getbasetemp()
    file = (own if worker == "master" else own.parent) / f"{name}.json"
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            wanted = (measured(policy) for policy in policies)
            found = contents(list(wanted), lambda table: in_short(table) and table.model in models)
            file.write_bytes(msgspec.json.encode(found))
    return msgspec.json.decode(file.read_bytes(), type=Contents)


@pytest.fixture(scope="session")
def h100(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Contents:
    """The short report of a measured GPU with two providers."""
    return _made_once(tmp_path_factory, worker_id, MODELS, "h100", "nvidia-h100", "nvidia-h100.sglang")


@pytest.fixture(scope="session")
def h800(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Contents:
    """The short report of a modelled GPU, of one model: its curves take longer."""
    return _made_once(tmp_path_factory, worker_id, MODELS[1:], "h800", "nvidia-h800")
