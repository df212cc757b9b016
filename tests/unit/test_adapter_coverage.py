"""A file that has lost a module is refused; one that was made for some layers, or for other modules, is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zoo
from zoo.adapters.discover import sites_of
from zoo.convert.adapter_coverage import targeted
from zoo.convert.adapter_files import CONFIG, WEIGHTS
from zoo.errors import FileFormatError

N_LAYERS, WIDTH = 6, 4


class Layer(nn.Module):
    """Two linears, of which only every second layer has the other."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.q, self.v, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        if number % 2:
            self.odd = nn.Linear(WIDTH, WIDTH)


class Model(nn.Module):
    """Two stacks of layers, of other depths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, WIDTH)
        self.encoder = nn.ModuleList(Layer(i) for i in range(3))
        self.decoder = nn.ModuleList(Layer(i) for i in range(N_LAYERS))
        self.head = nn.Linear(WIDTH, 9)


def loralib_file(path: Path, modules: list[str]) -> Path:
    leaves = {"lora_A": torch.ones(1, WIDTH), "lora_B": torch.ones(WIDTH, 1)}
    sizes = {"head": 9}
    state = {f"{m}.{leaf}": t for m in modules for leaf, t in leaves.items()}
    state |= {f"{m}.lora_B": torch.ones(size, 1) for m, size in sizes.items() if m in modules}
    torch.save(state, path / "lora.pt")
    return path / "lora.pt"


def some(role: str, layers: Any, stack: str = "decoder") -> list[str]:
    return [f"{stack}.{layer}.{role}" for layer in layers]


ALL = range(N_LAYERS)
LEGIT: dict[str, list[str]] = {
    "all": some("q", ALL) + some("v", ALL),
    "one-role": some("q", ALL),
    "range": some("q", range(2, 5)) + some("v", range(2, 5)),
    "every-second": some("q", range(0, 6, 2)) + some("v", range(0, 6, 2)),
    "one-layer": some("q", [3]),
    "two-layers": some("q", [0, 5]),
    "where-it-is": some("q", ALL) + some("odd", [1, 3, 5]),
    "where-it-is-of-a-range": some("q", range(2, 5)) + some("odd", [3]),
    "stacks": some("q", range(3), "encoder") + some("q", ALL),
    "other-roles-in-stacks": some("v", range(2), "encoder") + some("q", ALL),
    "outside": [*some("q", [4, 5]), "head"],
}
HOLES: dict[str, tuple[list[str], list[str]]] = {
    "inside": (some("q", ALL) + some("v", [0, 1, 3, 4, 5]), ["decoder.2.v"]),
    "at-the-end": (some("q", ALL) + some("v", range(5)), ["decoder.5.v"]),
    "at-the-start": (some("q", range(3, 6)) + some("v", range(4, 6)), ["decoder.3.v"]),
    "one-role": (some("q", [0, 1, 2, 4, 5]), ["decoder.3.q"]),
    "a-layer": (some("q", [0, 1, 3]) + some("v", [0, 1, 3]), ["decoder.2.q", "decoder.2.v"]),
    "where-it-is": (some("q", ALL) + some("odd", [1, 5]), ["decoder.3.odd"]),
    "in-one-stack": (some("q", [0, 2], "encoder") + some("v", range(3), "encoder") + some("q", ALL), ["encoder.1.q"]),
}


@pytest.mark.parametrize("case", LEGIT)
def test_layers_that_are_chosen(case: str, tmp_path: Path) -> None:
    """Guards files that were made for a part of a model: which, they can not say."""
    handle = zoo.load_adapter(Model(), loralib_file(tmp_path, LEGIT[case]), alpha=2)
    assert {key.rpartition(".")[0] for key in handle.state_dict()} == set(LEGIT[case])


@pytest.mark.parametrize("case", HOLES)
def test_layers_that_are_missing(case: str, tmp_path: Path) -> None:
    """Guards against a module that goes without its update unnoticed."""
    held, missing = HOLES[case]
    path = loralib_file(tmp_path, held)
    with pytest.raises(FileFormatError, match=f"holds no LoRA of {', '.join(missing)}, and of") as error:
        zoo.load_adapter(Model(), path, alpha=2)
    assert f"{path},partial=true" in str(error.value.fix)
    handle = zoo.load_adapter(Model(), f"{path},alpha=2,partial=true")
    assert len(handle.plan.additions) == len(held)


# --- PEFT ------------------------------------------------------------------------------------------------------


TARGETS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ends": ({"target_modules": ["q", "head"]}, [*some("q", range(3), "encoder"), *some("q", ALL), "head"]),
    "in-full": ({"target_modules": ["decoder.1.q", "head"]}, ["decoder.1.q", "head"]),
    "expression": ({"target_modules": r"decoder\.[2-4]\.(q|odd)"}, [*some("q", range(2, 5)), "decoder.3.odd"]),
    "layers": (
        {"target_modules": ["q"], "layers_to_transform": [0, 2], "layers_pattern": "decoder"},
        some("q", [0, 2]),
    ),
    "layer": ({"target_modules": ["v"], "layers_to_transform": 4, "layers_pattern": ["decoder"]}, some("v", [4])),
    "no-layers": ({"target_modules": ["odd"], "layers_to_transform": []}, ["encoder.1.odd", *some("odd", [1, 3, 5])]),
    "excluded": ({"target_modules": ["q"], "exclude_modules": r"encoder\..*"}, some("q", ALL)),
    "excluded-ends": ({"target_modules": ["v", "head"], "exclude_modules": ["v"]}, ["head"]),
    "saved-whole": (
        {"target_modules": ["q", "head"], "modules_to_save": ["head", "encoder.[01]"]},
        ["encoder.2.q", *some("q", ALL)],
    ),
    "nothing": ({"target_modules": "all-linear"}, []),
}


@pytest.mark.parametrize("case", TARGETS)
def test_what_a_config_targets(case: str) -> None:
    """Guards PEFT's way to name modules."""
    config, expected = TARGETS[case]
    assert set(targeted(config, [site.name for site in sites_of(Model())])) == set(expected)


