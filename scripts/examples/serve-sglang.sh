#!/usr/bin/env bash
# serve-sglang.sh [MODEL] [MORE ARGUMENTS OF SGLANG]: SGLang with the choices of mla-tune's plugin, beside it by pip install mla-tune.
#
# V3.2's choice needs an FP8 cache; V4 has one by default. Leave --dsa-prefill-backend out: what you name yourself wins.
set -euo pipefail

model="${1:-deepseek-ai/DeepSeek-V3.2}"
shift || true
case "$model" in
    *V3.2*)
        exec python -m sglang.launch_server --model-path "$model" --tp 8 --kv-cache-dtype fp8_e4m3 "$@"
        ;;
    *)
        exec python -m sglang.launch_server --model-path "$model" --tp 8 "$@"
        ;;
esac
