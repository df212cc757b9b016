"""(IA)^3 and the prompts of LLaMA-Adapter are the same in zoo and PEFT: directories both ways, parameters random."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

import zoo
from tests import reference
from tests.parity.test_peft import change, digest, load_base
from zoo.adapters.llama_adapter import Prompt
from zoo.api import LanguageModel
from zoo.errors import FileFormatError, InputError
from zoo.registry import Registry
from zoo.testing.adapters import AdapterContract, randomize

WEIGHTS = "adapter_model.safetensors"
IA3: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-gqa", {}),
    "gpt2": ("gpt2", {"fan_in_fan_out": True}),
    "gpt2-other-sides": (
        "gpt2",
        {"target_modules": ["attn.c_proj", "c_fc"], "feedforward_modules": ["c_fc"], "fan_in_fan_out": True},
    ),
    "gpt2-fused-inputs": (
        "gpt2",
        {"target_modules": ["c_attn"], "feedforward_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "neox": ("gpt_neox", {}),
    "phi3": (
        "phi3",
        {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "qwen2": (
        "qwen2",
        {
            "target_modules": r".*layers\.[02]\..*(q_proj|o_proj|up_proj|down_proj)",
            "exclude_modules": ["layers.2.mlp.up_proj"],
            "feedforward_modules": ["o_proj", "down_proj"],
        },
    ),
}
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-gqa", {"adapter_len": 5, "adapter_layers": 2}),
    "llama-all": ("llama", {"adapter_len": 1, "adapter_layers": 3}),
    "mistral": ("mistral", {"adapter_len": 4, "adapter_layers": 1}),
    "gpt2": ("gpt2", {"adapter_len": 5, "adapter_layers": 2}),
}
CASES = [("IA3", case) for case in IA3] + [("ADAPTION_PROMPT", case) for case in PROMPTS]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Operations on tiny tensors take longer on several threads, which wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def make(kind: str, case: str, directory: Path) -> Any:
    """A randomised PEFT model over a tiny base; both are saved."""
    variant, config = (IA3 if kind == "IA3" else PROMPTS)[case]
    base = reference.save_tiny(directory / "base", *reference.VARIANTS[variant])
    make_config = peft.IA3Config if kind == "IA3" else peft.AdaptionPromptConfig
    model = peft.get_peft_model(base, make_config(task_type="CAUSAL_LM", **config))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(str(directory / "adapter"))
    return model.eval()


def load_theirs(base: Path, adapter: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def loss_of(logits: Tensor) -> Tensor:
    return (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))).sum()


def their_gradients(model: nn.Module) -> dict[str, Tensor]:
    """By the names in a file, without the wrapper's."""
    return {
        name.removeprefix("base_model.model.").replace(".ia3_l.default", ".ia3_l"): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_what_peft_made(kind: str, case: str, tmp_path: Path, registry: Registry) -> None:
    """Guards reading: names, sides, fused layouts, places; logits, and each gradient in the layout of the file."""
    theirs = make(kind, case, tmp_path)
    lm = load_base(tmp_path, registry)
    handle = lm.load_adapter(tmp_path / "adapter")
    ids = reference.tokens(2, 12)
    expected, found = theirs(ids).logits, lm.model(ids)
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with handle.disabled(), torch.no_grad():
        assert (lm.model(ids) - expected).abs().max() > 0.1
    loss_of(expected).backward()
    loss_of(found).backward()
    wanted = their_gradients(theirs)
    with torch.no_grad():
        for parameter in handle.trainable().values():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    if case == "gpt2-fused-inputs":  # a copy for each of q, k and v, with a part of the gradient each
        sums = [sum(handle.trainable()[f"blocks.0.attn.{part}.ia3_input"] for part in "qkv")]
        assert_close(sums[0], wanted["transformer.h.0.attn.c_attn.ia3_l"][0], atol=1e-4, rtol=1e-3)
        return
    handle.save(tmp_path / "gradients")
    written = load_file(tmp_path / "gradients" / WEIGHTS)
    assert written.keys() == {f"base_model.model.{name}" for name in wanted}
    for name, gradient in wanted.items():
        assert_close(written[f"base_model.model.{name}"], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_saved_again(kind: str, case: str, tmp_path: Path, registry: Registry) -> None:
    """Guards against loss: PEFT's file through zoo, and zoo's through PEFT, are the same bytes; so are logits."""
    make(kind, case, tmp_path)
    lm = load_base(tmp_path, registry)
    handle = lm.load_adapter(tmp_path / "adapter")
    assert handle.save(tmp_path / "same") == []
    assert digest(tmp_path / "same" / WEIGHTS) == digest(tmp_path / "adapter" / WEIGHTS)
    if case != "gpt2-fused-inputs":  # whose copies are no longer the same after training
        randomize(handle)
    handle.save(tmp_path / "ours")
    theirs = load_theirs(tmp_path / "base", tmp_path / "ours")
    ids = reference.tokens(2, 12)
    with torch.no_grad():
        assert_close(theirs(ids).logits, lm.model(ids), atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(str(tmp_path / "again"))
    assert digest(tmp_path / "again" / WEIGHTS) == digest(tmp_path / "ours" / WEIGHTS)
    other = load_base(tmp_path, registry)
    other.load_adapter(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(other.model(ids), lm.model(ids))


def adapted(
    variant: str, adapter: str, directory: Path, registry: Registry, **options: Any
) -> tuple[LanguageModel, Any]:
    reference.save_tiny(directory / "base", *reference.VARIANTS[variant])
    lm = load_base(directory, registry)
    handle = lm.adapt(adapter, **options)
    randomize(handle)
    return lm, handle


def peft_type(directory: Path) -> str:
    kind: str = json.loads((directory / "adapter_config.json").read_text())["peft_type"]
    return kind


@pytest.mark.parametrize(
    ("variant", "options", "n_notes"),
    [
        ("llama-gqa", {}, 0),
        ("gpt2", {}, 3),
        ("phi3", {"targets": ["attn.v", "mlp.up"]}, 6),
        ("gpt2", {"targets": ["all-linear"]}, 0),  # of which mlp.down is scaled at its inputs
    ],
)
def test_factors_of_zoo(
    variant: str, options: dict[str, Any], n_notes: int, tmp_path: Path, registry: Registry
) -> None:
    """Guards the ones that stand for parts without factors, and that it is told."""
    lm, handle = adapted(variant, "ia3", tmp_path, registry, **options)
    notes = handle.save(tmp_path / "ours")
    assert len(notes) == n_notes and all("ones for the others" in note for note in notes)
    assert peft_type(tmp_path / "ours") == "IA3"
    ids = reference.tokens(2, 12)
    theirs = load_theirs(tmp_path / "base", tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "again"))
    assert digest(tmp_path / "again" / WEIGHTS) == digest(tmp_path / "ours" / WEIGHTS)
    with torch.no_grad():
        assert_close(theirs(ids).logits, lm.model(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"targets": [], "feedforward": ["attn.q"]}, "c_attn"),
        ({"targets": [], "feedforward": ["attn.q", "attn.k", "attn.v"]}, "c_attn"),
        ({"targets": ["attn.q"], "feedforward": ["attn.k"]}, "c_attn"),
    ],
)
def test_factors_that_peft_can_not_hold(
    options: dict[str, Any], match: str, tmp_path: Path, registry: Registry
) -> None:
    """Guards against inputs of a fused projection that are scaled apart, and silently written as one."""
    lm, handle = adapted("gpt2", "ia3", tmp_path, registry, **options)
    notes = handle.save(tmp_path / "ours")
    assert len(notes) == 1 and "zoo's own layout" in notes[0] and match in notes[0]
    assert_loads_the_same(lm, tmp_path, registry)


def assert_loads_the_same(lm: LanguageModel, directory: Path, registry: Registry) -> None:
    assert peft_type(directory / "ours") == "ZOO"
    other, ids = load_base(directory, registry), reference.tokens(2, 12)
    other.load_adapter(directory / "ours")
    with torch.no_grad():
        assert torch.equal(other.model(ids), lm.model(ids))


def test_ends_of_names_that_are_names(tmp_path: Path) -> None:
    """Guards against ``0`` among the feed-forward modules, which PEFT takes for ``10`` too; on a model as it is."""
    model = nn.Sequential(nn.Linear(4, 4), *(nn.Identity() for _ in range(9)), nn.Linear(4, 4))
    handle = zoo.adapt(model, "ia3", targets=["10"], feedforward=["0"])
    randomize(handle)
    assert handle.save(tmp_path) == []
    change(tmp_path, task_type=None)  # PEFT looks for generate() otherwise
    again = nn.Sequential(nn.Linear(4, 4), *(nn.Identity() for _ in range(9)), nn.Linear(4, 4))
    for theirs, ours in ((again[0], model[0]), (again[10], model[10])):
        theirs.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert_close(peft.PeftModel.from_pretrained(again, str(tmp_path))(x), model(x))


def test_a_transformers_model_as_it_is(tmp_path: Path, registry: Registry) -> None:
    """Guards the names that are the same on both sides; such a model takes no prompts, and says so."""
    theirs = make("IA3", "gpt2", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    handle = zoo.load_adapter(model, tmp_path / "adapter", registry=registry)
    ids = reference.tokens(2, 12)
    with torch.no_grad():
        assert_close(model(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    handle.save(tmp_path / "same")
    assert digest(tmp_path / "same" / WEIGHTS) == digest(tmp_path / "adapter" / WEIGHTS)
    make("ADAPTION_PROMPT", "gpt2", tmp_path / "prompts")
    with pytest.raises(InputError, match=r"needs attention layers .*this model shows none"):
        zoo.load_adapter(model, tmp_path / "prompts" / "adapter", name="prompts", registry=registry)


ALIKE = ("tanh per head", "linear per head", "tanh per layer")


@pytest.mark.parametrize("gates", ALIKE)
@pytest.mark.parametrize("variant", ["llama-gqa", "gpt2"])
def test_other_gates(variant: str, gates: str, tmp_path: Path, registry: Registry) -> None:
    """Guards the conversion of gates: by value, told, and only where all heads have the same one."""
    gate, gate_per = gates.split(" per ")
    place = "after_projection" if variant == "gpt2" else "before_projection"
    lm, handle = adapted(variant, "llama-adapter", tmp_path, registry, gate=gate, gate_per=gate_per, place=place)
    for name, parameter in handle.trainable().items():
        if name.endswith(".gate"):
            with torch.no_grad():
                parameter.fill_(0.7)
    notes = handle.save(tmp_path / "ours")
    assert notes == [f"gates of {gates} written as PEFT's: read again, they are linear per layer"]
    assert peft_type(tmp_path / "ours") == "ADAPTION_PROMPT"
    ids = reference.tokens(2, 12)
    with torch.no_grad():
        assert_close(load_theirs(tmp_path / "base", tmp_path / "ours")(ids).logits, lm.model(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("variant", "options", "reason"),
    [
        ("llama-gqa", {}, "the heads of blocks.2.attn have their own"),
        ("llama-gqa", {"gate_per": "layer", "place": "after_projection"}, "not after_projection"),
        ("gpt2", {"gate_per": "layer"}, "not before_projection"),
        ("gpt2-unscaled", {"gate_per": "layer", "place": "after_projection"}, "scales scores otherwise"),
        ("gpt2-by-layer", {"gate_per": "layer", "place": "after_projection"}, "scales scores otherwise"),
        ("llama-own-head", {"gate_per": "layer"}, "6 of 12 for a width of 48"),
        ("llama-biases", {"gate_per": "layer"}, "the bias of the attention's projection a second time"),
        ("qwen2", {"gate_per": "layer"}, "the type of this one is qwen2"),
    ],
)
def test_prompts_that_peft_can_not_hold(
    variant: str, options: dict[str, Any], reason: str, tmp_path: Path, registry: Registry
) -> None:
    """Guards against files that PEFT refuses, fails on, or computes something else with."""
    lm, handle = adapted(variant, "llama-adapter", tmp_path, registry, prompt_length=3, layers=1, **options)
    notes = handle.save(tmp_path / "ours")
    assert len(notes) == 1 and "zoo's own layout" in notes[0] and reason in notes[0]
    assert_loads_the_same(lm, tmp_path, registry)


def test_version_two_and_names_of_its_own(tmp_path: Path, registry: Registry) -> None:
    """Guards against v2 written as v1, its scales dropped; and prompts of a module that no file of PEFT's is for."""
    _, second = adapted("llama-gqa", "llama-adapter-v2", tmp_path, registry, gate="linear", gate_per="layer")
    assert second.save(tmp_path / "second") == [] and peft_type(tmp_path / "second") == "ZOO"
    model = zoo.build("gpt2", n_layers=2, d_model=32, n_heads=4, vocab_size=64, max_seq_len=32, seed=0)
    handle = zoo.adapt(model, "llama-adapter", gate="linear", gate_per="layer", place="after_projection")
    assert "goes by its own names" in handle.save(tmp_path / "third")[0]


@pytest.mark.parametrize("kind", ["IA3", "ADAPTION_PROMPT"])
def test_bad_directories(kind: str, tmp_path: Path, registry: Registry) -> None:
    """Guards against factors and prompts that are dropped, misplaced or half loaded."""
    make(kind, "llama", tmp_path)
    file = tmp_path / "adapter" / WEIGHTS
    whole = load_file(file)
    key = max(name for name in whole if not name.endswith("gate"))
    module = key.removeprefix("base_model.model.").rpartition(".")[0]
    lm = load_base(tmp_path, registry)

    def refused(tensors: dict[str, Tensor], match: str) -> None:
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=match):
            lm.load_adapter(tmp_path / "adapter")
        assert not [name for name, _ in lm.model.named_parameters() if "ia3" in name or "prompt" in name]

    refused({name: t for name, t in whole.items() if name != key}, f"{module}|blocks.2.attn.prompt is missing")
    refused(
        whole | {key.replace("layers.2", "layers.7"): whole[key].clone()}, r"layers\.7.*has no such (module|attention)"
    )
    refused(whole | {key + "_2": whole[key].clone()}, f"{module}.*_2")
    refused(whole | {key: torch.zeros(5, 7)}, rf"{module}.*\(5, 7\)")
    refused(whole | {key: torch.zeros(2, 1) if kind == "IA3" else torch.zeros(1, 5, 7)}, r"does not fit.*should be")
    save_file(whole, file, metadata={"format": "pt"})
    for option, value in (("modules_to_save", ["lm_head"]), ("new_method", True), ("alpha", 2.0)):
        change(tmp_path / "adapter", **{option: value})
        with pytest.raises(FileFormatError, match=option):
            lm.load_adapter(tmp_path / "adapter")
        change(tmp_path / "adapter", **{option: None})
    change(tmp_path / "adapter", peft_type="VERA")
    with pytest.raises(FileFormatError, match="'VERA'") as error:
        lm.load_adapter(tmp_path / "adapter")
    assert error.value.fix == "It reads: LORA, IA3, ADAPTION_PROMPT."
    change(tmp_path / "adapter", peft_type=kind)
    lm.load_adapter(tmp_path / "adapter")


def test_a_fused_factor_of_another_size(tmp_path: Path, registry: Registry) -> None:
    """Guards the error of a factor that can not be split, and of none at all."""
    make("IA3", "gpt2", tmp_path)
    file = tmp_path / "adapter" / WEIGHTS
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.transformer.h.1.attn.c_attn.ia3_l": torch.ones(143, 1)}, file)
    with pytest.raises(FileFormatError, match=r"143 rows for transformer\.h\.1\.attn\.c_attn, which has 144 outputs"):
        load_base(tmp_path, registry).load_adapter(tmp_path / "adapter")
    save_file({}, file)
    change(tmp_path / "adapter", target_modules=None)
    with pytest.raises(FileFormatError, match="holds no IA3 weights"):
        load_base(tmp_path, registry).load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"adapter_len": None}, "adapter_len = None"),
        ({"adapter_layers": "2"}, "adapter_layers = '2'"),
        ({"adapter_layers": 9}, "most the model's 3 layers"),
        ({"adapter_len": 4}, "should be"),
    ],
)
def test_prompts_of_other_sizes(changes: dict[str, Any], match: str, tmp_path: Path, registry: Registry) -> None:
    make("ADAPTION_PROMPT", "llama", tmp_path)
    change(tmp_path / "adapter", **changes)
    with pytest.raises(InputError, match=match):
        load_base(tmp_path, registry).load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("case", "variant", "match"),
    [
        ("gpt2", "gpt2-unscaled", "scales scores otherwise"),
        ("llama", "qwen2", "is qwen2"),
        ("llama", "llama-biases", "a second time"),
        ("llama", "mistral-no-window", "6 of 12 for a width of 48"),
    ],
)
def test_prompts_of_another_formula(case: str, variant: str, match: str, tmp_path: Path, registry: Registry) -> None:
    """Guards against prompts that fit a model by their shapes, and mean something else there."""
    make("ADAPTION_PROMPT", case, tmp_path / "made")
    reference.save_tiny(tmp_path / "base", *reference.VARIANTS[variant])
    with pytest.raises(FileFormatError, match=match):
        load_base(tmp_path, registry).load_adapter(tmp_path / "made" / "adapter")


