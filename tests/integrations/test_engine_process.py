"""What the hooks of a process share: choices that all ranks make alike, over a real process group, and memory set aside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mla_tune.integrations.engine_process import paged_bytes, reserve
from mla_tune.policy.codec import write_policy
from mla_tune.runtime import Dispatcher
from mla_tune.runtime.decider import Decider, Service
from mla_tune.runtime.switches import Switches
from tests.command import ENVIRONMENT
from tests.policy.strategies import full_policy

RANK = """
import json, os, sys
import torch.distributed as dist
from mla_tune.integrations.engine_process import EngineProcess, Prepared, reserve
from mla_tune.integrations.seams import Hooks
from mla_tune.runtime import Dispatcher

rank, trouble, store = int(os.environ["RANK"]), os.environ["TROUBLE"], sys.argv[1]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
process = EngineProcess(Hooks("an-engine"), lambda: None, lambda: Dispatcher.for_this_gpu(fallback="incumbent"))


class OutOfMemoryError(RuntimeError):
    pass


def allocate(size):
    if trouble == "memory" and rank and size > 5000:
        raise OutOfMemoryError


def resolve(service):
    if trouble == "error" and rank:
        raise ZeroDivisionError
    layer = "c128a" if trouble == "choice" and rank else "c4a"
    decider = service.decider("prefill_attention", model="deepseek-v4-flash", layer=layer, h_q=64)
    return Prepared((decider,), (), reserve(8000, lambda tokens: tokens, allocate))


found = process.prepare("a choice", "", resolve)
print("answer", json.dumps(None if found is None else found.most_tokens), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("trouble", "answer"), [("none", 8000), ("memory", 4000), ("error", None), ("choice", None)], ids=str
)
def test_trouble_on_one_rank_changes_the_choice_on_all_of_them(
    trouble: str, answer: int | None, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    write_policy(tmp_path / "policy.yaml", full_policy())
    common = {**ENVIRONMENT, "MLA_TUNE_POLICY": str(tmp_path / "policy.yaml"), "TROUBLE": trouble}
    command = [sys.executable, "-W", "ignore", "-c", RANK, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    answers: list[Any] = []
    for process in ranks:
        output, errors = process.communicate(timeout=180)
        lines = [line for line in output.splitlines() if line.startswith("answer ")]
        assert lines, errors
        answers.append(json.loads(lines[0].removeprefix("answer ")))
    assert answers == [answer] * 2


def test_memory_is_set_aside_for_as_many_tokens_as_fit() -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch names it."""

    asked: list[int] = []

    def allocate(size: int) -> None:
        asked.append(size)
        if size > 3 << 30:
            raise OutOfMemoryError

    found = reserve(32768, lambda tokens: paged_bytes(tokens, 128), allocate)
    assert asked[-1] == paged_bytes(found, 128) <= 3 << 30 < asked[-2]
    assert found == 8192
    assert reserve(0, lambda tokens: tokens, allocate) == 0


def test_each_head_count_and_setting_of_a_process_has_its_own_choice_and_each_series_stands_once() -> None:
    dispatcher = Dispatcher(full_policy(), source="test", switches=Switches())
    service = Service(dispatcher)

    def decider(h_q: int, setting: str | None = None) -> Decider:
        return service.decider(
            "prefill_attention", model="deepseek-v4-pro", layer="c4a", h_q=h_q, engine_setting=setting
        )

    few, many, user = decider(64), decider(128), decider(128, "--dsv4-prefill-backend sparse")
    assert [few.resolved.h_q, many.resolved.h_q] == [64, 128]
    assert [few.serves, many.serves, user.serves] == [True, True, False]
    assert decider(64) is few
    few(100, 150_000, 1)
    many(100, 150_000, 1)
    lines = [line for line in service.prometheus_text().splitlines() if line.startswith("mla_tune_lookups_total")]
    assert lines == ['mla_tune_lookups_total{site="prefill_attention",model="deepseek-v4-pro",layer="c4a"} 2']
