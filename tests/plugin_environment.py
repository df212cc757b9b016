"""A new virtual environment for the tests of example plugins: it sees the packages of this one, and gets the plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import zoo


class Environment:
    """A virtual environment that sees the packages of the one that runs the tests."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # pip comes from this environment too, where it has one
        venv.create(directory / "venv", symlinks=os.name != "nt", with_pip=not any(distributions(name="pip")))
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.python = directory / "venv" / scripts / "python"
        site_packages = self.run("-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").stdout.strip()
        visible = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        lines = [f"import site; site.addsitedir({path!r})\n" for path in visible]
        tested = str(Path(zoo.__file__).parents[1])  # an editable install may be of another working tree
        lines.append(f"import sys; sys.path.insert(0, {tested!r})\n")
        (Path(site_packages) / "visible.pth").write_text("".join(lines), encoding="utf-8")

    def run(self, *arguments: str | Path, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the environment's interpreter, away from the source tree."""
        hidden = ("PYTHONPATH", "PYTHONHOME", "ZOO_PLUGINS", "ZOO_REGISTRY", "ZOO_CHECKPOINTS")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        ran = subprocess.run(
            [self.python, *arguments],
            cwd=self.directory,
            env=environment | {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == exit_code, f"{arguments}:\n{ran.stdout}\n{ran.stderr}"
        return ran

    def zoo(self, *arguments: str | Path, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return self.run("-m", "zoo", *arguments, exit_code=exit_code)

    def zoo_json(self, *arguments: str | Path) -> Any:
        """What a command prints with ``--json``."""
        return json.loads(self.zoo(*arguments, "--json").stdout)

    def install(self, plugin: Path) -> None:
        """The distribution in a directory, as pip installs it, and nothing that it depends on."""
        self.run("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", plugin)

    def uninstall(self, distribution: str) -> None:
        """As pip does."""
        self.run("-m", "pip", "uninstall", "--yes", "--quiet", distribution)

    def check_its_own_tests_pass(self, plugin: Path, package: str) -> None:
        """The installed package is tested, not the source tree: nothing is put on the path."""
        ran = self.run("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-o", "pythonpath=", plugin / "tests")
        skipped = [line for line in ran.stdout.splitlines() if line.startswith("SKIPPED")]
        assert " passed" in ran.stdout and all("no GPU" in line for line in skipped), ran.stdout
        where = self.run("-c", f"import {package}; print({package}.__file__)").stdout
        assert Path(where).is_relative_to(self.directory)
