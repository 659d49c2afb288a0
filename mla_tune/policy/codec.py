"""The policy file: the only code that reads or writes it.

A file is YAML that people review, so it holds what serves and says each thing once: tables that agree stand once with the
models, heads and layers that they are for, and every choice is one line.

    - {requests_from: 3, context_from: 80K, take: sparse_fwd, query_tokens_from: {80K: 15, 160K: 70}}

Context tokens may be written with K (1024) or M (1024 K), as far as that is exact. Reading is strict: plain numbers are
decimal, words that YAML versions read differently (``yes``, ``1e3``, dates) stay words, a key occurs once, and every key is
known. Writing is byte-stable.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from mla_tune import __version__
from mla_tune.errors import PolicyError
from mla_tune.policy.file_form import SCHEMA_VERSION, FileForm, FormError, to_file, to_policy
from mla_tune.policy.rules import REBUILD, problems, shown
from mla_tune.policy.schema import Policy, Table
from mla_tune.policy.strict_yaml import line_at, read_yaml, write_yaml
from mla_tune.sites.engines import Engine

if TYPE_CHECKING:
    from mla_tune.policy.evidence import PolicyEvidence

MAX_POLICY_BYTES = 1 << 18
"""Largest file that is read; a GPU's takes 10 to 30 KB."""
SCHEMA_FILE = "policy.schema.json"
"""The published schema, beside the policies; :mod:`mla_tune.policy.file_schema` makes it."""
EDITOR_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}\n"
"""First line of a file: an editor checks and completes by it. To a reader and to a server it says nothing."""


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Read the policy file at ``path``. Raises :class:`PolicyError`."""
    return parse_policy(read_policy_file(path), os.fspath(path))


def read_policy_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a policy file, at most one byte more than is accepted. Raises :class:`PolicyError`."""
    try:
        with open(path, "rb") as file:
            return file.read(MAX_POLICY_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        reason = getattr(error, "strerror", None) or error
        raise PolicyError(f"a policy file must be readable: got {os.fspath(path)}: {reason}; check the path") from None


def parse_policy(data: bytes, source: str) -> Policy:
    """The policy in ``data``, checked; ``source`` names the file in errors. Raises :class:`PolicyError`."""
    raw, node = read_yaml(_decoded(data, source), source)
    _check_schema(raw, source)

    def error(path: str, rule: str) -> PolicyError:
        return PolicyError(f"{source}:{line_at(node, path)}: {path or 'the file'} {rule}; {REBUILD}")

    try:
        policy = to_policy(msgspec.convert(raw, FileForm, strict=True))
    except msgspec.ValidationError as found:
        rule, _, place = str(found).partition(" - at `$")
        raise error(place.strip("`."), f"does not fit schema {SCHEMA_VERSION}: {rule}") from None
    except FormError as found:
        raise error(*found.args) from None
    problem = next(problems(policy), None)
    if problem is not None:
        raise error(_place(problem.path, policy, raw), problem.text)
    return policy


def digest(data: bytes) -> str:
    """SHA-256 of a policy file in hexadecimal: ranks compare it at start and refuse to differ."""
    return hashlib.sha256(data).hexdigest()


def _decoded(data: bytes, source: str) -> str:
    if len(data) > MAX_POLICY_BYTES:
        raise PolicyError(f"{source}: must be at most {MAX_POLICY_BYTES} bytes: got more; {REBUILD}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise PolicyError(f"{source}:{line}: must be UTF-8: got byte 0x{byte:02x}; {REBUILD}") from None


def dump_policy(policy: Policy, evidence: PolicyEvidence | None = None) -> bytes:
    """``policy`` as the bytes of its file: equal policies give equal bytes, and :func:`parse_policy` gives it back.

    The head says what ``evidence`` shows; without it the head says less. Raises :class:`PolicyError` for a policy that
    would not be read back.
    """
    from mla_tune.policy.preface import preface

    items = frozenset({"choices", *(entry.kernel for entry in policy.kernel_config)})
    body = write_yaml(msgspec.to_builtins(to_file(policy)), one_line=_ONE_LINE, one_line_items=items)
    head = "".join(f"# {line}".rstrip() + "\n" for line in preface(policy, evidence))
    data = f"{EDITOR_LINE}{head}{body}".encode()
    parse_policy(data, "policy to write")
    return data


def write_policy(path: str | os.PathLike[str], policy: Policy, evidence: PolicyEvidence | None = None) -> None:
    """Write ``policy`` to ``path`` and ``evidence`` beside it, each all or nothing. Raises :class:`PolicyError`."""
    from mla_tune.files import write_atomically  # a server reads policies and never writes one
    from mla_tune.policy.evidence import dump_evidence, evidence_path

    data = dump_policy(policy, evidence)
    if os.path.isdir(path):  # said before the evidence is written beside it
        raise PolicyError(f"a policy file must be writable: got {path}: Is a directory; check the path")
    try:
        if evidence is not None:
            write_atomically(evidence_path(path), dump_evidence(evidence, digest(data)))
        write_atomically(path, data)
    except OSError as error:
        raise PolicyError(f"a policy file must be writable: got {path}: {error.strerror}; check the path") from None


_ONE_LINE = frozenset({"gpu", "for", "choose", "measured", "limits", "slow_first_call_s", "candidate_builds"})


def _check_schema(raw: Any, source: str) -> None:
    """The version first: a newer file should ask for an upgrade, not complain about a key that we don't know."""
    if not isinstance(raw, dict):
        raise PolicyError(f"{source}: must be a mapping with the keys of a policy: got {shown(raw)}; {REBUILD}")
    schema = raw.get("schema")
    if schema == SCHEMA_VERSION and not isinstance(schema, bool):
        return
    newer = isinstance(schema, int) and schema > SCHEMA_VERSION
    step = "upgrade mla-tune" if newer else _refit(raw)
    reads = f"mla-tune {__version__} reads schema {SCHEMA_VERSION}"
    raise PolicyError(f"{source}: schema must be one that is read here: got {shown(schema)}; {reads}; {step}")


def _refit(raw: Mapping[str, Any]) -> str:
    """The command that makes a file of an older schema again, if it says one."""
    origin = raw.get("source")
    command = origin.get("command") if isinstance(origin, dict) else None
    if isinstance(command, str) and command.startswith("mla-tune ") and command.isprintable():
        return f"make it again from its measurements with `{command}`"
    return REBUILD


def _place(path: str, policy: Policy, raw: Any) -> str:
    """The place in the file of ``path``, a place in ``policy``: entries there stand for several tables."""
    found = re.fullmatch(r"tables\[(\d+)\](?:\.rows\[(\d+)\])?(?:\.choices\[(\d+)\])?(.*)", path)
    if found is None:
        return path
    table = policy.tables[int(found[1])]
    entries = raw["tables"][table.site]
    entry = f"tables.{table.site}[{next(at for at, entry in enumerate(entries) if _stands_for(entry['for'], table))}]"
    if found[2] is None:
        return entry
    rows = table.rows[: int(found[2])]
    return f"{entry}.choices[{sum(len(row.choices) for row in rows) + int(found[3] or 0)}]"


def _stands_for(keys: Mapping[str, Any], table: Table) -> bool:
    return (
        keys.get("engine", Engine.SGLANG) == table.engine
        and table.model in keys["models"]
        and table.layer in keys["layers"]
        and (table.h_q in keys["heads"] if keys.get("heads") else table.h_q is None)
    )