class OwnAttention(nn.Module):
    """An attention with a site from before there were places."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)
        self.installed: list[nn.Module] = []

    def attention_site(self) -> Any:
        class Site:
            n_heads, n_kv_heads, width, scale, device = 2, 2, 8, 0.5, torch.device("cpu")
            install = self.installed.append

        return Site()


@pytest.mark.parametrize("name", ["own", "llama-own-head"])
def test_a_place_that_a_site_lacks(name: str, tmp_path: Path, registry: Registry) -> None:
    """Guards against an error after half of the layers have their prompts."""
    if name == "own":
        model: nn.Module = nn.ModuleDict({"0": nn.ModuleDict({"attn": OwnAttention()})})
    else:
        reference.save_tiny(tmp_path / "base", *reference.VARIANTS[name])
        model = load_base(tmp_path, registry).model
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(InputError, match="not after_projection") as error:
        zoo.adapt(model, "llama-adapter", place="after_projection", layers=1)
    assert "AttentionSite" in str(error.value.fix)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    zoo.adapt(model, "llama-adapter", layers=1)


def test_both_places_at_once(tmp_path: Path, registry: Registry) -> None:
    """Guards adapters that share a layer and not a place: the one behind stays when the one before goes, and back."""
    lm, before = adapted("gpt2", "llama-adapter", tmp_path, registry, gate="linear")
    ids = reference.tokens(2, 12)
    with torch.no_grad():
        only_before = lm.model(ids)
        after = lm.adapt("llama-adapter", name="after", gate="linear", place="after_projection")
        randomize(after, seed=7)
        both = lm.model(ids)
        before.deactivate()
        only_after = lm.model(ids)
        assert not torch.equal(both, only_before) and not torch.equal(both, only_after)
        before.activate()
        assert torch.equal(lm.model(ids), both)
        after.detach()
        assert torch.equal(lm.model(ids), only_before)


@pytest.mark.parametrize("variant", ["llama-gqa", "stablelm-12b", "gpt2"])
def test_queries_of_both_places(variant: str, tmp_path: Path, registry: Registry) -> None:
    """Guards the queries that are computed again, which are normalised and rotated as those that attend."""
    lm, _ = adapted(variant, "llama-adapter", tmp_path, registry, layers=1)
    lm.adapt("llama-adapter", name="after", layers=1, place="after_projection")
    seen: list[Tensor] = []
    prompts = [module for module in lm.model.modules() if isinstance(module, Prompt)]
    for module in prompts:
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        lm.model(reference.tokens(2, 12))
    assert len(prompts) == 2
    assert_close(*seen)


@pytest.mark.parametrize("family", ["gpt2", "llama-gqa"], indirect=True)
class TestAfterProjection(AdapterContract):
    """The contract of adapters, for prompts behind the projection."""

    component = "llama-adapter"
    options: ClassVar = {"prompt_length": 5, "place": "after_projection"}

    @pytest.fixture(autouse=True)
    def family(self, request: pytest.FixtureRequest, tmp_path: Path, registry: Registry) -> None:
        reference.save_tiny(tmp_path / "base", *reference.VARIANTS[request.param])
        self.base, self.zoo_registry = tmp_path, registry

    def make_model(self) -> nn.Module:
        """Read again each time."""
        model: nn.Module = load_base(self.base, self.zoo_registry).model
        return model
