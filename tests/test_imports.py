"""What a serving process loads, and which part of the project may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mla_tune"

SERVING_PACKAGES = {"mla_tune", "yaml", "_yaml", "cython_runtime", "msgspec", "typing_extensions"}
"""Beyond the standard library. PyYAML's parser is made by Cython, whose runtime shows up as modules of its own
(``_cython_<version>`` too); msgspec loads typing_extensions where that is installed."""
SERVING_MODULES = {
    "mla_tune",
    *(f"mla_tune.{name}" for name in ("errors", "files", "lookup", "policy", "runtime", "threshold")),
    *(f"mla_tune.{name}" for name in ("policy_evidence", "policy_kernels", "policy_rules", "policy_text")),
    *(f"mla_tune.{name}" for name in ("site", "provider", "engine", "sku", "gpu")),
    *(f"mla_tune.{name}" for name in ("packaged", "pins", "switches", "builds")),
}
SERVICE_MODULES = {f"mla_tune.{name}" for name in ("serving", "ranks", "counters", "recording", "traffic")}

WORDS = {"engine", "errors", "files", "launch", "provider", "site", "shape", "sku", "stages", "datasheet"}
"""Modules of plain values: standard library and msgspec only, and importable by every part that does not serve."""
POLICY = {"policy", "policy_evidence", "policy_kernels", "policy_rules", "policy_text", "policy_yaml"}
SWITCHING = {"switches", "pins", "builds"}
SERVICE = {"runtime", "serving", "ranks", "counters", "switches"}
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "launch": {"errors"},
    "provider": set(),
    "site": {"errors", "provider"},
    "engine": {"site"},
    "shape": {"errors", "site"},
    "sku": {"errors"},
    "stages": {"errors", "provider", "site"},
    "datasheet": {"errors"},
    "policy": {"engine", "site", "sku", "shape", "errors", "files"} | POLICY,
    "threshold": set(),
    "policy_evidence": POLICY,
    "policy_rules": {"engine", "provider", "site", "errors", "threshold"} | POLICY,
    "policy_kernels": {"errors", "launch"},
    "policy_text": {"errors"},
    "policy_yaml": {"errors", "policy_text"},
    "lookup": {"engine", "policy", "site", "errors", "threshold"},
    "gpu": {"sku", "errors"},
    "packaged": {"errors", "provider"},
    "switches": {"site", "errors"},
    "pins": {"lookup", "policy", "errors"},
    "builds": {"gpu", "policy"},
    "runtime": {"engine", "lookup", "policy_kernels", "launch", "packaged", "gpu", "errors", "files"}
    | {"policy", "provider", "site", "sku", "shape"}
    | SWITCHING,
    "traffic": {"errors", "files"},
    "recording": {"traffic"},
    "counters": set(),
    "serving": {"engine", "runtime", "counters", "recording", "site", "switches"},
    "ranks": {"runtime", "switches", "errors"},
    "kernels": WORDS,
    "bench": {"sku", "errors", "files"},
    "store": WORDS,
    "sweep": {"kernels", "bench", "store"} | WORDS,
    "learn": {"store", "lookup", "threshold", "traffic"} | POLICY | WORDS,
    "replay": {"store", "lookup", "learn"} | POLICY | WORDS,
    "report": {"store", "lookup", "learn"} | POLICY | WORDS,
    "integrations": {"engine", "policy", "provider", "errors", "site"} | SERVICE,
}
"""What each part may import of the others; ``cli`` and ``__main__`` may import everything, inside their commands."""
ANYTHING = {"cli", "__main__"}


def part_of(module: str) -> str:
    """``mla_tune.kernels.inputs`` -> ``kernels``; empty for the package itself."""
    return module.removeprefix("mla_tune").removeprefix(".").split(".")[0]


def imports(tree: ast.Module) -> Iterator[str]:
    """Modules of this project that a file names in any import statement, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "mla_tune")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "mla_tune":
                yield from (f"mla_tune.{alias.name}" for alias in node.names if alias.name != "__version__")
            elif node.module is not None and node.module.startswith("mla_tune."):
                yield node.module


def files() -> list[Path]:
    """Every source file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_the_layers_below_it(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in ANYTHING:
        return
    allowed = {part} if part == "__init__" else {part, *LAYERS[part]}
    assert {part_of(module) for module in imports(ast.parse(path.read_text()))} <= allowed


def test_no_layer_reaches_itself_through_others() -> None:
    def reachable(part: str, seen: frozenset[str]) -> set[str]:
        below = LAYERS[part] - POLICY - seen if part in POLICY else LAYERS[part] - seen
        return below | {further for name in below for further in reachable(name, seen | below)}

    assert [part for part in LAYERS if part in reachable(part, frozenset())] == []


def loaded_by(statement: str) -> set[str]:
    """Modules that are loaded after ``statement`` in a fresh interpreter and not before it."""
    script = f"import sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import mla_tune.runtime",
        "from mla_tune.runtime import Dispatcher; Dispatcher.for_this_gpu(fallback='incumbent').resolve("
        "'prefill_attention', model='deepseek-v4-pro', layer='forward').choose(8192, 1 << 20, 4)",
        "from mla_tune.runtime import Dispatcher; from mla_tune.serving import Service; from mla_tune.ranks import agree; "
        "Service(agree(Dispatcher.for_this_gpu(fallback='incumbent'))).prometheus_text()",
    ],
    ids=["import", "serve", "service"],
)
def test_serving_loads_the_standard_library_yaml_and_msgspec_only(statement: str) -> None:
    loaded = loaded_by(statement)
    top = {name.split(".")[0] for name in loaded if not name.startswith("_cython_")}
    assert top - set(sys.stdlib_module_names) <= SERVING_PACKAGES
    ours = SERVING_MODULES | (SERVICE_MODULES if "serving" in statement else set())
    assert {name for name in loaded if part_of(name) and name.startswith("mla_tune")} <= ours


def test_importing_the_package_loads_nothing_else() -> None:
    assert loaded_by("import mla_tune") == {"mla_tune"}
