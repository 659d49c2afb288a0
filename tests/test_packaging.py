"""What a wheel carries, and that the scripts refuse what they cannot serve in one line."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mla_tune
from mla_tune.policy.codec import SCHEMA_FILE
from tests.checkout import ROOT, copy_checkout


def pip(*arguments: str | Path) -> None:
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([sys.executable, "-m", "pip", arguments[0], *options, *arguments[1:]], check=True)


def script(name: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts of the tree that it lies in."""
    return subprocess.run(
        ["bash", name, *arguments],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all that packaging reads, with one policy more, in a folder whose name has a space."""
    copy = tmp_path_factory.mktemp("a checkout")
    copy_checkout(copy)
    (copy / "policies").mkdir(exist_ok=True)
    (copy / "policies" / "nvidia-test.yaml").write_text("shipped: true\n")
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    pip("wheel", "--no-build-isolation", "--wheel-dir", checkout / "dist", checkout)
    (built,) = (checkout / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an installation, as a server has it: no checkout beside the package."""
    site = tmp_path_factory.mktemp("site")
    pip("install", "--target", site, wheel)
    return site


def test_the_packages_listed_for_the_wheel_are_the_folders_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = [init.parent.relative_to(ROOT) for init in (ROOT / "mla_tune").rglob("__init__.py")]
    expected = sorted([".".join(folder.parts) for folder in folders] + ["mla_tune.policies"])
    assert project["tool"]["setuptools"]["packages"] == expected


def test_a_wheel_holds_every_file_of_the_package_and_every_policy_and_nothing_else(wheel: Path, checkout: Path) -> None:
    package = {path.relative_to(checkout) for path in (checkout / "mla_tune").rglob("*") if path.is_file()}
    shipped = [*(checkout / "policies").glob("*.yaml"), *(checkout / "policies").glob("README.md")]
    policies = {Path("mla_tune", "policies", name) for name in (SCHEMA_FILE, *(path.name for path in shipped))}
    with zipfile.ZipFile(wheel) as archive:
        held = {Path(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert Path("mla_tune", "policies", "nvidia-test.yaml") in held
    assert held == package | policies


def test_the_wheel_carries_the_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        assert archive.read(name) == (ROOT / "LICENSE").read_bytes()


def test_the_version_is_the_packages_own(wheel: Path) -> None:
    assert wheel.name.startswith(f"mla_tune-{mla_tune.__version__}-")


def test_an_installed_wheel_finds_its_policies_as_resources(installed: Path) -> None:
    ask = (
        f"import sys; sys.path.insert(0, {str(installed)!r});"
        "from importlib.resources import files; import mla_tune;"
        "print(mla_tune.__file__);"
        "print(files('mla_tune').joinpath('policies', 'nvidia-test.yaml').read_text());"
        "print(files('mla_tune.policies').joinpath('nvidia-test.yaml').read_text())"
    )
    answer = subprocess.run(
        [sys.executable, "-I", "-c", ask], capture_output=True, text=True, check=True, cwd=installed
    )
    assert answer.stdout.split("\n")[0] == str(installed / "mla_tune" / "__init__.py")
    assert answer.stdout.count("shipped: true") == 2


def test_an_installed_wheel_has_the_command(installed: Path) -> None:
    (entry_points,) = installed.glob("mla_tune-*.dist-info/entry_points.txt")
    assert "mla-tune = mla_tune.cli:main" in entry_points.read_text()
    assert (installed / "bin" / "mla-tune").is_file()


@pytest.mark.parametrize("name", ["run", "check"])
def test_without_a_usable_python_the_setup_scripts_say_which_one_they_need(name: str, checkout: Path) -> None:
    done = script(str(checkout / "scripts" / name), PYTHON="/nonexistent/python3")
    assert done.returncode == 1
    assert done.stderr.startswith("mla-tune: needs Python 3.11 or newer: /nonexistent/python3 did not run")
    assert done.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


def test_an_old_python_is_named_with_its_version(checkout: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 1;; -V) echo Python 3.9.18;; esac\n')
    old.chmod(0o755)
    done = script(str(checkout / "scripts" / "run"), PYTHON=str(old))
    assert done.returncode == 1
    assert f"{old} is Python 3.9.18" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "needs a folder of wheels"),
        (["{here}/none"], "/none is none; see "),
        (["{here}", "{here}/policies"], "TARGET must be new, empty or made by this script"),
        (["{here}", "{here}/new"], "that has torch and triton: none of /nonexistent/python3"),
    ],
)
def test_an_offline_installation_refuses_in_one_line(arguments: list[str], reason: str, checkout: Path) -> None:
    filled = [argument.format(here=checkout) for argument in arguments]
    done = script(str(checkout / "scripts" / "install-offline"), *filled, PYTHON="/nonexistent/python3")
    assert done.returncode == 1
    assert done.stderr.startswith("mla-tune: ")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_offline_installation_without_wheels_prints_the_command_that_fetches_them(
    checkout: Path, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    folder = tmp_path / "wheels"
    folder.mkdir()
    done = script(str(checkout / "scripts" / "install-offline"), folder, tmp_path / "new", PYTHON=sys.executable)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert done.returncode == 1
    assert f"no wheels in {folder}; on a machine with network run: pip download" in done.stderr
    assert f"--python-version {version} " in done.stderr
    assert "'sgl-flash-mla==1.0.0'" in done.stderr
    assert done.stderr.count("\n") == 1
