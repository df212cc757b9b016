"""The FlashAttention plugin: listed with reasons, refused with them, and its own tests on the real Python package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import reference
from tests.plugin_environment import Environment

PLUGIN = Path(__file__).parents[2] / "plugins" / "zoo-flash-attn"
PACKAGE = "flash-attn==2.8.3.post2"
NOT_INSTALLED = "needs flash-attn>=2.8,<3 (not installed)"
NO_GPU = "needs cuda with compute capability 8.0 or newer (no such device on this machine)"
FIX = 'python -m pip install --no-build-isolation "flash-attn>=2.8,<3"'
UNREACHABLE = ("No matching distribution found", "Connection", "NewConnectionError", "Timeout", "name resolution")
"""What pip says where there is no index."""

HAS_KERNELS = find_spec("flash_attn_2_cuda") is not None


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("environment"))
    environment.install(PLUGIN)
    return environment


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny GPT-2 that `transformers` wrote, with a tokenizer that has one token per byte."""
    config = {"n_embd": 48, "n_head": 6, "n_layer": 1, "vocab_size": 258, "n_positions": 64}
    reference.save_tiny(tmp_path, "gpt2", config | {"bos_token_id": 256, "eos_token_id": 257})
    reference.save_byte_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed here")
def test_it_is_listed_and_refused(environment: Environment, model: Path) -> None:
    """Guards against an installation that compiles, a bare ImportError, and another backend in its place."""
    flash = {row["name"]: row for row in environment.zoo_json("list", "attention")}["flash"]
    assert (flash["state"], flash["origin"]) == ("unavailable", "zoo-flash-attn 0.1.0")
    assert flash["reasons"][0] == NOT_INSTALLED and flash["reasons"][1:] in ([NO_GPU], [])
    assert FIX in flash["fix"]
    (row,) = [line for line in environment.zoo("list", "attention").stdout.splitlines() if line.startswith("flash ")]
    assert NOT_INSTALLED in row and FIX in row
    refused = environment.zoo("generate", model, "--prompt", "Once", "--attention", "flash", exit_code=3)
    assert "attention 'flash' is unavailable: needs flash-attn" in refused.stderr and FIX in refused.stderr
    assert refused.stdout == "" and "Traceback" not in refused.stderr
    chosen = environment.zoo("generate", model, "--prompt", "Once", "--max-new-tokens", "4", "--stats")
    assert "flash" not in chosen.stderr + chosen.stdout


@pytest.mark.timeout(900)
def test_its_own_tests(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the backend on FlashAttention's real Python package: with its kernels on a GPU, with a stand-in here."""
    if not HAS_KERNELS:
        _install_without_kernels(environment, monkeypatch)
        flash = {row["name"]: row for row in environment.zoo_json("list", "attention", "--probe")}["flash"]
        assert flash["state"] == "unavailable" and NOT_INSTALLED not in flash["reasons"]
    ran = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "pythonpath=", PLUGIN / "tests")
    assert " passed" in ran.stdout and "skipped" not in ran.stdout
    tier = "and its kernels on" if HAS_KERNELS else "2.8.3.post2, the real package, on a CPU stand-in for its kernels"
    assert tier in ran.stdout
    where = environment.run("-c", "import zoo_flash_attn; print(zoo_flash_attn.__file__)").stdout
    assert Path(where).is_relative_to(environment.directory)


def _install_without_kernels(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package as its source distribution has it, and not into pip's cache: it would be taken for a whole one."""
    monkeypatch.setenv("FLASH_ATTENTION_SKIP_CUDA_BUILD", "TRUE")
    monkeypatch.setenv("FLASH_ATTENTION_FORCE_BUILD", "TRUE")  # or its setup looks for a wheel with kernels
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1", "--timeout", "30")
    try:
        environment.run(*pip, "setuptools", "wheel", "einops")
        environment.run(*pip, "--no-build-isolation", "--no-cache-dir", PACKAGE)
    except AssertionError as error:
        if any(sign in str(error) for sign in UNREACHABLE):
            pytest.skip(f"no package index can be reached, which has {PACKAGE}")
        raise
