"""What the guides show is true: code is in the files that they name, commands print what they say, messages exist.

A fenced block with ``title="PATH"`` is an excerpt if PATH lies in this repository, and otherwise a file that the reader
writes. Blocks called ``console`` are run, in order, where those files are. ``...`` stands for anything.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "plugins" / "zoo-example-family"
GUIDES = ["adapters.md", "adding-a-model.md", "data.md", "writing-a-plugin.md", "writing-an-adapter.md"]
INSTALL = "python -m pip install -e "
NOT_RUN = (INSTALL, "python -m pytest ")
"""Commands of the guides that need more than a moment; tests/e2e/test_example_plugin.py and its siblings run them."""

_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)

every_guide = pytest.mark.parametrize("guide", GUIDES)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    title: str
    text: str


def read(guide: str) -> str:
    return (ROOT / "docs" / guide).read_text(encoding="utf-8")


def blocks(guide: str) -> list[Block]:
    return [Block(*match.groups("")) for match in _FENCE.finditer(read(guide))]


def in_repository(title: str) -> bool:
    return (ROOT / title.partition("/")[0]).exists()


def fake_install(source: Path, environment: Path) -> None:
    """Make the distribution in ``source`` look installed, as far as plugins are concerned."""
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = environment / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    points = "".join(f"{name} = {value}\n" for name, value in project["entry-points"]["zoo.plugins"].items())
    (info / "entry_points.txt").write_text(f"[zoo.plugins]\n{points}", encoding="utf-8")


def prepare(guide: str, directory: Path) -> dict[str, str]:
    """Write the reader's files and install what is to be installed; returns the environment variables."""
    for block in blocks(guide):
        if block.title and not in_repository(block.title):
            path = directory / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
    plugins = [path for path in (ROOT / "plugins").iterdir() if path.name in read(guide)]
    sources = [*plugins, *(path.parent for path in directory.glob("*/pyproject.toml"))]
    for source in sources:
        fake_install(source, directory / "installed")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ZOO_")}
    visible = os.pathsep.join(map(str, (directory / "installed", *sources, ROOT)))
    return kept | {"PYTHONPATH": visible, "HF_HUB_OFFLINE": "1"}


def console_steps(guide: str) -> list[tuple[str, list[str]]]:
    """Each command with the lines that it is said to print."""
    steps: list[tuple[str, list[str]]] = []
    for block in blocks(guide):
        for line in block.text.splitlines() if block.language == "console" else []:
            if line.startswith("$ "):
                steps.append((line[2:], []))
            else:
                steps[-1][1].append(line)
    return steps


def pattern_of(lines: list[str]) -> str:
    """A pattern for the lines; runs of spaces are as long as they need to be."""
    parts = []
    for line in lines:
        words = r"\s+".join(re.escape(word).replace(r"\.\.\.", ".*") for word in line.split())
        parts.append(r"(?:.*\n)*?" if line.strip() == "..." else rf"\s*{words}\s*\n")
    return "".join(parts)


@every_guide
def test_code_is_in_the_file_that_it_is_said_to_be_in(guide: str) -> None:
    excerpts = [block for block in blocks(guide) if block.title and in_repository(block.title)]
    for block in excerpts:
        assert block.text in (ROOT / block.title).read_text(encoding="utf-8"), block.text
    assert all(block.title or block.language in ("console", "text") for block in blocks(guide))
    assert read(guide).count("```") == 2 * len(blocks(guide))


@pytest.mark.parametrize(
    ("guide", "plugin"), [("adding-a-model.md", "zoo-example-family"), ("writing-an-adapter.md", "zoo-example-adapter")]
)
def test_the_walk_through_the_example_leaves_no_file_out(guide: str, plugin: str) -> None:
    named = {block.title for block in blocks(guide)}
    files = [path for path in (ROOT / "plugins" / plugin).rglob("*") if path.suffix in (".py", ".toml", ".yaml")]
    assert {path.relative_to(ROOT).as_posix() for path in files} <= named


@every_guide
@pytest.mark.skipif(
    shutil.which("sh") is None or shutil.which("sed") is None, reason="the examples are for a Unix shell"
)
def test_commands_print_what_they_are_said_to_print(guide: str, tmp_path: Path) -> None:
    environment = prepare(guide, tmp_path)
    ran = 0
    for command, expected in console_steps(guide):
        if command.startswith(NOT_RUN):
            assert not expected
            made = tmp_path / command.removeprefix(INSTALL)
            if command.startswith(INSTALL) and made.is_dir() and str(made) not in environment["PYTHONPATH"]:
                fake_install(made, tmp_path / "installed")  # what an earlier command of the guide has written
                environment["PYTHONPATH"] += f"{os.pathsep}{made}"
            continue
        script = f'python() {{ "{sys.executable}" "$@"; }}\n{command}'
        done = subprocess.run(
            ["sh", "-c", script],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert re.fullmatch(pattern_of(expected), done.stdout), f"$ {command}\n{done.stdout}\nnot:\n{expected}"
        ran += 1
    assert ran >= {"adapters.md": 1, "data.md": 8, "writing-an-adapter.md": 4, "writing-a-plugin.md": 12}.get(guide, 7)
