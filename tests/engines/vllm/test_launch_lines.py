"""vLLM takes the launch lines of README and of scripts/examples, with the cache that leaves the plugin a choice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch_lines import example_arguments, readme_lines


def test_vllm_takes_the_launch_lines_with_an_fp8_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    monkeypatch.setattr(vllm.platforms, "_current_platform", CpuPlatform())  # defaults of options ask for some device
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    shown = readme_lines("vllm serve")
    assert shown
    policy = str(tmp_path / "policy.yaml")
    started = [example_arguments(tmp_path, "serve-vllm.sh", "vllm", policy, *model) for model in ([], ["a/V4"])]
    for words in (*shown, *(words[1:] for words in started)):
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        parser.add_argument("model_tag")
        assert parser.parse_args(words).kv_cache_dtype == "fp8"
