"""A policy by its path, or by a git revision and a path: ``HEAD:policies/nvidia-h200.yaml``."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from mla_tune.errors import PolicyError
from mla_tune.policy.codec import digest, parse_policy, read_policy_file
from mla_tune.policy.evidence import PolicyEvidence, evidence_path, parse_evidence
from mla_tune.policy.schema import Policy


@dataclass(frozen=True, slots=True)
class NamedVersion:
    """One version of a policy, and what stands beside it."""

    name: str
    policy: Policy
    sha256: str
    stated: PolicyEvidence | None
    """None also for evidence of another policy, which :attr:`fault` then says."""
    fault: str | None = None


def read_version(name: str) -> NamedVersion:
    """The policy that ``name`` means: a file, or else ``REVISION:PATH``. Raises :class:`PolicyError`."""
    revision, colon, path = name.partition(":")
    if colon and revision and path and not Path(name).exists():
        data, beside = _committed(name), _beside_committed(revision, path)
    else:
        data, file = read_policy_file(name), evidence_path(name)
        beside = file.read_bytes() if file.is_file() else None
    policy, sha256 = parse_policy(data, name), digest(data)
    if beside is None:
        return NamedVersion(name, policy, sha256, None)
    try:
        return NamedVersion(name, policy, sha256, parse_evidence(beside, f"evidence of {name}", sha256))
    except PolicyError as error:
        return NamedVersion(name, policy, sha256, None, str(error))


def _committed(name: str) -> bytes:
    shown = _git_show(name)
    if isinstance(shown, str):
        raise PolicyError(
            f"a policy must be a file, or REVISION:PATH of git: got {name}: {shown}; accepted: policies/nvidia-h200.yaml, "
            "HEAD:policies/nvidia-h200.yaml"
        )
    return shown


def _beside_committed(revision: str, path: str) -> bytes | None:
    beside = evidence_path(path).as_posix()
    shown = _git_show(f"{revision}:{'./' if path.startswith('./') else ''}{beside}")
    return shown if isinstance(shown, bytes) else None


def _git_show(name: str) -> bytes | str:
    """The bytes of a committed file, or why git has none."""
    try:
        done = subprocess.run(
            ["git", "show", "--end-of-options", name], capture_output=True, check=False, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        return f"git did not run: {error.strerror}"
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.decode(errors="replace").split("\n")[0].strip()
    return said.removeprefix("fatal: ") or f"git ended with {done.returncode}"
