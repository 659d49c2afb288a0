"""SGLang's plugin (entry point group ``sglang.srt.plugins``): the policy chooses where SGLang has a constant.

``pip install mla-tune`` and a policy for the GPU are enough; SGLang calls :func:`plugin` in every process it starts. That
only registers what to do when an attention backend is imported, which happens in the processes that own a GPU. There
the policy is loaded when the backend is built, compared between ranks, and announced in one line of the log.

=====================  ====================================================================================
DeepSeek-V4            ``DeepseekV4AttnBackend._use_sparse_prefill``, by layer type (:mod:`.v4_hooks`)
V4's indexer           the schedule metadata of a prefill, when the user set no switch (:mod:`.indexer_hooks`)
V3.2 with FP8 cache    ``DeepseekSparseAttnBackend.set_dsa_prefill_impl`` (:mod:`.dsa_hooks`)
=====================  ====================================================================================

``SGLANG_PLUGINS`` without ``mla_tune`` keeps SGLang from calling this; ``MLA_TUNE_MODE=off`` makes it do nothing.
"""

from __future__ import annotations

import logging
import os

from mla_tune.errors import UsageError
from mla_tune.integrations.seams import after_import
from mla_tune.runtime.switches import Switches

_log = logging.getLogger("mla_tune")


def plugin() -> None:
    """Register the hooks of this process. Costs a few microseconds where no attention backend is ever imported."""
    try:
        off = Switches.from_environment(os.environ).off
    except UsageError:
        off = None  # said in the process that has a backend, where the policy is loaded
    if off is not None:
        _log.info("mla-tune is off in this process: %s", off)
        return
    after_import("sglang.srt.layers.attention.deepseek_v4_backend", _hook_v4)
    after_import("sglang.kernels.ops.attention.dsv4", _hook_indexer)
    after_import("sglang.srt.layers.attention.dsa_backend", _hook_dsa)


# Imported where they are needed: a process without a backend never loads them, nor what a policy is read with.


def _hook_v4(module: object) -> None:
    from mla_tune.integrations.sglang import v4_hooks

    v4_hooks.hook_backend(module)


def _hook_indexer(module: object) -> None:
    from mla_tune.integrations.sglang import indexer_hooks

    indexer_hooks.hook_function(module)


def _hook_dsa(module: object) -> None:
    from mla_tune.integrations.sglang import dsa_hooks

    dsa_hooks.hook_backend(module)


def prometheus_text() -> str:
    """The counters of this process in Prometheus' text format; empty before a backend was built."""
    from mla_tune.integrations.sglang.sglang_state import PROCESS

    return "" if PROCESS.service is None else PROCESS.service.prometheus_text()
