"""What the tests of both engines share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkout import copy_checkout
from tests.engines.released import kernel_pins, lay_out, unpack

FLASH_MLA = "sgl-flash-mla"
Install = Callable[[str, str], dict[str, str]]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of this checkout installed in it."""
    checkout, site = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("site")
    copy_checkout(checkout)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run([*command, "--no-deps", "--no-build-isolation", "--target", site, checkout], check=True)
    return site


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Lay an engine's release out with the kernel packages that it pins, FlashMLA's with its files."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("POLICY", "MODE", "ALLOW_MODELLED"):
        monkeypatch.delenv(f"MLA_TUNE_{name}", raising=False)

    def laid_out(engine: str, release: str) -> dict[str, str]:
        pins = kernel_pins(engine, release)
        lay_out(site, engine, release)
        for name, pinned in pins.items():
            (unpack if name == FLASH_MLA else lay_out)(site, name, pinned)
        if engine == "sglang" and FLASH_MLA not in pins:  # of whose 0.4 GB one file says that FlashMLA is in them
            (site / "sgl_kernel").mkdir()
            for file in ("__init__.py", "flash_mla.py"):
                (site / "sgl_kernel" / file).touch()
        sys.path_importer_cache.clear()
        return pins

    return laid_out
