"""Names, shapes and counts of a model's parameters, from its spec alone.

Shape letters: V vocabulary, D model width, N query heads, K kv heads, H head size, F ffn width.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from zoo.spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(spec: ModelSpec) -> Shapes:
    """Shape of every parameter of the decoder that ``spec`` describes, by its name in the module tree.

    A tied head is the embedding itself and is not listed. Linear weights are (out, in), as in `torch.nn.Linear`.
    """
    block = list(_block(spec))
    blocks = {f"blocks.{layer}.{name}": shape for layer in range(spec.n_layers) for name, shape in block}
    return _before(spec) | blocks | _after(spec)


def count_parameters(spec: ModelSpec) -> int:
    """Number of parameters, tied ones once."""
    in_block = sum(prod(shape) for _, shape in _block(spec))
    return spec.n_layers * in_block + sum(prod(shape) for shape in (_before(spec) | _after(spec)).values())


def _before(spec: ModelSpec) -> Shapes:
    shapes: Shapes = {"embed.weight": (spec.vocab_size, spec.d_model)}
    if spec.rope is None:
        shapes["positions.weight"] = (spec.max_seq_len, spec.d_model)
    return shapes


def _after(spec: ModelSpec) -> Shapes:
    head = dict(_linear("head", spec.d_model, spec.vocab_size, spec.head_bias))
    if spec.tie_embeddings:
        del head["head.weight"]
    return dict(_norm("norm", spec)) | head


def _block(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, f, q_width, kv_width = spec.d_model, spec.d_ffn, spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head
    before, after = spec.norm_place != "after", spec.norm_place != "before"
    if before:
        yield from _norm("attn_norm", spec)
    yield from _linear("attn.q", d, q_width, spec.qkv_bias)
    yield from _linear("attn.k", d, kv_width, spec.qkv_bias)
    yield from _linear("attn.v", d, kv_width, spec.qkv_bias)
    yield from _linear("attn.out", q_width, d, spec.attn_out_bias)
    yield from _qk_norm("attn.q_norm", spec, spec.n_heads)
    yield from _qk_norm("attn.k_norm", spec, spec.n_kv_heads)
    if after:
        yield from _norm("attn_post_norm", spec)
    if before and spec.block != "parallel_shared_norm":
        yield from _norm("mlp_norm", spec)
    if spec.mlp == "gated":
        yield from _linear("mlp.gate", d, f, spec.mlp_bias)
    yield from _linear("mlp.up", d, f, spec.mlp_bias)
    yield from _linear("mlp.down", f, d, spec.mlp_bias)
    if after:
        yield from _norm("mlp_post_norm", spec)


def _linear(name: str, d_in: int, d_out: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (d_out, d_in)
    if bias:
        yield f"{name}.bias", (d_out,)


def _qk_norm(name: str, spec: ModelSpec, n_heads: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if spec.qk_norm == "head":
        yield f"{name}.weight", (spec.d_head,)
    elif spec.qk_norm == "width":
        yield f"{name}.weight", (n_heads * spec.d_head,)
    elif spec.qk_norm == "heads":
        yield from ((f"{name}.{head}.weight", (spec.d_head,)) for head in range(n_heads))


def _norm(name: str, spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    if spec.norm_affine:
        yield f"{name}.weight", (spec.d_model,)
    if spec.norm_affine and spec.norm_bias:
        yield f"{name}.bias", (spec.d_model,)
