"""What a command imports, seen in the ``sys.modules`` of a process of its own. Seconds of start-up are at stake."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.plugin_lab import run_python
from tests.reference import save_tiny_chat_model
from zoo.commands import COMMANDS

HEAVY = {
    "gguf",
    "huggingface_hub",
    "jinja2",
    "lightning",
    "numpy",
    "peft",
    "pydantic",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
}
TRAINING = {"lightning", "lightning_fabric", "peft", "pydantic", "pytorch_lightning", "transformers"}
"""What using a model must not import."""

TELL_MODULES = """
import atexit, sys
def tell(path=sys.argv[1]):
    with open(path, "w") as file:
        file.write(" ".join(sys.modules))
atexit.register(tell)
"""
"""Writes the modules that are imported at the end of the process to the file that its first argument names."""
AS_COMMAND_LINE = f"""{TELL_MODULES}
import runpy
sys.argv[:] = ["zoo", *sys.argv[2:]]
runpy.run_module("zoo", run_name="__main__", alter_sys=True)
"""
"""As ``python -m zoo``."""
EVERY_HELP = """
from zoo.cli.main import cli
from zoo.commands import COMMANDS
for name in COMMANDS:
    cli.main([name, "--help"], prog_name="zoo", standalone_mode=False)
"""
USE_A_MODEL = """
import zoo
lm = zoo.load({path!r}, device="cpu")
print(len(lm.generate("Once", max_new_tokens=4, temperature=0)))
print(len(lm.chat([{{"role": "user", "content": "Hi"}}], max_new_tokens=4, temperature=0)))
"""


class Imported:
    """The modules of a finished process, and their top-level packages."""

    def __init__(self, finished: subprocess.CompletedProcess[str], told: Path) -> None:
        assert finished.returncode == 0, finished.stderr
        self.modules = set(told.read_text(encoding="utf-8").split())
        self.packages = {name.partition(".")[0] for name in self.modules}
        self.output = finished.stdout
        assert {"sys", "zoo"} <= self.packages


def command_line(tmp_path: Path, *arguments: str) -> Imported:
    told = tmp_path / "modules"
    return Imported(run_python("-c", AS_COMMAND_LINE, str(told), *arguments, ZOO_PLUGINS=""), told)


def script(tmp_path: Path, source: str) -> Imported:
    told = tmp_path / "modules"
    return Imported(run_python("-c", TELL_MODULES + source, str(told), ZOO_PLUGINS="", HF_HUB_OFFLINE="1"), told)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory that can chat."""
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_chat_model(directory)
    return directory


LISTING = [
    "list",
    "list models",
    "list attention --json",
    "show gpt2",
    "show attention sdpa",
    "plugins list",
    "download",
    "generate --help",
]


@pytest.mark.parametrize("arguments", LISTING)
def test_listing_imports_nothing_heavy(arguments: str, tmp_path: Path) -> None:
    """Guards against a command about names that waits for seconds while torch is imported."""
    imported = command_line(tmp_path, *arguments.split())
    assert imported.output
    assert not imported.packages & HEAVY


def test_help_imports_no_command(tmp_path: Path) -> None:
    """Guards against ``--help`` that imports every command to print its first line, or reads the registry."""
    imported = command_line(tmp_path, "--help")
    assert all(name in imported.output for name in COMMANDS)
    assert not imported.packages & {*HEAVY, "ruamel", "packaging"}
    assert {name for name in imported.modules if name.startswith("zoo.cli.")} == {"zoo.cli.app", "zoo.cli.main"}
    assert "importlib.metadata" not in imported.modules


def test_the_help_of_every_command_imports_nothing_heavy(tmp_path: Path) -> None:
    """Guards against a new command that imports torch at the top of its file."""
    imported = script(tmp_path, EVERY_HELP)
    assert {target.partition(":")[0] for target, _ in COMMANDS.values()} <= imported.modules
    assert not imported.packages & {*HEAVY, "ruamel"}


def test_import_zoo_imports_nothing_heavy(tmp_path: Path) -> None:
    """Guards against names that ``zoo/__init__.py`` exports eagerly."""
    imported = script(tmp_path, "import zoo\nzoo.load_zoo, zoo.ModelSpec")
    assert not imported.packages & {*HEAVY, "ruamel"}
    assert "zoo.api" not in imported.modules


def test_generate_imports_neither_trainer_nor_reference(tiny: Path, tmp_path: Path) -> None:
    """Guards against Lightning (5 s) or transformers creeping into inference."""
    arguments = ["generate", str(tiny), "--prompt", "Once", "--max-new-tokens", "4", "--device", "cpu", "--stats"]
    imported = command_line(tmp_path, *arguments)
    assert imported.output.startswith("Once")
    assert "torch" in imported.packages
    assert not imported.packages & TRAINING


def test_the_python_api_imports_neither_trainer_nor_reference(tiny: Path, tmp_path: Path) -> None:
    """Guards against the same by way of ``zoo.load``, ``generate`` and ``chat``."""
    imported = script(tmp_path, USE_A_MODEL.format(path=str(tiny)))
    assert len(imported.output.split()) == 2
    assert "torch" in imported.packages
    assert not imported.packages & TRAINING
