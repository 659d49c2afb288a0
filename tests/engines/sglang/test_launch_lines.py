"""SGLang takes the launch lines of README and of scripts/examples, and they leave the plugin a choice."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.launch_lines import example_arguments, readme_lines

MODULE = ["-m", "sglang.launch_server"]


def parsed(arguments: list[str]) -> argparse.Namespace:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser.parse_args(arguments)


def test_sglang_takes_the_launch_lines_which_name_no_backend(tmp_path: Path) -> None:
    shown = readme_lines("python -m sglang.launch_server")
    assert shown
    started = [
        example_arguments(tmp_path, "serve-sglang.sh", "python", *model) for model in ([], ["a/V4", "--tp", "4"])
    ]
    assert [words[:2] for words in started] == [MODULE, MODULE]
    for words in (*shown, *(words[2:] for words in started)):
        arguments = parsed(words)
        assert getattr(arguments, "dsa_prefill_backend", None) is None
        if "V3.2" in arguments.model_path:
            assert arguments.kv_cache_dtype == "fp8_e4m3"
    assert parsed(started[1][2:]).tp_size == 4
