#!/usr/bin/env bash
# serve-vllm.sh POLICY [MODEL] [MORE ARGUMENTS OF VLLM]: vLLM with the choices of mla-tune's plugin, beside it by pip install mla-tune.
#
# No shipped policy was measured with vLLM's own FlashMLA, so none serves by itself: POLICY names the file that may.
set -euo pipefail

export MLA_TUNE_POLICY="${1:?needs a policy file, for example policies/nvidia-h200.yaml}"
model="${2:-deepseek-ai/DeepSeek-V3.2}"
shift
shift || true
exec vllm serve "$model" --tensor-parallel-size 8 --kv-cache-dtype fp8 "$@"
