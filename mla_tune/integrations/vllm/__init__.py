"""vLLM's plugin (entry point group ``vllm.general_plugins``): the policy chooses where vLLM has a constant, or no choice.

vLLM calls :func:`plugin` in every process it starts. That only registers what to do when an attention backend is imported,
which happens in the processes that own a GPU. There the policy is loaded when the first backend is built, compared between
the ranks of its tensor-parallel group, and announced in one line of the log.

=====================  ==========================================================================================
V3.2 with FP8 cache    one KV-cache kernel for all tokens or a BF16 prefill beside it, per batch (:mod:`.mixed_batch_hooks`)
DeepSeek-V4            prefill on the paged cache instead of on gathered rows, by layer type (:mod:`.prefill_hooks`)
=====================  ==========================================================================================

``VLLM_PLUGINS`` without ``mla_tune`` keeps vLLM from calling this; ``MLA_TUNE_MODE=off`` makes it do nothing.
"""

from __future__ import annotations

import logging
import os

from mla_tune.errors import UsageError
from mla_tune.integrations.seams import after_import
from mla_tune.runtime.switches import Switches

SPARSE_BACKEND = "vllm.v1.attention.backends.mla.flashmla_sparse"
V4_BACKEND = "vllm.models.deepseek_v4.nvidia.flashmla"
RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")

_log = logging.getLogger("mla_tune")


def plugin() -> None:
    """Register the hooks of this process. Costs a few microseconds where no attention backend is ever imported."""
    try:
        _register()
    # vLLM does not catch what a plugin raises, and must start all the same.
    except Exception:
        _log.exception("mla-tune could not register with vLLM, which keeps its own choices")


def _register() -> None:
    try:
        off = Switches.from_environment(os.environ).off
    except UsageError:
        off = None  # said in the process that has a backend, where the policy is loaded
    if off is not None:
        _log.info("mla-tune is off in this process: %s", off)
        return
    after_import(SPARSE_BACKEND, _hook_sparse)
    after_import(V4_BACKEND, _hook_v4)
    for runner in RUNNERS:
        after_import(runner, _hook_runner)


# Imported where they are needed: a process without a backend never loads them, nor what a policy is read with.


def _hook_sparse(module: object) -> None:
    from mla_tune.integrations.vllm import mixed_batch_hooks

    mixed_batch_hooks.hook_builder(module)


def _hook_v4(module: object) -> None:
    from mla_tune.integrations.vllm import prefill_hooks

    prefill_hooks.hook_layer(module)


def _hook_runner(module: object) -> None:
    from mla_tune.integrations.vllm import vllm_state

    vllm_state.hook_runner(module)


def prometheus_text() -> str:
    """The counters of this process in Prometheus' text format; empty before a backend was built."""
    from mla_tune.integrations.vllm.vllm_state import PROCESS

    return "" if PROCESS.service is None else PROCESS.service.prometheus_text()