def test_peft_targets_the_same() -> None:
    """Guards the cases above: each says what PEFT itself adapts."""
    peft = pytest.importorskip("peft")
    for config, expected in TARGETS.values():
        if config["target_modules"] == "all-linear":
            continue
        model = peft.get_peft_model(Model(), peft.LoraConfig(**config))
        found = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
        assert {name.removeprefix("base_model.model.") for name in found} == set(expected)


def test_names_that_end_alike(tmp_path: Path) -> None:
    """Guards zoo's own directories, which name modules in full: one name may be the end of another."""

    def make() -> nn.ModuleDict:
        return nn.ModuleDict({"fc": nn.Linear(4, 4), "part": nn.ModuleDict({"fc": nn.Linear(4, 4)})})

    zoo.adapt(make(), "lora", r=2, targets=["=fc"]).save(tmp_path)
    assert [addition.site.name for addition in zoo.load_adapter(make(), tmp_path).plan.additions] == ["fc"]


def without(directory: Path, keep: Callable[[str], bool]) -> None:
    tensors: dict[str, Tensor] = load_file(directory / WEIGHTS)
    kept = {key: tensor for key, tensor in tensors.items() if keep(key)}
    assert len(kept) < len(tensors)
    save_file(kept, directory / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_a_directory_that_lacks_a_module(adapter: str, tmp_path: Path) -> None:
    """Guards files that were cut: a module, or all of a role, that their config targets."""
    options: dict[str, Any] = {"targets": ["q", "v"]} | ({"r": 2} if adapter == "lora" else {"feedforward": ["odd"]})
    zoo.adapt(Model(), adapter, **options).save(tmp_path)
    zoo.load_adapter(Model(), tmp_path)
    without(tmp_path, lambda key: ".1.v." not in key)
    with pytest.raises(FileFormatError, match=r"weights of decoder\.1\.v, encoder\.1\.v, and its target_modules are"):
        zoo.load_adapter(Model(), tmp_path)
    without(tmp_path, lambda key: ".v." not in key)
    with pytest.raises(FileFormatError, match=r"weights of decoder\.0\.v, .* and 5 more"):
        zoo.load_adapter(Model(), tmp_path)
    handle = zoo.load_adapter(Model(), tmp_path, partial=True)
    assert {addition.site.role for addition in handle.plan.additions} == {"q", *options.get("feedforward", [])}
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"target_modules": "(q"}))
    with pytest.raises(FileFormatError, match=r"adapter_config\.json has a regular expression that is none"):
        zoo.load_adapter(Model(), tmp_path)
