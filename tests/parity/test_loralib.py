"""LoRA of microsoft's loralib, read from its files, computes and trains as loralib does; zoo's convolutions by formula.

Shape letters: B batch, T time, D_out, D_in of a linear, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import loralib as lora  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests import reference
from zoo.adapters.attach import AttachedAdapter
from zoo.adapters.discover import sites_of
from zoo.adapting import adapt
from zoo.api import load
from zoo.convert.adapter_names import FamilyNames, OwnNames
from zoo.convert.loralib import read_loralib
from zoo.errors import FileFormatError, InputError
from zoo.registry import Registry

ALPHA, R = 3.0, 2
ENABLED = [True, False, True]


class One(nn.Module):
    """A model of one layer."""

    layer: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result."""
        return self.layer(x)


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))


def save(path: Path, content: Mapping[str, Any]) -> Path:
    torch.save(content, path / "lora.pt")
    return path / "lora.pt"


def read_onto(
    module: nn.Module, path: Path, names: OwnNames | None = None, *, alpha: float = ALPHA, **options: Any
) -> AttachedAdapter:
    stored = read_loralib(path, sites_of(module), names or OwnNames(), alpha=alpha, **options)
    handle = adapt(module, stored.adapter, **stored.options)
    handle.load_state_dict(stored.state)
    return handle


def assert_same(theirs: nn.Module, ours: nn.Module, x: Tensor) -> None:
    """Equal outputs; leaves the gradients of the same random loss in both."""
    expected, found = theirs(x), ours(x)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()


def assert_gradient(found: nn.Parameter, expected: Any) -> None:
    assert found.grad is not None
    assert expected.grad.abs().max() > 1e-2
    assert_close(found.grad, expected.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_linear(bias: str, tmp_path: Path) -> None:
    theirs = One(lora.Linear(6, 10, r=R, lora_alpha=ALPHA))
    randomise(theirs)
    ours = One(nn.Linear(6, 10))
    ours.layer.load_state_dict({key: theirs.layer.state_dict()[key].clone() for key in ("weight", "bias")})
    lora.mark_only_lora_as_trainable(theirs, bias)
    with torch.no_grad():  # training changes the bias only where it is saved
        theirs.layer.bias.add_(1.0 if bias != "none" else 0.0)
    handle = read_onto(ours, save(tmp_path, lora.lora_state_dict(theirs, bias)))
    assert_same(theirs, ours, torch.randn(4, 5, 6))
    trained = handle.trainable()
    assert trained.keys() == {f"layer.{k}" for k in ("lora_A", "lora_B", *(() if bias == "none" else ("bias",)))}
    for key, parameter in trained.items():
        assert_gradient(parameter, theirs.get_parameter(key))


def test_embedding(tmp_path: Path) -> None:
    theirs = One(lora.Embedding(11, 6, r=R, lora_alpha=ALPHA))
    randomise(theirs)
    ours = One(nn.Embedding.from_pretrained(theirs.layer.weight.detach().clone()))
    handle = read_onto(ours, save(tmp_path, {"model_state_dict": lora.lora_state_dict(theirs)}))
    assert_same(theirs, ours, torch.randint(11, (4, 5)))
    for key in ("lora_A", "lora_B"):
        assert_gradient(handle.trainable()[f"layer.{key}"], theirs.get_parameter(f"layer.{key}"))


def fused(enabled: list[bool], fan_in_fan_out: bool = False) -> tuple[One, One]:
    """A random model of loralib's, and a plain linear with its weight."""
    theirs = One(lora.MergedLinear(6, 12, r=R, lora_alpha=ALPHA, enable_lora=enabled, fan_in_fan_out=fan_in_fan_out))
    randomise(theirs)
    ours = One(nn.Linear(6, 12))
    weight = theirs.layer.weight.detach().clone()
    ours.layer.load_state_dict(
        {"weight": weight.T if fan_in_fan_out else weight, "bias": theirs.layer.bias.detach().clone()}
    )
    return theirs, ours


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("enabled", [ENABLED, [False, True, False], [True, True]], ids=str)
def test_fused_linear(enabled: list[bool], fan_in_fan_out: bool, tmp_path: Path) -> None:
    theirs, ours = fused(enabled, fan_in_fan_out)
    path = save(tmp_path, lora.lora_state_dict(theirs))
    handle = read_onto(ours, path, enabled=None if all(enabled) else enabled)
    assert_same(theirs, ours, torch.randn(4, 5, 6))
    A, B = handle.trainable()["layer.lora_A"], handle.trainable()["layer.lora_B"]
    assert_gradient(A, theirs.layer.lora_A)
    assert B.shape == (12 // len(enabled), R * sum(enabled))
    assert B.grad is not None
    assert_close(torch.cat(B.grad.split(R, dim=1)), theirs.layer.lora_B.grad, atol=1e-5, rtol=1e-5)


FUSED = {
    "gpt2": ("attn.c_attn", ENABLED),
    "gpt_neox": ("attention.query_key_value", ENABLED),
    "phi3": ("self_attn.qkv_proj", [True, False, True, False, True]),
}
"""Where qkv are; what is active. Parts are of equal width: of Phi-3's, three are of q, and k and v are one each."""


def with_loralib(model: nn.Module, place: str, enabled: list[bool]) -> None:
    """Has loralib's layers in place of every qkv, with their weights."""
    for name, module in list(model.named_modules()):
        if not name.endswith(place):
            continue
        layer: Any = module
        transposed = type(layer).__name__ == "Conv1D"
        d_in, d_out = layer.weight.shape if transposed else layer.weight.shape[::-1]
        new = lora.MergedLinear(
            d_in, d_out, r=R, lora_alpha=ALPHA, enable_lora=enabled, fan_in_fan_out=transposed, merge_weights=False
        )
        randomise(new)
        new.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}, strict=False)
        if layer.bias is None:
            new.bias = None
        with torch.no_grad():
            new.lora_A.mul_(0.2)
            new.lora_B.mul_(0.2)
        model.set_submodule(name, new)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("family", FUSED)
