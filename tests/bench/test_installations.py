"""A kernel library is known by its distribution, however it was installed; what cannot be told is a version unknown.

Each installation is made by pip from a project, or from the wheel that pip built of it, and read in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command import ENVIRONMENT

READ = """
import json, site, sys
site.addsitedir(sys.argv[1])
sys.path.insert(0, sys.argv[1])
from mla_tune.bench.environment import kernel_libraries
from mla_tune.kernels.adapters import flash_mla
from mla_tune.runtime.compatibility import BuildsHere
found = kernel_libraries()
here = BuildsHere("own")
print(json.dumps([[library.name, library.version] for library in found]))
print(json.dumps([here.fault(build) for build in sys.argv[2:]]))
print(flash_mla.module_name())
"""
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")


def project(folder: Path, name: str, version: str, module: str, *, requires: str = "") -> Path:
    """The sources of a distribution with the package ``module``."""
    package = folder / module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "flash_mla.py").write_text("")
    (folder / "pyproject.toml").write_text(
        "[build-system]\nrequires = ['setuptools']\nbuild-backend = 'setuptools.build_meta'\n"
        f"[project]\nname = '{name}'\nversion = '{version}'\ndependencies = [{requires}]\n"
        f"[tool.setuptools]\npackages = ['{module}']\n"
    )
    return folder


def installed(source: Path, site: Path) -> Path:
    """``source`` in ``site`` by pip."""
    subprocess.run([*PIP, "--target", site, source], check=True, env=ENVIRONMENT)
    return site


def read(site: Path, *builds: str) -> tuple[list[list[str]], list[str | None], str]:
    """The libraries of ``site``, what is wrong with each of ``builds``, and the module that would be called."""
    command = [sys.executable, "-W", "ignore", "-c", READ, str(site), *builds]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    libraries, faults, module = done.stdout.splitlines()
    return json.loads(libraries), json.loads(faults), module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real wheel of sgl-flash-mla 1.0.0."""
    folder = tmp_path_factory.mktemp("wheel")
    source = project(folder / "source", "sgl-flash-mla", "1.0.0", "flash_mla")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, source], check=True, env=ENVIRONMENT)
    return next(folder.glob("*.whl"))


def _as_pip_does(wheel: Path, site: Path) -> Path:
    return installed(wheel, site)


def _without_record(wheel: Path, site: Path) -> Path:
    installed(wheel, site)
    next(site.glob("*.dist-info/RECORD")).unlink()
    return site


def _editable(wheel: Path, site: Path) -> Path:
    subprocess.run([*PIP, "--prefix", site, "--editable", wheel.parent / "source"], check=True, env=ENVIRONMENT)
    return Path(sysconfig.get_path("purelib", vars={"base": str(site), "platbase": str(site)}))


def _egg(wheel: Path, site: Path) -> Path:
    egg = site / "sgl_flash_mla-1.0.0-py3.egg"
    with zipfile.ZipFile(wheel) as files:
        files.extractall(egg)
    next(egg.glob("*.dist-info")).rename(egg / "EGG-INFO")
    (egg / "EGG-INFO" / "METADATA").rename(egg / "EGG-INFO" / "PKG-INFO")
    return egg


@pytest.mark.parametrize("install", [_as_pip_does, _without_record, _editable, _egg], ids=lambda made: made.__name__)
def test_a_library_is_known_however_it_was_installed(
    install: Callable[[Path, Path], Path], wheel: Path, tmp_path: Path
) -> None:
    libraries, faults, module = read(install(wheel, tmp_path), "sgl-flash-mla==1.0.0", "sgl-flash-mla==1.0.1")
    assert libraries == [["sgl-flash-mla", "1.0.0"]]
    assert faults == [None, "sgl-flash-mla must be 1.0.1: got 1.0.0"]
    assert module == "flash_mla"


def test_a_library_inside_a_zip_is_none_since_no_kernel_can_be_loaded_from_there(wheel: Path) -> None:
    libraries, faults, _ = read(wheel, "sgl-flash-mla==1.0.0")
    assert libraries == []
    assert faults == ["sgl-flash-mla must be 1.0.0: its package flash_mla is not there"]


def test_the_flash_mla_of_sglang_s_own_kernels_is_a_build_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """As beside SGLang 0.5.17: it requires sglang-kernel and calls the FlashMLA in it, whatever else is there."""
    site = installed(wheel, tmp_path / "site")
    installed(project(tmp_path / "kernels", "sglang-kernel", "0.4.5", "sgl_kernel"), site)
    installed(
        project(tmp_path / "engine", "sglang", "0.5.17", "sglang", requires="'sglang-kernel==0.4.5'"),
        site,
    )
    libraries, faults, module = read(site, "sglang-kernel==0.4.5", "sglang-kernel==0.4.9", "sgl-flash-mla==1.0.0")
    assert libraries == [["sglang-kernel", "0.4.5"]]
    assert faults == [
        None,
        "sglang-kernel must be 0.4.9: got 0.4.5",
        "sgl-flash-mla must be 1.0.0: what runs here is the flash_mla in sglang-kernel",
    ]
    assert module == "sgl_kernel.flash_mla"


def test_beside_an_sglang_that_requires_it_the_other_flash_mla_is_not_what_runs(wheel: Path, tmp_path: Path) -> None:
    site = installed(wheel, tmp_path / "site")
    installed(project(tmp_path / "kernels", "sglang-kernel", "0.4.5", "sgl_kernel"), site)
    installed(
        project(tmp_path / "engine", "sglang", "0.5.23", "sglang", requires="'sglang-kernel', 'sgl-flash-mla==1.0.0'"),
        site,
    )
    libraries, faults, module = read(site, "sglang-kernel==0.4.5", "sgl-flash-mla==1.0.0")
    assert libraries == [["sgl-flash-mla", "1.0.0"]]
    assert faults == ["sglang-kernel must be 0.4.5: what runs here is the package flash_mla", None]
    assert module == "flash_mla"
