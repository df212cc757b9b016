"""What the files of an adapter do not say is given behind their path, and what is assumed is told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import zoo
from tests import reference
from zoo.api import load
from zoo.cli.main import cli
from zoo.cli.model_options import _named
from zoo.convert.adapter_directory import check_adapter
from zoo.convert.adapter_path import split_options
from zoo.errors import FileFormatError, InputError


@pytest.mark.parametrize(
    ("given", "path", "options"),
    [
        ("lora.pt", "lora.pt", {}),
        ("a,b/lora.pt", "a,b/lora.pt", {}),
        ("lora.pt,alpha=16", "lora.pt", {"alpha": 16}),
        ("a,b/c=d.pt,alpha=1.5,gate=linear", "a,b/c=d.pt", {"alpha": 1.5, "gate": "linear"}),
        ("l,enabled=[true, false,true],alpha=2", "l", {"enabled": [True, False, True], "alpha": 2}),
    ],
)
def test_splitting(given: str, path: str, options: dict[str, Any]) -> None:
    """Guards paths with commas, and lists with commas."""
    assert split_options(given) == (Path(path), options)


def test_a_path_that_looks_so(tmp_path: Path) -> None:
    (tmp_path / "run,alpha=2").mkdir()
    assert split_options(tmp_path / "run,alpha=2") == (tmp_path / "run,alpha=2", {})


@pytest.mark.parametrize(
    ("given", "says"),
    [("l,alpha=", "'' is no value for alpha"), ("l,a=[1", "no value for a"), ("l,a=1,a=2", "a twice")],
)
def test_what_is_no_option(given: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        split_options(given)


def test_on_the_command_line() -> None:
    """Guards names of adapters against options of them."""
    given = ("lora.pt,alpha=16", "mine=lora.pt,alpha=2", "dir/one,any_base=true", "plain")
    assert _named(given) == {
        "adapter-0": Path("lora.pt,alpha=16"),
        "mine": Path("lora.pt,alpha=2"),
        "adapter-2": Path("dir/one,any_base=true"),
        "adapter-3": Path("plain"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, and ``lora.pt`` for its queries in loralib's way."""
    folder = tmp_path_factory.mktemp("options")
    reference.save_tiny_chat_model(folder / "model")
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    generator = torch.Generator().manual_seed(1)
    state = {f"{name}.lora_A": torch.randn(2, 48, generator=generator) for name in names}
    torch.save(
        state | {f"{name}.lora_B": torch.randn(48, 2, generator=generator) for name in names}, folder / "lora.pt"
    )
    return folder


def test_alpha(folder: Path) -> None:
    """Guards the scaling: given, it is used, and told of when it is assumed."""
    options: dict[str, Any] = {"precision": "32-true", "device": "cpu"}
    check_adapter(folder / "lora.pt,alpha=16")
    with pytest.raises(FileFormatError, match="no adapter directory"):
        check_adapter(folder / "none.pt,alpha=16")
    silent, given = (
        load(folder / "model", adapters=[f"{folder}/lora.pt{more}"], **options) for more in ("", ",alpha=16")
    )
    assert [lm.adapters[0].adapter.options.alpha for lm in (silent, given)] == [1, 16]
    assert given.adapters[0].notes == []
    (note,) = silent.adapters[0].notes
    assert f"{folder}/lora.pt does not say its alpha: 1" in note and f"{folder}/lora.pt,alpha=16" in note
    ids = reference.tokens(1, 8)
    with torch.no_grad():
        assert not torch.equal(silent.model(ids), given.model(ids))
    kept = load(folder / "model", **options)
    assert kept.load_adapter(f"{folder}/lora.pt,alpha=16", alpha=3).adapter.options.alpha == 3


@pytest.mark.parametrize("command", ["generate", "merge"])
def test_it_is_told(command: str, folder: Path, tmp_path: Path) -> None:
    """Guards the commands: an assumed alpha is on standard error, a given one is not."""
    for path, is_told in ((f"{folder}/lora.pt", True), (f"{folder}/lora.pt,alpha=16", False)):
        out = tmp_path / f"out-{is_told}"
        arguments = {
            "generate": ["--prompt", "Hello", "--max-new-tokens", "2", "--adapter", path],
            "merge": [path, str(out)],
        }[command]
        ran = CliRunner().invoke(cli, [command, str(folder / "model"), *arguments])
        assert ran.exit_code == 0, ran.output
        assert ("does not say its alpha" in ran.stderr) == is_told


def test_prompts(tmp_path: Path) -> None:
    """Guards what is assumed of the repository's checkpoints: layers by the length of prompts, and the gate."""
    sizes: dict[str, Any] = {"n_layers": 3, "d_model": 32, "n_heads": 4, "vocab_size": 64, "max_seq_len": 32}
    gates = {f"layers.{i}.attention.gate": torch.ones(1, 4, 1, 1) for i in range(3)}
    torch.save({"adapter_query.weight": torch.ones(20, 32), **gates}, tmp_path / "v1.pth")
    for more, said in (
        ("", "layers=2 and gate=tanh assumed. Else give it, as in .*,layers=...,gate=...[.]"),
        (",gate=linear", "layers=2 assumed. .*v1.pth,layers=...[.]"),
        (",layers=1", "gate=tanh assumed. .*v1.pth,gate=...[.]"),
    ):
        handle = zoo.load_adapter(zoo.build("llama-2-7b", **sizes), f"{tmp_path}/v1.pth{more}")
        (note,) = handle.notes
        assert re.search(said, note)
    handle = zoo.load_adapter(zoo.build("llama-2-7b", **sizes), f"{tmp_path}/v1.pth,layers=1,gate=linear")
    assert handle.notes == [] and handle.adapter.options.prompt_length == 20


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (",alpha=much", "alpha is a number, not 'much'"),
        (",alpha=true", "alpha is a number, not True"),
        (",enabled=3", "enabled is a list of true and false, not 3"),
        (",enabled=[1, 2]", r"enabled is a list of true and false, not \[1, 2\]"),
        (",partial=1", "partial is true or false, not 1"),
        (",scale=2", "without an option 'scale'"),
    ],
)
def test_values_that_can_not_be(more: str, says: str, folder: Path) -> None:
    lm = load(folder / "model", precision="32-true", device="cpu")
    with pytest.raises(InputError, match=says):
        lm.load_adapter(f"{folder}/lora.pt{more}")