def test_a_decoder_of_zoo(family: str, bias: str, tmp_path: Path, registry: Registry) -> None:
    """Guards the way of each part's rows through a family's key map: stacked, head after head, of unequal widths."""
    theirs = reference.save_tiny(tmp_path, *reference.VARIANTS[family])
    place, enabled = FUSED[family]
    with_loralib(theirs, place, enabled)
    lora.mark_only_lora_as_trainable(theirs, bias)
    with torch.no_grad():
        for parameter in (p for n, p in theirs.named_parameters() if p.requires_grad and n.endswith(".bias")):
            parameter.add_(0.3 * torch.randn_like(parameter))
    state = lora.lora_state_dict(theirs, bias)
    state = {f"module.{key}": tensor for key, tensor in state.items()}  # as its example saves
    lm = load(tmp_path, precision="32-true", device="cpu", registry=registry)
    names = FamilyNames(lm.checkpoint.family.keys, lm.model.spec)
    handle = read_onto(lm.model, save(tmp_path, state), names, enabled=enabled)
    tokens = reference.tokens(2, 9)
    expected = theirs(tokens).logits
    found = lm.model(tokens)
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
    expected.square().mean().backward()
    found.square().mean().backward()
    module = next(name for name, _ in theirs.named_modules() if name.endswith(place))
    if theirs.get_submodule(module).bias is not None and bias != "none":
        parts = [handle.trainable()[f"{site}.bias"].grad for site in names.sites(module)]
        merged = names.merge(module, [part for part in parts if part is not None])
        assert_close(merged, theirs.get_submodule(module).bias.grad, atol=1e-5, rtol=1e-4)
    if family != "gpt2":
        return
    q, v = names.sites(module)[::2]
    for key, theirs_rows in (("lora_A", R), ("lora_B", 48)):
        gradients = theirs.get_submodule(module).get_parameter(key).grad.split(theirs_rows)
        for site, gradient in zip((q, v), gradients, strict=True):
            assert_close(handle.trainable()[f"{site}.{key}"].grad, gradient, atol=1e-5, rtol=1e-4)
    k = names.sites(module)[1]
    updated = [key for key in handle.trainable() if key.startswith(f"{k}.lora_")]
    assert bool(updated) == (bias == "lora_only")
    assert not any(handle.trainable()[key].grad.any() for key in updated)  # type: ignore[union-attr]


def test_ranks_and_names_that_end_alike(tmp_path: Path) -> None:
    """Guards options that must hold for one module, and not for others whose names end in its name."""

    def linear(new: Callable[..., nn.Module], inside: bool) -> nn.Module:
        part = nn.ModuleDict({"fc": new(6, 6, r=1, lora_alpha=ALPHA) if inside else nn.Linear(6, 6)})
        layers = {"fc": new(6, 6, r=3, lora_alpha=ALPHA), "part": part, "up": new(6, 6, r=1, lora_alpha=ALPHA)}
        return nn.ModuleDict(layers)

    for inside in (True, False):
        theirs = linear(lora.Linear, inside)
        randomise(theirs)
        ours = linear(lambda d_in, d_out, **_: nn.Linear(d_in, d_out), inside)
        ours.load_state_dict({k: v.clone() for k, v in theirs.state_dict().items() if "lora_" not in k})
        read_onto(ours, save(tmp_path, lora.lora_state_dict(theirs)))
        x = torch.randn(4, 6)
        for name in ("fc", "part.fc", "up"):
            expected = theirs.get_submodule(name)(x)
            assert_close(ours.get_submodule(name)(x), expected, atol=1e-5, rtol=1e-5)


