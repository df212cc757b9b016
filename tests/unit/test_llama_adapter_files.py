"""Files of the LLaMA-Adapter repository, against its formulas in float64 on LLaMA in Meta's layout.

Shape letters: T tokens, N query heads, K kv heads, H head size, P prompt, D model width, F feed-forward width.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from zoo.adapters.discover import sites_of
from zoo.adapting import adapt
from zoo.api import build
from zoo.convert.llama_adapter_files import read_llama_adapter_checkpoint, reads
from zoo.errors import FileFormatError, InputError
from zoo.families.base import Family
from zoo.plan.sites import sites_of_spec
from zoo.registry import Registry
from zoo.spec import ModelSpec

N_LAYERS, N, H, F, V = 4, 4, 6, 28, 31
D = N * H
Tensors = dict[str, Tensor]
LINEARS = {
    "attention.wq": "attn.q",
    "attention.wk": "attn.k",
    "attention.wv": "attn.v",
    "attention.wo": "attn.out",
    "feed_forward.w1": "mlp.gate",
    "feed_forward.w2": "mlp.down",
    "feed_forward.w3": "mlp.up",
}
NORMS = {"attention_norm": "attn_norm", "ffn_norm": "mlp_norm", "norm": "norm"}
TOKENS = torch.tensor([3, 14, 15, 9, 26, 5, 30])


def random(*shape: int, center: float = 0.0) -> Tensor:
    return center + 0.3 * torch.randn(*shape, dtype=torch.float64)


def shapes(n_kv_heads: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each linear."""
    kv = n_kv_heads * H
    wide = {"feed_forward.w1": (F, D), "feed_forward.w3": (F, D), "feed_forward.w2": (D, F)}
    return {"attention.wq": (D, D), "attention.wk": (kv, D), "attention.wv": (kv, D), "attention.wo": (D, D), **wide}


def base_weights(n_kv_heads: int) -> Tensors:
    """A LLaMA as Meta stores it."""
    found = {"tok_embeddings.weight": random(V, D), "output.weight": random(V, D), "norm.weight": random(D, center=1)}
    for i in range(N_LAYERS):
        found |= {f"layers.{i}.{name}.weight": random(*shape) for name, shape in shapes(n_kv_heads).items()}
        found |= {f"layers.{i}.{name}.weight": random(D, center=1) for name in ("attention_norm", "ffn_norm")}
    return found


def forward(w: Tensors, n_kv_heads: int, layers: int, length: int, bounded: bool = True) -> Tensor:
    """Logits (T, V) of weights and adapter together, from the papers' formulas and v2's released code."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return (x * w.get(f"{name}_scale", 1.0)) @ w[f"{name}.weight"].T + w.get(f"{name}_bias", 0.0)

    def rotated(x_TNH: Tensor) -> Tensor:
        angles = torch.arange(len(x_TNH))[:, None] * 10000.0 ** (-torch.arange(0, H, 2, dtype=torch.float64) / H)
        pairs = (
            torch.complex(x_TNH[..., 0::2], x_TNH[..., 1::2]) * torch.polar(torch.ones_like(angles), angles)[:, None]
        )
        return torch.stack([pairs.real, pairs.imag], dim=-1).flatten(-2)

    def attention(x: Tensor, i: int) -> Tensor:
        at, n_tokens, result = f"layers.{i}.attention", len(x), torch.zeros(len(x), N, H, dtype=torch.float64)
        prompt = i - (N_LAYERS - layers)
        rows = w["adapter_query.weight"][prompt * length : (prompt + 1) * length] if prompt >= 0 else x[:0]
        q, k, v = (linear(x, f"{at}.w{name}").view(n_tokens, -1, H) for name in "qkv")
        q, k = rotated(q), rotated(k)
        prompt_k, prompt_v = (linear(rows, f"{at}.w{name}").view(-1, n_kv_heads, H) for name in "kv")
        for n in range(N):
            of = n * n_kv_heads // N
            scores = q[:, n] @ k[:, of].T / H**0.5
            result[:, n] = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf).softmax(-1) @ v[:, of]
            if len(rows):
                gate = w[f"{at}.gate"].flatten().expand(N)[n]
                weights = (q[:, n] @ prompt_k[:, of].T / H**0.5).softmax(-1)
                result[:, n] += (gate.tanh() if bounded else gate) * weights @ prompt_v[:, of]
        return linear(result.flatten(1), f"{at}.wo")

    x = w["tok_embeddings.weight"][TOKENS]
    for i in range(N_LAYERS):
        x = x + attention(norm(x, f"layers.{i}.attention_norm"), i)
        h, at = norm(x, f"layers.{i}.ffn_norm"), f"layers.{i}.feed_forward"
        x = x + linear(torch.nn.functional.silu(linear(h, f"{at}.w1")) * linear(h, f"{at}.w3"), f"{at}.w2")
    return norm(x, "norm") @ w["output.weight"].T


@pytest.fixture
def spec(registry: Registry) -> ModelSpec:
    family: Family = registry.load("family", "llama")
    config = {"hidden_size": D, "num_attention_heads": N, "intermediate_size": F, "num_hidden_layers": N_LAYERS}
    return family.read_config(config | {"vocab_size": V})


def in_our_order(rows: Tensor) -> Tensor:
    """Rows of q or k by head: first the even ones, then the odd ones."""
    heads = rows.view(-1, H, *rows.shape[1:])
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).view(rows.shape)


def decoder(w: Tensors, spec: ModelSpec, n_kv_heads: int) -> Any:
    """Zoo's, with weights of Meta's brought into Hugging Face's layout."""
    ours = {"embed.weight": w["tok_embeddings.weight"], "head.weight": w["output.weight"]}
    ours["norm.weight"] = w["norm.weight"]
    for i in range(N_LAYERS):
        for theirs, role in {**LINEARS, "attention_norm": "attn_norm", "ffn_norm": "mlp_norm"}.items():
            weight = w[f"layers.{i}.{theirs}.weight"]
            ours[f"blocks.{i}.{role}.weight"] = in_our_order(weight) if role in ("attn.q", "attn.k") else weight
    model = build(spec, n_kv_heads=n_kv_heads).double()
    model.load_state_dict(ours)
    return model.eval()


