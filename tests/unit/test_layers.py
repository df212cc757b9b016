"""Imports point down, and nothing grows out of hand. Every import statement counts, also those inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "zoo"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "spec", "commands"),
    ("registry", "registrar", "hooks", "plan"),
    ("models",),
    ("attention", "adapters", "precision", "families"),
    ("builtin", "plugins"),
    ("text", "sources", "convert", "data", "store"),
    ("train", "generate"),
    ("testing", "adapting", "language_model", "merging", "api"),
    ("runs",),
    ("cli",),
)
"""From the bottom up: each may import those before it. A name is a module or a package of zoo, there or to come."""

SIBLINGS = {
    ("spec", "errors"),
    ("registrar", "registry"),
    ("hooks", "registrar"),
    ("language_model", "adapting"),
    ("merging", "adapting"),
    ("api", "adapting"),
    ("api", "language_model"),
    ("convert", "text"),
    ("data", "text"),
    ("data", "sources"),
    ("convert", "sources"),  # the record of where a model came from, which both write
}
"""What may be imported from the same layer, other than from the same package. Never both ways."""

FRONT = {"__init__": {"adapting", "api", "language_model", "plugins", "spec", "store"}, "__main__": {"cli"}}
"""The package's own two files are in no layer: names that ``import zoo`` offers lazily, and ``python -m zoo``."""

NEVER = {"transformers", "peft", "loralib", "litgpt", "pytorch_lightning"}
ONLY_IN = {"lightning": {"train"}, "lightning_fabric": {"train"}}
NO_TORCH = {
    "commands",
    "errors",
    "spec",
    "registry",
    "registrar",
    "hooks",
    "plan",
    "builtin",
    "plugins",
    "__init__",
    "__main__",
}
NO_TORCH_ON_TOP = {"cli"}
"""Where a function may import torch, and the module may not."""
TORCH = {"torch", "numpy", "safetensors", "tokenizers", "gguf"}
"""torch, and what is as slow or imports it."""

MAX_FILE, MAX_FUNCTION = 400, 60


@dataclass(frozen=True)
class Import:
    """One imported module."""

    path: Path
    line: int
    module: str
    in_function: bool
    for_types_only: bool

    @property
    def unit(self) -> str:
        """The module or package of zoo that imports it, by its name in `LAYERS`."""
        return self.path.relative_to(ZOO).parts[0].removesuffix(".py")

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if not {".venv", "build", "dist"} & set(path.parts))


def imports_of(path: Path) -> list[Import]:
    return list(_walk(ast.parse(path.read_text(encoding="utf-8")), path))


