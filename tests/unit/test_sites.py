"""Sites from a spec and sites from a module agree; targets name them; plans need no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests import reference
from zoo.adapters.discover import sites_of
from zoo.adapters.plans import LLaMAAdapterOptions, LLaMAAdapterV2Options
from zoo.adapting import adapt, load_adapter
from zoo.api import build, load
from zoo.errors import InputError, UnknownNameError
from zoo.plan.sites import choose_sites, sites_of_spec
from zoo.registry import Registry


@pytest.mark.parametrize("variant", sorted(reference.VARIANTS))
def test_the_spec_says_what_the_module_has(variant: str, tmp_path: Path, registry: Registry) -> None:
    """Guards planning without a model, for every mechanism of every family."""
    reference.save_tiny(tmp_path, *reference.VARIANTS[variant])
    model = load(tmp_path, precision="32-true", device="cpu", registry=registry).model
    assert sorted(map(str, sites_of_spec(model.spec))) == sorted(map(str, sites_of(model)))


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from zoo.adapters.plans import LoRAOptions; from zoo.plan.sites import sites_of_spec;"
        "from zoo.plugins import load_zoo; spec = load_zoo().registry.model('gpt2').spec;"
        "print(LoRAOptions().plan(sites_of_spec(spec)).n_trainable, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(12 * 2 * 8 * (768 + 768)), "False"]


def test_llama_7b_has_the_papers_count(registry: Registry) -> None:
    """Guards layers, prompt length and gates: 30 x 10 x 4096 + 30 x 32, as in arXiv 2303.16199."""
    sites = sites_of_spec(registry.model("llama-2-7b").spec)
    assert LLaMAAdapterOptions().plan(sites).n_trainable == 1_229_760
    bias_and_scale_and_norm = LLaMAAdapterV2Options(prompts=False, scale_on="input").plan(sites)
    norms = sum(shape[0] for name, shape in (bias_and_scale_and_norm.unfrozen or {}).items() if "norm" in name)
    assert norms == 65 * 4096


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("attn.q", ["blocks.0.attn.q", "blocks.1.attn.q"]),
        ("blocks.1.mlp.*", ["blocks.1.mlp.up", "blocks.1.mlp.down"]),
        ("blocks.0.attn.out", ["blocks.0.attn.out"]),
        ("up", ["blocks.0.mlp.up", "blocks.1.mlp.up"]),
    ],
)
def test_targets(target: str, names: list[str]) -> None:
    sites = sites_of(build("gpt2", n_layers=2, d_model=32, n_heads=4, vocab_size=64, max_seq_len=16))
    assert [site.name for site in choose_sites(sites, [target], ("linear",))] == names


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, InputError, "a rank of 0"),
        ({"r": 64}, InputError, "blocks.0.attn.q, which has 32 inputs and 32 outputs. Take r=32"),
        ({"dropout": 1.0}, InputError, "dropout of 1.0"),
        ({"targets": ["attn.p"]}, UnknownNameError, "'attn.p'.*attn.q"),
        ({"targets": "attn.q"}, InputError, r"targets=\['attn.q'\]"),
        ({"layers": [7]}, InputError, "lies in the layers"),
        ({"rank": 4}, UnknownNameError, "option of adapter 'lora' is named 'rank'"),
        ({"dora": True, "targets": ["embed"]}, InputError, "dora takes linears"),
        ({"init": "pissa", "targets": ["attn.q", "embed"]}, InputError, "pissa takes linears, and embed is of"),
        ({"init": "pissa", "dora": True}, InputError, "blocks.0.attn.q can not have both dora and pissa"),
        ({"init": "pissa", "alpha": 0}, InputError, "alpha above 0, and blocks.0.attn.q"),
        ({"init": "pisa"}, UnknownNameError, "'pisa'.*'pissa'"),
        ({"parts": {"attn.q": (2, 0, 2)}}, InputError, "32 outputs of blocks.0.attn.q can not be divided into 3"),
        ({"parts": {"attn.q": (0, 0)}}, InputError, "at blocks.0.attn.q are out of range"),
        ({"parts": {"attn.q": (-1, 2)}}, InputError, "at blocks.0.attn.q are out of range"),
        ({"parts": {"attn.q": (17, 0)}}, InputError, "17 is too large for a part of blocks.0.attn.q.*Take 16"),
        ({"parts": {"attn.q": (2, 0)}, "dora": True}, InputError, "blocks.0.attn.q can not have both dora and parts"),
        ({"parts": {"attn.q": (2, 0)}, "init": "pissa"}, InputError, "attn.q can not have both pissa and parts"),
        ({"parts": {"attn.o": (2, 0)}}, InputError, "key 'attn.o', which names none of the targets: attn.q, attn.v"),
        ({"parts": {"attn.k": (2, 0)}}, InputError, "key 'attn.k', which names none of the targets: attn.q, attn.v"),
        ({"parts": {"embed": (2, 0)}, "targets": ["embed"]}, InputError, "parts takes linears, and embed is of"),
        ({"parts": {"attn.q": 4}}, InputError, r"parts of 'attn.q' are 4.*\(8, 0, 8\)"),
        ({"parts": {"attn.q": ()}}, InputError, r"parts of 'attn.q' are \(\)"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[InputError], message: str) -> None:
    model = build("gpt2", n_layers=2, d_model=32, n_heads=4, vocab_size=64, max_seq_len=16)
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(error, match=message):
        adapt(model, "lora", **options)
    assert [name for name, _ in model.named_parameters()] == before


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            {"embed": nn.Embedding(8, 4), "out": nn.Linear(4, 8)},
            'no linear but the head. Target it by its role: "head"',
        ),
        ({"embed": nn.Embedding(8, 4)}, "this model has no linear. Sites: embed."),
        (
            {"norm": nn.LayerNorm(4)},
            "this model has no linear. The model has no site of the kinds linear, conv, embedd",
        ),
    ],
)
def test_all_linear_where_there_is_none(modules: dict[str, nn.Module], message: str) -> None:
    """Guards against the advice to write what was written."""
    model = nn.ModuleDict(modules)
    with pytest.raises(InputError, match=message) as error:
        adapt(model, "lora", r=2)
    assert "Did you mean" not in str(error.value)
    if "out" in modules:
        assert adapt(model, "lora", r=2, targets=["head"]).plan.additions[0].site.name == "out"


NORMS = [f"blocks.{i}.{place}_norm" for i in range(2) for place in ("attn", "mlp")]


@pytest.mark.parametrize(
    ("norms", "trained"),
    [
        (True, [*NORMS, "norm"]),
        (False, []),
        ([], []),
        (["attn_norm", "norm"], [NORMS[0], NORMS[2], "norm"]),
        (["blocks.1.*"], NORMS[2:]),
        (["=blocks.0.mlp_norm"], [NORMS[1]]),
    ],
    ids=str,
)
def test_trained_norms(norms: bool | list[str], trained: list[str], tmp_path: Path) -> None:
    """Guards the choice in the plan of a spec, on a module, and in a directory."""
    model, again = (
        build("gpt2", n_layers=2, d_model=32, n_heads=4, vocab_size=64, max_seq_len=16, seed=seed) for seed in (0, 0)
    )
    handle = adapt(model, "llama-adapter-v2", norms=norms)
    options = LLaMAAdapterV2Options(norms=norms if isinstance(norms, bool) else tuple(norms))
    assert handle.adapter.options == options
    assert handle.plan.shapes == options.plan(sites_of_spec(model.spec)).shapes
    found = {name.rpartition(".")[0] for name in handle.plan.unfrozen or {}}
    assert found == set(trained)
    assert {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad} >= found
    handle.save(tmp_path)
    assert load_adapter(again, tmp_path).adapter.options == options


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        (["nrom"], "'nrom'. Did you mean 'norm'. Sites: attn_norm, mlp_norm, norm"),
        (["all-linear"], "'all-linear'. Known: attn_norm"),
        ("attn_norm", r"norms=\['attn_norm'\]"),
        (None, "norms are True, False or a list of names, not None"),
    ],
)
def test_norms_that_are_none(norms: Any, message: str) -> None:
    model = build("gpt2", n_layers=2, d_model=32, n_heads=4, vocab_size=64, max_seq_len=16)
    with pytest.raises(InputError, match=message):
        adapt(model, "llama-adapter-v2", norms=norms)


def test_a_model_without_attention_sites() -> None:
    with pytest.raises(InputError, match="attention_site"):
        adapt(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8)), "llama-adapter")


def test_quantized_weights_are_not_trained(tmp_path: Path, registry: Registry) -> None:
    reference.save_tiny(tmp_path, *reference.VARIANTS["llama-gqa"])
    model = load(tmp_path, precision="bf16-true", quantize="int8", device="cpu", registry=registry).model
    with pytest.raises(InputError, match=r"attn\.q\.weight is quantized"):
        adapt(model, "full")
    assert adapt(model, "lora").plan.n_trainable > 0
