"""Ranks that share forwards compare what decides, over a real process group of four."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mla_tune.policy.codec import write_policy
from mla_tune.runtime import Dispatcher
from mla_tune.runtime.ranks import agree
from tests.command import ENVIRONMENT
from tests.policy.strategies import full_policy

RANK = """
import json, logging, os, sys
import torch.distributed as dist
from mla_tune.errors import MlaTuneError
from mla_tune.runtime.ranks import agree
import mla_tune.runtime.ranks
from mla_tune.runtime import Dispatcher

rank, engine, stays_away = int(os.environ["RANK"]), os.environ.get("ENGINE", ""), os.environ.get("STAYS_AWAY")
mla_tune.runtime.ranks.PATIENCE_S = 5.0
dist.init_process_group("gloo")
answer = "stayed away"
if not stays_away:
    try:
        dispatcher = agree(Dispatcher.for_this_gpu(fallback="incumbent"), engine=engine)
        site = dispatcher.resolve("prefill_attention", model="deepseek-v4-flash", layer="c4a")
        answer = site.choose(100, 150_000, 1), site.rule, list(dispatcher.fallbacks)
    except MlaTuneError as error:
        answer = "refused", str(error)
print("answer", json.dumps(answer), flush=True)
os._exit(0)
"""


def world(folder: Path, *variables: dict[str, str]) -> list[Any]:
    """What each rank of a group answers; one set of environment variables a rank."""
    store = folder / "store"
    common = {**ENVIRONMENT, "WORLD_SIZE": str(len(variables)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    script = RANK.replace('"gloo")', f'"gloo", init_method="file://{store}", rank=rank, world_size={len(variables)})')
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script],
            env={**common, "RANK": str(rank), **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(variables)
    ]
    answers = []
    for process in ranks:
        output, errors = process.communicate(timeout=180)
        lines = [line for line in output.splitlines() if line.startswith("answer ")]
        assert lines, errors
        answers.append(json.loads(lines[0].removeprefix("answer ")))
    return answers


@pytest.fixture
def policies(tmp_path: Path) -> tuple[str, str]:
    """Two policies that differ in a comment's worth."""
    write_policy(tmp_path / "one.yaml", full_policy())
    write_policy(tmp_path / "other.yaml", msgspec.structs.replace(full_policy(), regime="eager"))
    return str(tmp_path / "one.yaml"), str(tmp_path / "other.yaml")


@pytest.fixture(autouse=True)
def _needs_torch() -> None:
    pytest.importorskip("torch")


def test_four_ranks_of_one_policy_serve_it(policies: tuple[str, str], tmp_path: Path) -> None:
    answers = world(tmp_path, *[{"MLA_TUNE_POLICY": policies[0]}] * 4)
    assert answers == [["with_kvcache", "policy", []]] * 4


def test_one_rank_with_another_policy_makes_all_four_refuse(policies: tuple[str, str], tmp_path: Path) -> None:
    one, other = policies
    answers = world(tmp_path, *[{"MLA_TUNE_POLICY": one if rank != 2 else other} for rank in range(4)])
    assert [answer[0] for answer in answers] == ["refused"] * 4
    assert len({str(answer[1]) for answer in answers}) == 1
    text = str(answers[0][1])
    assert text.startswith("all ranks must decide alike: got policy ")
    assert f"({one}) on rank 0, 1, 3; policy " in text
    assert f"({other}) on rank 2; give all ranks the same file" in text


def test_where_the_setting_says_so_all_four_keep_the_incumbent(policies: tuple[str, str], tmp_path: Path) -> None:
    one, other = policies
    ranks = [{"MLA_TUNE_POLICY": one if rank else other, "MLA_TUNE_RANKS": "incumbent"} for rank in range(4)]
    answers = world(tmp_path, *ranks)
    assert [answer[:2] for answer in answers] == [["sparse_fwd", "incumbent"]] * 4
    assert len({str(answer[2]) for answer in answers}) == 1


@pytest.mark.parametrize("saying", [0, 1])
def test_one_rank_that_says_so_is_enough_for_all_to_keep_the_incumbent(
    saying: int, policies: tuple[str, str], tmp_path: Path
) -> None:
    ranks = [{"MLA_TUNE_POLICY": policy} for policy in policies]
    ranks[saying]["MLA_TUNE_RANKS"] = "incumbent"
    answers = world(tmp_path, *ranks)
    assert [answer[:2] for answer in answers] == [["sparse_fwd", "incumbent"]] * 2


@pytest.mark.parametrize(
    "different",
    [{"MLA_TUNE_MODE": "pin:sparse_fwd"}, {"MLA_TUNE_POLICY": "/nonexistent"}, {"ENGINE": "SGLANG_X=0"}],
    ids=["pin", "no policy", "engine setting"],
)
def test_whatever_decides_differently_is_a_difference(
    different: dict[str, str], policies: tuple[str, str], tmp_path: Path
) -> None:
    same = {"MLA_TUNE_POLICY": policies[0]}
    answers = world(tmp_path, same, {**same, **different})
    assert [answer[0] for answer in answers] == ["refused"] * 2


def test_a_rank_that_never_asks_is_named(policies: tuple[str, str], tmp_path: Path) -> None:
    same = {"MLA_TUNE_POLICY": policies[0]}
    first, second = world(tmp_path, same, {**same, "STAYS_AWAY": "1"})
    assert second == "stayed away"
    assert first[0] == "refused"
    assert "every rank must compare its policy within 5 s" in str(first[1])


def test_a_process_without_torch_or_without_a_group_agrees_with_itself() -> None:
    script = (
        "import sys; from mla_tune.runtime.ranks import agree; from mla_tune.runtime.dispatcher import Dispatcher;"
        "d = Dispatcher(None, source='none'); assert agree(d) is d; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=ENVIRONMENT)
    import torch.distributed

    assert not torch.distributed.is_initialized()
    dispatcher = Dispatcher(full_policy(), source="test")
    assert agree(dispatcher) is dispatcher
