"""What the plugin takes over in the installed release, told from that release's own code and its own argument parser.

`check --all` runs this file, and the tests of each choice, with every release of sglang-releases.txt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from mla_tune.integrations.sglang import dsa_hooks, indexer_hooks, v4_hooks
from mla_tune.integrations.sglang.sglang_state import PROCESS, RELEASES, V4_RELEASES
from mla_tune.kernels.adapters import sglang_kernels
from mla_tune.policy.codec import write_policy
from mla_tune.sites.provider import Provider
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import LayerType
from mla_tune.store.measurement import Outcome
from tests.engines.sglang.conftest import SCHEDULES, STUBS, V4, mixed_policy
from tests.engines.sglang.test_stages import checked, site_of

ROOT = Path(__file__).parents[3]
RELEASE = version("sglang")
V3_2 = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_topk": 2048,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "q_lora_rank": 1536,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "torch_dtype": "bfloat16",
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "n_shared_experts": 1,
}
PARSE = """
import logging, pickle, sys
from importlib import import_module
from types import SimpleNamespace

import torch

torch.cuda.get_device_capability = lambda *_: (9, 0)  # Hopper: the one thing that the resolution asks a GPU
from sglang.srt.server_args import prepare_server_args

from mla_tune.integrations.sglang import plugin
from sglang.srt.runtime_context import get_parallel
from tests.engines.sglang.conftest import DSA, batch, runner
from tests.engines.sglang.test_dsa import dsa_backend

plugin()
dsa = import_module(DSA)
model = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=61), num_attention_heads=128)
name = "dsa_prefill_backend"
for named in ([], ["flashmla_kv"], ["flashmla_sparse"], ["flashmla_auto"]):
    flag = ["--dsa-prefill-backend", *named] if named else []
    arguments = prepare_server_args(
        ["--model-path", sys.argv[1], "--skip-tokenizer-init", "--kv-cache-dtype", "fp8_e4m3", "--page-size", "64",
         "--device", "cuda", *flag])
    if hasattr(arguments, "resolve_once"):  # from 0.5.19 on resolution is a step of its own
        arguments.resolve_once()
    decided = [fields[name] for _, fields in arguments._resolved_overrides if name in fields]
    used = [*named, *decided][0]
    arguments = pickle.loads(pickle.dumps(arguments))  # as a scheduler's process gets them
    ranks = {"attn_tp_size": 1, "attn_tp_rank": 0, "attn_cp_size": 1, "attn_cp_rank": 0, "attn_dcp_size": 1}
    with get_parallel().override(**ranks):
        made = dsa_backend(
            dsa, runner(model_config=model, server_args=arguments), dsa_prefill_impl=used,
            enable_auto_select_prefill_impl=used == "flashmla_auto")
        taken = []
        for new in (64, 8192):
            made.set_dsa_prefill_impl(batch((50_000, new)))
            taken.append(made.dsa_prefill_impl)
    print("arguments", *named, "resolved", *decided, "serves", made._mla_tune._decider.serves, *taken)
"""
EITHER = "flashmla_kv flashmla_sparse"
"""What V3.2's table of the policy says of 64 and of 8192 query tokens."""


def test_a_default_that_sglang_resolved_is_not_the_user_s_setting(tmp_path: Path) -> None:
    """From SGLang's own command line, through its own resolution, to the hook's decisions."""
    (tmp_path / "config.json").write_text(json.dumps(V3_2))
    write_policy(tmp_path / "policy.yaml", mixed_policy())
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLA_TUNE_", "SGLANG_"))}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(STUBS))), "TRITON_INTERPRET": "1"}
    environment |= {"MLA_TUNE_POLICY": str(tmp_path / "policy.yaml")}
    # As SGLang sets it for V3.2 when it starts: dense attention up to top-k tokens of context.
    environment |= {"SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD": "2048"}
    command = [sys.executable, "-W", "ignore", "-c", PARSE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("arguments")] == [
        f"arguments resolved flashmla_kv serves True {EITHER}",
        "arguments flashmla_kv resolved serves False flashmla_kv flashmla_kv",
        "arguments flashmla_sparse resolved serves False flashmla_sparse flashmla_sparse",
        f"arguments flashmla_auto resolved serves True {EITHER}",
    ]


def test_a_sweep_s_stages_of_v3_2_are_this_release_s_kernels_and_give_the_reference_s_attention() -> None:
    found = sglang_kernels.installed("cpu")
    assert isinstance(found, sglang_kernels.FoundKernels), found
    assert found.provider == Provider("sglang", RELEASE)
    rows = checked(site_of(LayerType.DSA, found.provider), Shape(1, 3, 90))
    assert {name: (row.outcome, row.detail) for name, row in rows.items()} == {
        "sparse_fwd": (Outcome.OK, ""),
        "with_kvcache": (Outcome.OK, ""),
    }


@pytest.mark.skipif(RELEASE not in RELEASES, reason="a release that the plugin leaves alone")
def test_each_hook_takes_hold_in_the_releases_that_it_names_and_in_no_other(v4: ModuleType, dsa: ModuleType) -> None:
    taken = {key.partition(":")[2] for key in PROCESS.hooks.taken}
    assert {dsa_hooks.INIT.path, dsa_hooks.SET_IMPL.path} <= taken
    assert {indexer_hooks.PREPARE.path, indexer_hooks.SCHEDULE.path} <= taken
    attention = {v4_hooks.USE_SPARSE.path, v4_hooks.LAYER.path}
    assert (attention & taken) == (attention if RELEASE in V4_RELEASES else set())
    assert list(PROCESS.hooks.left) == ([] if RELEASE in V4_RELEASES else [v4_hooks.HOOK.choice])


def test_who_plans_a_schedule_is_looked_up_where_the_hook_is(v4: ModuleType) -> None:
    import inspect

    from sglang.srt.layers.attention.dsv4 import metadata

    source = inspect.getsource(metadata.PagedIndexerMetadata.__post_init__)
    assert f"from {SCHEDULES} import" in source, "at every call, so that a wrapper in the package is what is called"
    assert v4.__name__ == V4
