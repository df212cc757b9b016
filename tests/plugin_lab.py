"""Real little distributions on the path, and the command line run beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import pytest
from click.testing import CliRunner, Result

from zoo.cli.app import App
from zoo.cli.main import cli
from zoo.plugins import Plugin, Zoo

HEADER = "from zoo.hooks import hookimpl\n"
KERNEL = "class Kernel:\n    pass\n"
"""What the components of these plugins point to, in ``PACKAGE.kernel``."""
HEALTHY = """
@hookimpl
def zoo_register_attention(register):
    register("healthy-attention", "healthy.kernel:Kernel", help="works")
"""


@dataclass
class PluginLab:
    """A directory of distributions, each a package and its ``dist-info``, as an installer leaves them."""

    root: Path
    packages: set[str] = field(default_factory=set)

    def install(
        self,
        name: str,
        plugin: str = "",
        *,
        version: str = "1.0",
        files: Mapping[str, str] | None = None,
        entry_points: str | None = None,
        metadata: str | None = None,
    ) -> None:
        """Write a distribution whose entry point is the module ``PACKAGE.plugin``.

        Args:
            plugin: source of that module; ``hookimpl`` is there.
            files: others, by path from the root.
            entry_points: content of ``entry_points.txt``, by default one that names ``PACKAGE.plugin``.
            metadata: content of ``METADATA``; empty for none.
        """
        package = name.replace("-", "_")
        self.packages.add(package)
        if entry_points is None:
            entry_points = f"[zoo.plugins]\n{name} = {package}.plugin\n"
        if metadata is None:
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        info = f"{package}-{version}.dist-info"
        written = {
            f"{package}/__init__.py": "",
            f"{package}/plugin.py": HEADER + dedent(plugin),
            f"{package}/kernel.py": KERNEL,
            f"{info}/entry_points.txt": entry_points,
            **({f"{info}/METADATA": metadata} if metadata else {}),
            **(files or {}),
        }
        for path, text in written.items():
            self.packages.add(path.partition("/")[0].removesuffix(".py"))
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_text(text, encoding="utf-8")

    def install_healthy(self) -> None:
        """A plugin with nothing wrong, to see that it stays so beside others."""
        self.install("healthy", HEALTHY)

    def zoo(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """``python -m zoo`` in a process of its own, with these distributions on its path."""
        return run_python("-m", "zoo", *arguments, PYTHONPATH=str(self.root), **environment)


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """This Python in a process of its own, without the caller's zoo settings."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("ZOO_", "PYTHON", "COV"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@contextmanager
def lab_on_path(root: Path) -> Iterator[PluginLab]:
    """A lab whose distributions this process finds, until the block ends."""
    lab = PluginLab(root)
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        for name in ("ZOO_PLUGINS", "ZOO_REGISTRY"):
            patch.delenv(name, raising=False)
        patch.setattr(sys, "dont_write_bytecode", True)
        try:
            yield lab
        finally:
            for module in set(sys.modules) - before:
                if module.partition(".")[0] in lab.packages:
                    del sys.modules[module]


def run_inside(built: Zoo, *arguments: str) -> Result:
    """Run a command in this process on a registry that is built already."""
    app = App()
    app.__dict__["zoo"] = built
    return CliRunner().invoke(cli, list(arguments), obj=app, catch_exceptions=True)


def plugin_of(built: Zoo, name: str) -> Plugin:
    """The record of one plugin."""
    return next(plugin for plugin in built.plugins if plugin.name == name)
