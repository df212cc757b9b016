"""LoRA of parts of a fused projection that a module has as one is loralib's `MergedLinear`; its files load by path.

Shape letters: B batch, T time, D model width, R rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loralib as lora  # type: ignore[import-untyped]
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import zoo
from tests import reference
from zoo.adapters.attach import AttachedAdapter
from zoo.convert.own_form import OWN_FORM
from zoo.errors import FileFormatError, InputError
from zoo.registry import Registry
from zoo.testing.adapters import randomize

ALPHA, R, D = 3.0, 4, 48
ENABLED = [[True, False, True], [False, True, False], [False, False, True], [True, True, True]]


class MinGPT(nn.Module):
    """A language model with a fused projection, as minGPT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, D)
        self.h = nn.ModuleList(nn.ModuleDict({"c_attn": nn.Linear(D, 3 * D), "c_proj": nn.Linear(D, D)}) for _ in "ab")
        self.lm_head = nn.Linear(D, 97)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        x_BTD = self.embed(tokens_BT)
        for layer in self.h:
            block: Any = layer
            q, k, v = block["c_attn"](x_BTD).view(*x_BTD.shape[:2], 3, 4, D // 4).permute(2, 0, 3, 1, 4)
            y_BTD = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x_BTD = x_BTD + block["c_proj"](y_BTD)
        logits_BTV: Tensor = self.lm_head(x_BTD)
        return logits_BTV


def make(kind: str) -> nn.Module:
    """The same at every call."""
    if kind == "conv1d":
        model: nn.Module = reference.tiny_model(*reference.VARIANTS["gpt2"])
        return model
    torch.manual_seed(3)
    return MinGPT().eval()


def with_loralib(kind: str, enabled: list[bool]) -> nn.Module:
    """Has loralib's layer with random values for every ``c_attn``."""
    model = make(kind)
    for name, module in list(model.named_modules()):
        if name.endswith("c_attn"):
            old: Any = module
            new = lora.MergedLinear(
                D, 3 * D, r=R, lora_alpha=ALPHA, enable_lora=enabled, fan_in_fan_out=kind == "conv1d"
            )
            new.load_state_dict(old.state_dict(), strict=False)
            with torch.no_grad():
                new.lora_A.copy_(0.3 * torch.randn_like(new.lora_A))
                new.lora_B.copy_(0.3 * torch.randn_like(new.lora_B))
            model.set_submodule(name, new)
    return model.train()  # loralib merges on eval


def logits(model: nn.Module) -> Tensor:
    found: Any = model(reference.tokens(2, 9))
    result: Tensor = getattr(found, "logits", found)
    return result


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Writes what loralib saves."""

    def save(model: nn.Module) -> Path:
        torch.save(lora.lora_state_dict(model), tmp_path / "lora.pt")
        return tmp_path / "lora.pt"

    return save


@pytest.mark.parametrize("enabled", ENABLED, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_is_merged_linear(kind: str, enabled: list[bool], saved: Any) -> None:
    """Guards ranks, order and scaling of the parts: logits, and the gradient of every number."""
    theirs, ours = with_loralib(kind, enabled), make(kind).train()
    if kind == "conv1d":
        theirs, ours = theirs.apply(_no_dropout), ours.apply(_no_dropout)
    handle = zoo.load_adapter(ours, saved(theirs), alpha=ALPHA, enabled=None if all(enabled) else enabled)
    assert handle.plan.n_trainable == sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    expected, found = logits(theirs), logits(ours)
    assert (expected - logits(make(kind))).abs().max() > 0.1
    assert_close(found, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for name, parameter in handle.trainable().items():
        grad = theirs.get_parameter(name).grad
        assert grad is not None and parameter.grad is not None and grad.abs().max() > 1e-3
        mine = torch.cat(parameter.grad.split(R, dim=1)) if name.endswith("lora_B") else parameter.grad
        assert_close(mine, grad, atol=1e-5 * float(grad.abs().max()), rtol=1e-4)
    with torch.no_grad():
        handle.merge()
        assert_close(logits(ours), expected, atol=1e-5, rtol=1e-4)


def _no_dropout(module: nn.Module) -> None:
    if isinstance(module, nn.Dropout):
        module.p = 0.0


def parts_of(model: nn.Module, **options: Any) -> AttachedAdapter:
    """A randomised LoRA of c_attn."""
    handle = zoo.adapt(model, "lora", targets=["c_attn"], **options)
    randomize(handle)
    return handle


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ranks", [(4, 0, 4), (0, 2, 5), (3, 1, 2)], ids=str)
def test_ranks_that_differ_are_the_formula(ranks: tuple[int, ...], rslora: bool) -> None:
    """Guards each part's own scaling, rows and columns, and that its update is made of them alone."""
    model, plain = make("linear"), make("linear")
    handle = parts_of(model, alpha=ALPHA, rslora=rslora, parts={"c_attn": ranks})
    with torch.no_grad():
        for i in range(2):
            A, B = (handle.trainable()[f"h.{i}.c_attn.lora_{which}"] for which in "AB")
            weight = plain.get_parameter(f"h.{i}.c_attn.weight")
            start = 0
            for part, rank in enumerate(ranks):
                columns = slice(start, start := start + rank)
                scaling = ALPHA / (rank**0.5 if rslora else rank) if rank else 0.0
                weight[part * D : (part + 1) * D] += scaling * B[:, columns] @ A[columns]
        assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-4)