def _walk(node: ast.AST, path: Path, in_function: bool = False, for_types: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for module in _modules(child, path):
            yield Import(path, getattr(child, "lineno", 0), module, in_function, for_types)
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        types_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from _walk(child, path, in_function or is_function, for_types or types_only)


def _modules(node: ast.AST, path: Path) -> list[str]:
    """Full names; of ``from zoo import hooks`` the module ``zoo.hooks``, where there is one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = path.relative_to(ROOT).parent.parts
        base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
    if base != "zoo":
        return [base]
    return [f"zoo.{alias.name}" if _is_unit(alias.name) else "zoo" for alias in node.names]


def _is_unit(name: str) -> bool:
    return (ZOO / f"{name}.py").exists() or (ZOO / name).is_dir()


IMPORTS = [found for path in sources(ZOO) for found in imports_of(path)]


def level(unit: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if unit in layer)


def is_allowed(found: Import) -> bool:
    """Whether an import of a module of zoo points down, or to a sibling that is listed."""
    target = found.module.split(".")[1] if "." in found.module else "__init__"
    if found.unit in FRONT:
        return target in FRONT[found.unit]
    if target == "__init__":  # its only content is the version
        return True
    if found.unit == target or (found.unit, target) in SIBLINGS:
        return True
    return level(target) < level(found.unit)


def test_every_module_has_a_layer() -> None:
    """Guards against a new module that no rule covers."""
    units = {path.relative_to(ZOO).parts[0].removesuffix(".py") for path in sources(ZOO)}
    known = {unit for layer in LAYERS for unit in layer}
    assert units - known == set(FRONT)
    assert len(known) == sum(map(len, LAYERS)), "a module is in one layer"


def test_imports_point_down() -> None:
    """Guards against a lower layer that knows a higher one: models their adapters, a converter the trainer."""
    inside = [found for found in IMPORTS if found.module.partition(".")[0] == "zoo"]
    assert len(inside) > 100, "the walk finds what is there"
    wrong = [str(found) for found in inside if not is_allowed(found)]
    assert not wrong, "\n".join(wrong)


def test_the_exceptions_are_needed() -> None:
    """Guards against a permission that outlives its use."""
    used = {(found.unit, found.module.split(".")[1]) for found in IMPORTS if found.module.startswith("zoo.")}
    assert used >= SIBLINGS
    assert not SIBLINGS & {(target, unit) for unit, target in SIBLINGS}
    assert used >= {(unit, target) for unit, targets in FRONT.items() for target in targets}


def test_import_zoo_imports_nothing_of_zoo() -> None:
    """Guards against ``zoo/__init__.py``, which every import runs, importing the layers above it."""
    eager = [str(i) for i in IMPORTS if i.unit == "__init__" and i.module.startswith("zoo") and not i.for_types_only]
    assert not eager


def test_external_packages_stay_where_they_belong() -> None:
    """Guards against Lightning outside of training, and the reference implementations anywhere in zoo."""
    wrong = []
    for found in IMPORTS:
        package = found.module.partition(".")[0]
        if package in NEVER or found.unit not in ONLY_IN.get(package, {found.unit}):
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_torch_stays_out_of_names_and_arithmetic() -> None:
    """Guards against torch where only names, specs and arithmetic are at home; types alone are no exception there."""
    wrong = []
    for found in IMPORTS:
        on_top = not (found.in_function or found.for_types_only)
        is_forbidden = found.unit in NO_TORCH or (found.unit in NO_TORCH_ON_TOP and on_top)
        if is_forbidden and found.module.partition(".")[0] in TORCH:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def written() -> list[Path]:
    """What zoo and its first-party plugins consist of."""
    return [*sources(ZOO), *sources(ROOT / "plugins")]


def test_no_file_is_too_long() -> None:
    """Guards against a module that has become several: split it by subject."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in written()}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_FILE} == {}


def test_no_function_is_too_long() -> None:
    """Guards against a function that does several things."""
    too_long = {}
    for path in written():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION:
                    too_long[f"{path.relative_to(ROOT)}:{node.name}"] = length
    assert too_long == {}


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("from zoo.cli.app import App", [("zoo.cli.app", False, False)]),
        ("import zoo.cli.app as a, torch.nn", [("zoo.cli.app", False, False), ("torch.nn", False, False)]),
        ("from zoo import hooks, __version__", [("zoo.hooks", False, False), ("zoo", False, False)]),
        ("def f():\n  if True:\n    import torch", [("torch", True, False)]),
        ("if TYPE_CHECKING:\n  from zoo.api import load", [("zoo.api", False, True)]),
        ("class A:\n  import torch", [("torch", False, False)]),
        ("try:\n  import torch\nexcept ImportError:\n  import peft", [("torch", False, False), ("peft", False, False)]),
        ("from ..api import load", [("zoo.api", False, False)]),
        ("from . import base", [("zoo.models", False, False)]),
    ],
)
def test_the_walk_sees_every_kind_of_import(statement: str, expected: list[tuple[str, bool, bool]]) -> None:
    """Guards against a law that an import can hide from."""
    found = _walk(ast.parse(statement), ZOO / "models" / "imagined.py")
    assert [(i.module, i.in_function, i.for_types_only) for i in found] == expected
