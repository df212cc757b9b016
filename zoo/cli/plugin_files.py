"""A new plugin from the templates beside this file: a package that registers one component, and whose tests pass."""

from __future__ import annotations

import re
from pathlib import Path

from zoo.errors import InputError, UnknownNameError
from zoo.hooks import API_VERSION
from zoo.registry import BUILT_IN, KINDS, Registry

TEMPLATES = Path(__file__).parent / "templates"
PLURALS = {plural: kind for kind, plural in KINDS.items()}
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def write_plugin(kind: str, name: str, directory: Path | None, registry: Registry) -> dict[str, Path]:
    """Write a distribution ``zoo-NAME`` that registers a component ``NAME``.

    Args:
        kind: of component, in the singular or the plural.
        directory: by default ``zoo-NAME``; it must not be there, or be empty.

    Returns:
        What was written, by its name in the distribution.

    Raises:
        UnknownNameError: there is no such kind, or no template for it.
        InputError: the name can not be a component's and a package's, or is taken; or the directory is.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    kind = PLURALS.get(kind, kind)
    known = sorted(path.name for path in TEMPLATES.iterdir() if path.is_dir())
    if kind not in known:
        raise UnknownNameError("kind of plugin", kind, known)
    _check_name(kind, name, registry)
    words = _words(kind, name)
    directory = directory or Path(words["distribution"])
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise InputError(f"{directory} is there already.", fix="Take another --out, or remove it.")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    written = {}
    for target, template in _files(kind, words).items():
        path = directory / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(environment.get_template(template).render(words).rstrip("\n") + "\n", encoding="utf-8")
        written[target] = path
    return written


def _check_name(kind: str, name: str, registry: Registry) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} is no name for a plugin.", fix="Use a-z, 0-9 and single dashes: my-kernel.")
    taken = {item.name for _, item in registry.items(kind) if item.origin.distribution == BUILT_IN}
    if name in taken or name == "auto":
        raise InputError(f"the {kind} {name!r} is zoo's own, and its name can not be taken.", fix="Take another.")


def _words(kind: str, name: str) -> dict[str, str]:
    module = name.replace("-", "_")
    return {
        "kind": kind,
        "plural": KINDS[kind],
        "name": name,
        "module": module,
        "camel": "".join(part.capitalize() for part in name.split("-")),
        "constant": module.upper(),
        "package": f"zoo_{module}",
        "help": f"The {kind} {name}.",
        "api": str(API_VERSION),
        "distribution": f"zoo-{name}",
    }


def _files(kind: str, words: dict[str, str]) -> dict[str, str]:
    """Templates by the files that are made of them."""
    package, module = words["package"], words["module"]
    files = {
        "pyproject.toml": "pyproject.toml.jinja",
        "README.md": "README.md.jinja",
        f"{package}/__init__.py": "__init__.py.jinja",
        f"{package}/{module}.py": f"{kind}/module.py.jinja",
        f"tests/test_{module}.py": "test.py.jinja",
    }
    if (TEMPLATES / kind / "options.py.jinja").is_file():
        files[f"{package}/options.py"] = f"{kind}/options.py.jinja"
    return files
