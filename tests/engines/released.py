"""Releases as the package index has them: what an engine's wheel requires, laid out as an installation records it.

Only metadata are asked for, not the wheels (vLLM's has 400 MB), but for the kernel libraries whose files a policy's digests
are compared with. What was read is kept in ``${MLA_TUNE_CACHE:-~/.cache/mla-tune}``; no release changes once it is out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mla_tune.hardware.builds import DISTRIBUTIONS
from mla_tune.sites.provider import SGLANG_KERNEL, VLLM

CACHE = Path(os.environ.get("MLA_TUNE_CACHE") or Path.home() / ".cache" / "mla-tune")
KERNELS = frozenset({name for names in DISTRIBUTIONS.values() for name in names} - {VLLM} | {SGLANG_KERNEL})
"""Distributions of kernels that a table may depend on."""
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
_ONLY = ("--no-deps", "--only-binary", ":all:")


@cache
def requirements(name: str, version: str) -> tuple[Requirement, ...]:
    """``Requires-Dist`` of a released wheel, without its extras, as they hold on this machine."""
    stated = map(Requirement, metadata(name, version).get("requires_dist", []))
    return tuple(r for r in stated if r.marker is None or r.marker.evaluate({"extra": ""}))


def kernel_pins(name: str, version: str) -> dict[str, str]:
    """The kernel distributions that a release pins, and to which release of each."""
    found: dict[str, str] = {}
    for requirement in requirements(name, version):
        exact = [clause.version for clause in requirement.specifier if clause.operator == "=="]
        if (pinned := str(canonicalize_name(requirement.name))) in KERNELS:
            assert len(exact) == 1, f"{name} {version} requires {requirement}: no exact release"
            found[pinned] = exact[0]
    return found


@cache
def metadata(name: str, version: str) -> dict[str, Any]:
    """A wheel's metadata."""
    kept = CACHE / "metadata" / f"{name}-{version}.json"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(_resolved(f"{name}=={version}")))
        aside.replace(kept)
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def newest(name: str) -> str:
    """The newest release that pip finds for this Python."""
    return str(_resolved(name)["version"])


def lay_out(site: Path, name: str, version: str) -> None:
    """What an installation of the release records in ``site``: its metadata, and no package."""
    stated = metadata(name, version)
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {stated['name']}", f"Version: {stated['version']}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in stated.get("requires_dist", [])]
    (folder / "METADATA").write_text("\n".join([*lines, ""]))


def unpack(site: Path, name: str, version: str) -> None:
    """The released wheel's files in ``site``."""
    wheels = CACHE / "wheels"
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(wheels.glob(pattern)):
        _run("download", "--quiet", *_ONLY, "--dest", str(wheels), f"{name}=={version}")
    with zipfile.ZipFile(next(wheels.glob(pattern))) as wheel:
        wheel.extractall(site)


def _resolved(requirement: str) -> dict[str, Any]:
    command = (
        "install",
        "--quiet",
        "--dry-run",
        "--ignore-installed",
        *_ONLY,
        "--use-feature=fast-deps",
        "--report",
        "-",
    )
    found: dict[str, Any] = json.loads(_run(*command, requirement))["install"][0]["metadata"]
    return found


def _run(*arguments: str) -> str:
    done = subprocess.run([*_PIP, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"pip {' '.join(arguments)}: {done.stderr.strip()}"
    return done.stdout