def test_an_update_of_the_weights_shape_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards speed: loralib forms (3 D, D) at every pass."""
    model = make("linear")
    parts_of(model, parts={"c_attn": (4, 0, 4)})
    made: list[tuple[int, ...]] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            made.extend([tuple(result.shape)] if isinstance(result, Tensor) else [])
            return result

    with Watch():
        logits(model).sum().backward()
    assert (2, 9, 3 * D) in made
    assert not {(3 * D, D), (D, 3 * D), (D, D)} & set(made)


@pytest.mark.parametrize("ranks", [(4, 0, 4), (0, 2, 8), (30, 20, 0)], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_written_as_peft_does(ranks: tuple[int, ...], rslora: bool, tmp_path: Path, registry: Registry) -> None:
    """Guards the block-diagonal form, and scalings that PEFT can not have apart; also above the weight's rank."""
    model, again = make("conv1d"), make("conv1d")
    handle = parts_of(model, rslora=rslora, parts={"c_attn": ranks})
    (note, *_) = handle.save(tmp_path)
    assert str(ranks) in note and f"rank {sum(ranks)}" in note
    assert ("different scaling" in note) == (len({*ranks} - {0}) > 1)
    theirs = peft.PeftModel.from_pretrained(make("conv1d"), tmp_path).eval()
    with torch.no_grad():
        assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-4)
        (tmp_path / OWN_FORM).unlink()
        loaded = zoo.load_adapter(again, tmp_path)
        assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-4)
    A = loaded.trainable()["transformer.h.0.attn.c_attn.lora_A"]
    assert A.shape == (min(sum(ranks), D), D)


def test_parts_of_a_site_of_a_fused_module(tmp_path: Path, registry: Registry) -> None:
    """Guards parts within parts: some of the heads of q, where the family's files have one qkv."""
    reference.save_tiny(tmp_path / "base", *reference.VARIANTS["gpt2"])
    lm = zoo.load(tmp_path / "base", precision="32-true", device="cpu", registry=registry)
    handle = lm.adapt("lora", r=3, targets=["attn.q", "attn.v"], parts={"attn.q": (2, 0, 1)})
    randomize(handle)
    notes = handle.save(tmp_path / "ours")
    assert "2 updates written as one of rank 6; parts of ranks (2, 0, 1)" in notes[0]
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        assert_close(logits(theirs), logits(lm.model), atol=1e-5, rtol=1e-4)


def test_files_of_a_decoder_of_zoo(tmp_path: Path, saved: Any, registry: Registry) -> None:
    reference.save_tiny(tmp_path / "base", *reference.VARIANTS["gpt2"])
    lm = zoo.load(tmp_path / "base", precision="32-true", device="cpu", registry=registry)
    theirs = with_loralib("conv1d", ENABLED[0]).apply(_no_dropout)
    lm.load_adapter(saved(theirs), alpha=ALPHA, enabled=ENABLED[0])
    with torch.no_grad():
        assert_close(logits(lm.model), logits(theirs), atol=1e-5, rtol=1e-4)


def test_options_and_files_that_do_not_fit(tmp_path: Path, saved: Any) -> None:
    """Guards against an option that is dropped, and a file that is taken for another; the model stays as it was."""
    path = saved(with_loralib("linear", ENABLED[0]))
    model = make("linear")
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(InputError, match=r"'scale'. Leave it out, or take alpha or enabled or partial"):
        zoo.load_adapter(model, path, scale=2)
    with pytest.raises(InputError, match=r"2 of the 3 equal parts.*enabled="):
        zoo.load_adapter(model, path, alpha=ALPHA)
    other = parts_of(make("linear"))
    other.save(tmp_path / "directory")
    with pytest.raises(InputError, match=r"'alpha'. Leave it out"):
        zoo.load_adapter(model, tmp_path / "directory", alpha=ALPHA)
    with pytest.raises(FileFormatError, match="is no adapter directory"):
        zoo.load_adapter(model, tmp_path / "directory" / "adapter_model.safetensors")
    with pytest.raises(FileFormatError, match="is no adapter directory"):
        zoo.load_adapter(model, tmp_path / "none.pt")
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize(
    ("layer", "theirs", "message"),
    [
        (nn.Linear(6, 12), lora.Linear(6, 12, r=7), "rank 7 for 0. With 6 inputs and 12 outputs"),
        (nn.Linear(6, 12), lora.MergedLinear(6, 12, r=5, enable_lora=[True] * 3), "rank 5 for a part of 0.*4 outputs"),
        (nn.Embedding(4, 12), lora.Embedding(4, 12, r=5), "rank 5 for 0"),
    ],
    ids=["linear", "fused", "embedding"],
)  # fmt: skip
def test_ranks_of_a_file_above_the_weights(layer: nn.Module, theirs: nn.Module, message: str, saved: Any) -> None:
    """Guards a message on the file: no option of the user's is wrong."""
    with pytest.raises(FileFormatError, match=rf"lora\.pt holds LoRA of {message}"):
        zoo.load_adapter(nn.Sequential(layer), saved(nn.Sequential(theirs)))
