"""What a serving process loads, and which part of the project may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mla_tune"

SERVING_PACKAGES = {"mla_tune", "yaml", "_yaml", "cython_runtime", "msgspec", "typing_extensions"}
"""Beyond the standard library. PyYAML's parser is made by Cython, whose runtime shows up as modules of its own
(``_cython_<version>`` too); msgspec loads typing_extensions where that is installed."""
SERVING_MODULES = {
    *("mla_tune", "mla_tune.errors", "mla_tune.files", "mla_tune.notice"),
    *(
        "mla_tune.sites",
        *(f"mla_tune.sites.{name}" for name in ("site", "provider", "engines", "candidates", "stages")),
    ),
    *("mla_tune.hardware", *(f"mla_tune.hardware.{name}" for name in ("sku", "nvml", "driver", "builds", "digests"))),
    "mla_tune.policy",
    *(
        f"mla_tune.policy.{name}"
        for name in ("schema", "codec", "file_form", "strict_yaml", "kernel_config", "rules", "threshold")
    ),
    *(f"mla_tune.policy.{name}" for name in ("search", "decision")),
    "mla_tune.runtime",
    *(f"mla_tune.runtime.{name}" for name in ("dispatcher", "pins", "switches", "serving", "compatibility")),
}
SERVICE_MODULES = {f"mla_tune.runtime.{name}" for name in ("decider", "ranks", "counters", "recording")} | {
    "mla_tune.sites.served_shapes"
}

VALUES = {"errors", "files", "notice", "sites", "hardware"}
"""Plain values: standard library and msgspec only, and importable by every part."""
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "notice": set(),
    "hardware": {"errors", "notice"},
    "sites": {"errors", "files", "hardware"},
    "policy": VALUES,
    "runtime": {"policy"} | VALUES,
    "kernels": {"sites", "errors", "hardware"},
    "bench": {"hardware", "errors", "files", "notice"},
    "store": VALUES,
    "sweep": {"kernels", "bench", "store"} | VALUES,
    "fit": {"store", "policy"} | VALUES,
    "replay": {"store", "fit", "policy"} | VALUES,
    "report": {"replay", "store", "fit", "policy"} | VALUES,
    "trace": {"errors"},
    "integrations": {"runtime", "policy", "errors", "sites"},
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
                yield from (f"{node.module}.{alias.name}" for alias in node.names)  # a module of it, or a name in it


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
        below = LAYERS[part] - seen
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
        "from mla_tune.runtime import Dispatcher; from mla_tune.runtime.decider import Service; "
        "from mla_tune.runtime.ranks import agree; "
        "Service(agree(Dispatcher.for_this_gpu(fallback='incumbent'))).prometheus_text()",
    ],
    ids=["import", "serve", "service"],
)
def test_serving_loads_the_standard_library_yaml_and_msgspec_only(statement: str) -> None:
    loaded = loaded_by(statement)
    top = {name.split(".")[0] for name in loaded if not name.startswith("_cython_")}
    assert top - set(sys.stdlib_module_names) <= SERVING_PACKAGES
    ours = SERVING_MODULES | (SERVICE_MODULES if "decider" in statement else set())
    assert {name for name in loaded if part_of(name) and name.startswith("mla_tune")} <= ours


def test_importing_the_package_loads_nothing_else() -> None:
    assert loaded_by("import mla_tune") == {"mla_tune"}


def test_no_two_modules_share_a_name() -> None:
    names = [path.stem for path in files() if path.stem not in ("__init__", "__main__")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_no_two_public_classes_share_a_name() -> None:
    trees = [ast.parse(path.read_text()) for path in files()]
    names = [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert sorted({name for name in names if names.count(name) > 1 and not name.startswith("_")}) == []


def test_no_modules_import_each_other_at_the_top_or_inside_a_function() -> None:
    names = {".".join(("mla_tune", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in files()}
    graph = {name: set(imports(ast.parse(path.read_text()))) & set(names) - {name} for name, path in names.items()}
    assert tuple(TopologicalSorter(graph).static_order())
