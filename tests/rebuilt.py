"""Which committed policies the fit, as it stands, has already rebuilt from their measurements.

A whole refit takes long, and gives the same bytes as long as nothing that goes into it has changed. ``rebuilt.sha256``
holds one digest per policy over all of that: the measurements, the policy itself, and the meaning of the source files that
a fit runs through (comments and docstrings are left out). The short run refits a policy only where its digest differs;
``--all`` refits every one. After a change to the fit or to an export, ``python -m tests.rebuilt`` refits them all and
writes the digests, if each policy came out byte for byte.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAMPS = Path(__file__).with_name("rebuilt.sha256")


def skip_if_rebuilt(policy: Path, export: Path, *, everything: bool) -> None:
    """Skip the refit of an unchanged policy, with the reason; not with ``--all``."""
    if not everything and stamps().get(policy.name) == digest(policy, export):
        pytest.skip("neither the measurements nor the fit changed since this policy was rebuilt; --all rebuilds it")


def stamps() -> dict[str, str]:
    """The recorded digest of every policy, by its file name."""
    lines = STAMPS.read_text().splitlines() if STAMPS.is_file() else []
    return {name: value for value, name in (line.split("  ") for line in lines)}


def digest(policy: Path, export: Path, package: Path = ROOT / "mla_tune") -> str:
    """A digest of all that a rebuild of ``policy`` from ``export`` reads, and of what it has to give."""
    results = sorted(policy.parent.glob(f"{policy.stem}.*")) if policy.exists() else []
    whole = hashlib.sha256(fit_digest(package).encode())
    for path in (export, *(path for path in results if path.suffixes == policy.suffixes or path.suffix != ".yaml")):
        whole.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return whole.hexdigest()


@cache
def fit_digest(package: Path) -> str:
    """A digest of what the fit's source files say, whatever their comments and docstrings."""
    whole = hashlib.sha256()
    for path in fit_sources(package):
        whole.update(f"{path.relative_to(package)} {meaning(path.read_text())}\n".encode())
    return whole.hexdigest()


def fit_sources(package: Path) -> list[Path]:
    """The package's ``fit``, all that it imports, and the commands that call it."""
    found: set[Path] = set()
    ahead = list((package / "fit").rglob("*.py"))
    while ahead:
        path = ahead.pop()
        if path not in found:
            found.add(path)
            ahead += _imported(path, package)
    fit = package / "fit"
    commands = [
        path for path in (package / "cli").rglob("*.py") if any(fit in p.parents for p in _imported(path, package))
    ]
    return sorted({*found, *commands})


def _imported(path: Path, package: Path) -> Iterator[Path]:
    """Files of the package that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == package.name:
                places = (package.joinpath(*parts[1:]) / "__init__.py", package.joinpath(*parts[1:]).with_suffix(".py"))
                yield from (place for place in places if place.is_file())


def meaning(source: str) -> str:
    """What a source file says: its syntax tree without docstrings, written alike by every version of Python."""
    return _written(ast.parse(source))


def _written(node: object) -> str:
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({', '.join(f'{name}={_written(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{', '.join(_written(entry) for entry in node if not _is_text(entry))}]"
    return repr(node)


def _is_text(node: object) -> bool:
    """Whether a statement is a string alone, such as a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def main() -> int:
    """Rebuild every committed policy, and record the digests if all came out as they are.

    With ``--made``, right after ``scripts/refit-policies`` made them, the digests alone.
    """
    from tests.test_artefacts import rebuilds

    code = 0
    if sys.argv[1:] != ["--made"]:
        code = int(pytest.main(["--all", str(ROOT / "tests" / "test_artefacts.py"), "-k", "rebuilt_byte_for_byte"]))
    if code == 0:
        STAMPS.write_text("".join(f"{digest(policy, export)}  {policy.name}\n" for policy, export in rebuilds()))
    return code


if __name__ == "__main__":
    sys.exit(main())