def refused(tmp_path: Path, state: Mapping[str, Any], layer: nn.Module, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        read_loralib(save(tmp_path, state), sites_of(One(layer)), **options)
    assert "lora.pt" in str(error.value)
    wants_value = {"enabled"} & options.keys() or "not of which ones" in str(error.value)
    assert isinstance(error.value, FileFormatError) != bool(wants_value)
    return str(error.value)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_weights_beside_lora_are_refused(mode: str, tmp_path: Path) -> None:
    """Guards against adding an update twice: the file does not say whether it was merged."""
    theirs = One(lora.Linear(6, 10, r=R, lora_alpha=ALPHA))
    randomise(theirs)
    theirs.train(mode == "train")
    message = refused(tmp_path, theirs.state_dict(), nn.Linear(6, 10))
    assert "layer.weight" in message and "model.train() and save lora.lora_state_dict(model)" in message


def test_merging_does_not_change_what_lora_state_dict_saves(tmp_path: Path) -> None:
    theirs, ours = fused(ENABLED)
    x = torch.randn(4, 6)
    expected = theirs(x)
    read_onto(ours, save(tmp_path, lora.lora_state_dict(theirs.eval())), enabled=ENABLED)
    assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


A, B = torch.randn(R, 6), torch.randn(10, R)
LORA = {"layer.lora_A": A, "layer.lora_B": B}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (LORA | {"layer.scale": torch.ones(1)}, "neither LoRA nor a bias: layer.scale"),
        (LORA | {"head.weight": torch.ones(1)}, "neither LoRA nor a bias: head.weight"),
        (LORA | {"attn.lora_A": A, "attn.lora_B": B}, "holds attn, and the model has no such linear"),
        (LORA | {"norm.bias": torch.ones(10)}, "holds norm, and the model has no such linear"),
        (LORA | {"layer.bias": torch.ones(9)}, r"layer.bias is \(9,\), and the model has one of 10"),
        ({"layer.lora_A": A}, "only one of lora_A and lora_B of layer"),
        ({"layer.lora_A": A, "layer.lora_B": torch.ones(10, 3)}, r"lora_B \(10, 3\) do not fit layer.*\(10, 6\)"),
        ({"layer.lora_A": torch.ones(R, 7), "layer.lora_B": B}, r"lora_A \(2, 7\).*do not fit layer"),
        ({"layer.lora_A": A, "layer.lora_B": torch.ones(20, R)}, r"lora_B \(20, 2\) do not fit layer"),
        ({"layer.lora_A": torch.ones(6, 6), "layer.lora_B": torch.ones(15, R)}, r"lora_B \(15, 2\) do not fit layer"),
        ({"layer.lora_A": torch.ones(5, 6), "layer.lora_B": B}, r"lora_A \(5, 6\).*do not fit layer"),
        ({"layer.lora_A": torch.ones(0, 6), "layer.lora_B": B}, r"lora_A \(0, 6\).*do not fit layer"),
        ({"layer.lora_A": torch.ones(6, 6), "layer.lora_B": torch.ones(7, R)}, r"lora_B \(7, 2\) do not fit layer"),
        ({"layer.lora_A": A, "layer.lora_B": torch.ones(4, R)}, r"lora_B \(4, 2\) do not fit layer"),
        ({"layer.lora_A": A, "layer.lora_B": torch.ones(0, 0)}, r"lora_B \(0, 0\) do not fit layer"),
        ({"layer.lora_A": A[0], "layer.lora_B": B}, r"lora_A \(6,\).*do not fit layer"),
        ({"layer.bias": torch.ones(10)}, "holds no LoRA weights"),
        ({}, "holds no LoRA weights"),
        ({"model_state_dict": [1]}, "holds a list"),
    ],
)  # fmt: skip
def test_what_is_no_lora_is_refused(state: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=message):
        read_loralib(save(tmp_path, state), sites_of(One(nn.Linear(6, 10))))


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no file"):
        read_loralib(tmp_path / "none.pt", [])
    (tmp_path / "text.pt").write_text("lora")
    with pytest.raises(FileFormatError, match="damaged"):
        read_loralib(tmp_path / "text.pt", [])


