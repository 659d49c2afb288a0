import os
import subprocess
import sys

import pytest


def test_every_device_kernel_compiles_without_a_gpu_and_is_launched_by_address_as_triton_would() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_for_gpus"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "compiled" in result.stdout
