"""The built wheel works without the source tree, and carries registry.yaml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel's contents, as pip installs them."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", target, ROOT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run(installed: Path, directory: Path, *arguments: str) -> str:
    """Run Python on the installed files, away from the source tree."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "ZOO_PLUGINS": ""}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_registry_is_inside(installed: Path, tmp_path: Path) -> None:
    """Guards the wheel: its own copy of registry.yaml, and no file that belongs to the source tree alone."""
    where = run(installed, tmp_path, "-c", "import zoo; print(zoo.__file__)")
    assert Path(where.strip()).parent == installed / "zoo"
    assert (installed / "zoo" / "registry.yaml").read_bytes() == (ROOT / "registry.yaml").read_bytes()
    assert "1,557,611,200" in run(installed, tmp_path, "-m", "zoo", "show", "gpt2-xl")
    assert not (installed / "tests").exists()
    assert "mine/pyproject.toml" in run(installed, tmp_path, *"-m zoo plugins new logger mine --out mine".split())