def put_on(model: Any, path: Path, **options: Any) -> dict[str, Any]:
    stored = read_llama_adapter_checkpoint(path, sites_of(model), **options)
    adapt(model, stored.adapter, **stored.options).load_state_dict(stored.state)
    return stored.options


def assert_logits(model: Any, expected: Tensor) -> None:
    with torch.no_grad():
        assert_close(model(TOKENS[None])[0], expected, atol=1e-5, rtol=1e-5)


def v1(layers: int = 2, length: int = 10, gate: tuple[int, ...] = (1, N, 1, 1)) -> Tensors:
    gates = {f"layers.{i}.attention.gate": 3 * random(*gate) for i in range(N_LAYERS)}
    return {"adapter_query.weight": 4 * random(layers * length, D), **gates}


def v2(n_kv_heads: int = N) -> Tensors:
    """Without prompts."""
    found: Tensors = {"norm.weight": random(D, center=1)}
    for i in range(N_LAYERS):
        for name, (d_out, d_in) in shapes(n_kv_heads).items():
            found[f"layers.{i}.{name}_scale"] = random(d_in, center=1)
            found[f"layers.{i}.{name}_bias"] = random(d_out)
        found |= {f"layers.{i}.{name}.weight": random(D, center=1) for name in ("attention_norm", "ffn_norm")}
    return found


def save(path: Path, content: Any) -> Path:
    torch.save(content, path / "adapter.pth")
    return path / "adapter.pth"


@pytest.mark.parametrize("n_kv_heads", [N, 2])
@pytest.mark.parametrize(("layers", "length"), [(2, 10), (4, 10), (3, 4), (1, 1)])
def test_v1(n_kv_heads: int, layers: int, length: int, tmp_path: Path, spec: ModelSpec) -> None:
    """Guards which layers get which vectors, tanh, gates by head, and prompts that meet permuted rows of q and k."""
    base, adapter = base_weights(n_kv_heads), v1(layers, length)
    model = decoder(base, spec, n_kv_heads)
    options = put_on(model, save(tmp_path, adapter), **({} if length == 10 else {"layers": layers}))
    assert options == {"prompt_length": length, "layers": layers, "gate": "tanh", "gate_per": "head"}
    assert_logits(model, forward(base | adapter, n_kv_heads, layers, length))


@pytest.mark.parametrize(
    ("gate", "given", "bounded"),
    [((1, N, 1, 1), "linear", False), ((1, N, 1, 1), "tanh", True), ((1,), None, False), ((1,), "tanh", True)],
)
def test_gates(gate: tuple[int, ...], given: Any, bounded: bool, tmp_path: Path, spec: ModelSpec) -> None:
    """Guards files of the first version, with one gate a layer, and the choice that no file states."""
    base, adapter = base_weights(N), v1(gate=gate)
    model = decoder(base, spec, N)
    put_on(model, save(tmp_path, {"model": adapter, "epoch": 4}), gate=given)
    assert_logits(model, forward(base | adapter, N, 2, 10, bounded))


@pytest.mark.parametrize("n_kv_heads", [N, 2])
@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("norms", [True, False, ("attn_norm", "mlp_norm"), ("norm",)])
def test_v2(n_kv_heads: int, layers: int, norms: bool | tuple[str, ...], tmp_path: Path, spec: ModelSpec) -> None:
    """Guards scales on inputs, the order of q's and k's biases, names of the feed-forward's three, norms, prompts.

    The released 65B model lacks the last norm.
    """
    base, adapter = base_weights(n_kv_heads), v2(n_kv_heads)
    trained = NORMS.values() if norms is True else norms or ()
    adapter = {key: tensor for key, tensor in adapter.items() if NORMS.get(key.split(".")[-2]) in (None, *trained)}
    if layers:
        prompts = v1(layers)
        del prompts["layers.0.attention.gate"]  # as in the released code, where lower layers have none
        adapter |= prompts
    model = decoder(base, spec, n_kv_heads)
    options = put_on(model, save(tmp_path, {"model": adapter}))
    assert (options["norms"], options["prompts"], options["scale_on"]) == (norms, bool(layers), "input")
    assert_logits(model, forward(base | adapter, n_kv_heads, layers, 10))