def test_some_biases_alone_are_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(6, 10), "up": nn.Linear(6, 10), "norm": nn.LayerNorm(10)})
    both = LORA | {"up.lora_A": A, "up.lora_B": B}
    for state, lacking in (
        (both | {"up.bias": torch.ones(10)}, "modules with LoRA, and lacks layer.bias"),
        (both | {"up.bias": torch.ones(10), "norm.bias": torch.ones(10)}, "the model, and lacks layer.bias"),
    ):
        with pytest.raises(FileFormatError, match=lacking):
            read_loralib(save(tmp_path, state), sites_of(model))


def test_embeddings_of_another_size_are_refused(tmp_path: Path) -> None:
    state = lora.lora_state_dict(One(lora.Embedding(11, 6, r=R)))
    assert "do not fit layer" in refused(tmp_path, state, nn.Embedding(12, 6))
    assert "do not fit layer" in refused(tmp_path, state, nn.Embedding(11, 7))


@pytest.mark.parametrize("whole", [False, True])
def test_convolutions_are_refused(whole: bool, tmp_path: Path) -> None:
    theirs = One(lora.Conv2d(4, 6, 3, r=R))
    state = theirs.state_dict() if whole else lora.lora_state_dict(theirs)
    assert "convolution, layer" in refused(tmp_path, state, nn.Conv2d(4, 6, 3))
    assert "convolution, layer" in refused(tmp_path, state, theirs.layer)
    if whole:
        assert "convolution, layer" in refused(tmp_path, state, nn.Linear(4, 6))


def test_active_parts_have_to_be_named(tmp_path: Path) -> None:
    theirs, _ = fused(ENABLED)
    state = lora.lora_state_dict(theirs)
    missing = refused(tmp_path, state, nn.Linear(6, 12))
    assert "2 of the 3 equal parts of layer" in missing and "enabled=" in missing
    for wrong in ([True, True, True], [True, False, False], [True, False, True, False]):
        assert "does not fit" in refused(tmp_path, state, nn.Linear(6, 12), enabled=wrong)


CONVS: dict[str, tuple[type[nn.Module], Callable[..., Tensor], dict[str, Any]]] = {
    "1d": (nn.Conv1d, F.conv1d, {"padding": 1}),
    "1d-groups": (nn.Conv1d, F.conv1d, {"groups": 2, "bias": False}),
    "2d": (nn.Conv2d, F.conv2d, {"stride": 2, "padding": 1}),
    "2d-depthwise": (nn.Conv2d, F.conv2d, {"groups": 4}),
    "3d": (nn.Conv3d, F.conv3d, {"dilation": 2}),
    "3d-groups": (nn.Conv3d, F.conv3d, {"groups": 2}),
}


@pytest.mark.parametrize("case", CONVS)
def test_zoos_convolutions_are_the_formula(case: str) -> None:
    """The weight plus scaling * B A, summed over ranks, and two convolutions in turn where there are no groups."""
    kind, convolve, options = CONVS[case]
    base: Any = kind(4, 8, 3, **options)
    randomise(base)
    model = One(base)
    handle = adapt(model, "lora", targets=["layer"], r=R, alpha=ALPHA)
    with torch.no_grad():
        for parameter in handle.trainable().values():
            parameter.copy_(torch.randn_like(parameter))
    A, B = (handle.trainable()[f"layer.{key}"] for key in ("lora_A", "lora_B"))
    A2, B2 = (p.detach().clone().requires_grad_() for p in (A, B))
    n = base.weight.dim() - 2
    x = torch.randn(2, 4, *[9, 8, 7][:n])
    update = torch.einsum("or,ri...->oi...", B2.view(8, R), A2)
    options = {key: value for key, value in options.items() if key != "bias"}
    expected = convolve(x, base.weight.detach() + ALPHA / R * update, base.bias, **options)
    found = model(x)
    assert_close(found, expected, atol=1e-4, rtol=1e-5)
    if base.groups == 1:
        in_turn = base(x) + ALPHA / R * convolve(convolve(x, A2, **options), B2)
        assert_close(found, in_turn, atol=1e-4, rtol=1e-5)
    weights = torch.randn_like(expected) / expected.numel() ** 0.5
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in ((A, A2), (B, B2)):
        assert_gradient(ours, theirs)
    with torch.no_grad():
        handle.merge()
        assert_close(model(x), expected, atol=1e-4, rtol=1e-5)
