"""One function reads every program's adapters, and says which options each has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from zoo.errors import FileFormatError, InputError
from zoo.testing.adapters import randomize

SMALL: dict[str, Any] = {
    "n_layers": 3,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 4,
    "d_head": 8,
    "vocab_size": 64,
    "max_seq_len": 32,
}


def test_the_reader_is_chosen_by_what_is_there(tmp_path: Path) -> None:
    """Guards the order of the readers: a file of LLaMA-Adapter is a torch file too, and loralib's have no mark."""
    ids = torch.randint(64, (1, 8), generator=torch.Generator().manual_seed(1))
    trained, other = (zoo.build("llama-7b", seed=0, **SMALL) for _ in range(2))
    handle = zoo.adapt(trained, "llama-adapter", prompt_length=4, layers=2)
    randomize(handle)
    state = handle.state_dict()
    prompts = torch.cat([state[f"blocks.{i}.attn.prompt"] for i in (1, 2)])
    gates = {f"layers.{i}.attention.gate": state[f"blocks.{i}.attn.gate"].view(1, -1, 1, 1) for i in (1, 2)}
    zero = {"layers.0.attention.gate": torch.zeros(1, 4, 1, 1)}
    torch.save({"adapter_query.weight": prompts, **zero, **gates}, tmp_path / "official.pth")
    zoo.load_adapter(other, tmp_path / "official.pth", layers=2)
    with torch.no_grad():
        assert torch.equal(other(ids), trained(ids))
    with pytest.raises(InputError, match="without an option 'alpha'"):
        zoo.load_adapter(other, tmp_path / "official.pth", name="again", alpha=2)

    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    torch.save({"0.lora_A": torch.randn(2, 6), "0.lora_B": torch.randn(4, 2)}, tmp_path / "loralib.pt")
    assert zoo.load_adapter(module, tmp_path / "loralib.pt", alpha=4).adapter.options.alpha == 4
    torch.save({"model": {}}, tmp_path / "lit_model.pth.lora")
    with pytest.raises(InputError, match="Sequential is no decoder"):
        zoo.load_adapter(module, tmp_path / "lit_model.pth.lora", name="other")
    with pytest.raises(FileFormatError, match="no adapter directory"):
        zoo.load_adapter(module, tmp_path / "nothing", name="other")