# --- what is refused -------------------------------------------------------------------------------------------

OTHER = "Take the model that it was trained on"


def refused(path: Path, spec: ModelSpec, says: str, **options: Any) -> None:
    with pytest.raises(InputError, match=says) as error:
        read_llama_adapter_checkpoint(path, sites_of_spec(spec), **options)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_each_tensor_is_needed(kind: str, tmp_path: Path, spec: ModelSpec) -> None:
    good = v1() if kind == "v1" else v2() | v1()
    for key in good:
        if key in ("layers.0.attention.gate", "layers.1.attention.gate"):
            continue  # of layers without prompts
        if key == "norm.weight":
            continue  # the released code does not train it
        without = {k: v for k, v in good.items() if k != key}
        without_prompts = key == "adapter_query.weight" and kind == "v2"
        says = r"layers\.0\.attention\.gate.* no place" if without_prompts else rf"lacks {key}"
        refused(save(tmp_path, without), spec, says)
        if key != "adapter_query.weight":
            refused(
                save(tmp_path, good | {key: torch.ones(*good[key].shape, 2)}), spec, rf"{key} of the shape .*{OTHER}"
            )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"layers.9.attention.gate": torch.ones(1, N, 1, 1)}, r"layers\.9\.attention\.gate, for which"),
        ({"tok_embeddings.weight": torch.ones(V, D)}, r"tok_embeddings\.weight, for which .* only adapter_query"),
        ({"layers.0.attention.wq.lora": torch.ones(2)}, r"wq\.lora, for which"),
        ({"layers.0.attention.wq_scale": torch.ones(D)}, r"lacks layers\.0\.attention\.wk_bias"),
        ({"visual_query.weight": torch.ones(2)}, "multimodal"),
        ({"llama.norm.weight": torch.ones(2)}, "multimodal"),
        ({"adapter_query.weight": torch.ones(20, D + 1)}, rf"shape \(20, {D + 1}\), which is \(20, {D}\)"),
    ],
)  # fmt: skip
def test_unknown_tensors(more: Tensors, says: str, tmp_path: Path, spec: ModelSpec) -> None:
    refused(save(tmp_path, v1() | more), spec, says)


@pytest.mark.parametrize(
    ("rows", "layers"),
    [
        ((15, D), None),
        ((50, D), None),
        ((5, D), None),
        ((0, D), None),
        ((20,), None),
        ((20, D), 3),
        ((20, D), 5),
        ((20, D), 0),
        ((20, D), -1),
        ((0, D), 1),
    ],
)
def test_prompts_that_can_not_be_divided(
    rows: tuple[int, ...], layers: int | None, tmp_path: Path, spec: ModelSpec
) -> None:
    path = save(tmp_path, v1() | {"adapter_query.weight": torch.ones(rows)})
    refused(path, spec, r"can not be divided into .*of a model of 4\. Give layers=", layers=layers)


def test_norms_of_some_layers(tmp_path: Path, spec: ModelSpec) -> None:
    """Guards against a norm that would have to be made up: only those of all layers are left out together."""
    adapter = v2()
    del adapter["layers.1.ffn_norm.weight"]
    refused(save(tmp_path, adapter), spec, rf"norms of some layers, and lacks layers\.1\.ffn_norm\.weight.*{OTHER}")


def test_another_model(tmp_path: Path, spec: ModelSpec) -> None:
    for changes in ({"n_heads": 8}, {"d_model": 30}):
        other = ModelSpec.from_dict(spec.to_dict() | changes)
        for adapter in (v1(), v2()):
            refused(save(tmp_path, adapter), other, OTHER)
    refused(save(tmp_path, v1(layers=4)), ModelSpec.from_dict(spec.to_dict() | {"n_layers": 3}), "of a model of 3")


def test_files(tmp_path: Path, spec: ModelSpec) -> None:
    """Guards what is taken for such a file, and pickles that hold more than tensors."""
    good = save(tmp_path, v1())
    assert reads(good)
    assert reads(save(tmp_path, {"model": v2()}))
    good.write_bytes(good.read_bytes()[:-900])
    refused(good, spec, "truncated or damaged")
    refused(tmp_path / "none.pth", spec, "is missing")
    refused(save(tmp_path, {"model": v1(), "args": Namespace()}), spec, "argparse")
    assert not reads(save(tmp_path, {"model": v1(), "args": Namespace()}))
    for other in (tmp_path, tmp_path / "none.pth", save(tmp_path, {"weight": torch.ones(2)}), save(tmp_path, [1])):
        assert not reads(other)
    refused(save(tmp_path, {"weight": torch.ones(2)}), spec, r"lacks adapter_query\.weight")
    with pytest.raises(FileFormatError, match="holds a list"):
        read_llama_adapter_checkpoint(save(tmp_path, [1]), sites_of_spec(spec))
