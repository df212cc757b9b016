"""Checkpoints of the LLaMA-Adapter repository (OpenGVLab): v1 of ``alpaca_finetuning_v1``, v2 of the 65B chat model.

They are for LLaMA in Meta's layout; zoo's decoder is in Hugging Face's. How many layers have prompts, and how gates
enter, no file says. Files of the multimodal models are not read.

Shape letters: P prompt, L layers with prompts, D model width, N query heads, H head size, D_in and D_out of a linear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from zoo.convert.adapter_files import StoredAdapter
from zoo.convert.adapter_tensors import StoredTensor, norms_option, take_apart
from zoo.convert.torch_file import checked_tensors, load_torch_file, some
from zoo.errors import FileFormatError, InputError
from zoo.plan.sites import Site

PROMPT_LENGTH = 10
"""P of every released model (``adapter_len``)."""
_QUERY = "adapter_query.weight"
_LINEARS = {
    "attn.q": "attention.wq",
    "attn.k": "attention.wk",
    "attn.v": "attention.wv",
    "attn.out": "attention.wo",
    "mlp.gate": "feed_forward.w1",
    "mlp.down": "feed_forward.w2",
    "mlp.up": "feed_forward.w3",
}
_NORMS = {"attn_norm": "attention_norm", "mlp_norm": "ffn_norm"}
_GATE = re.compile(r"layers\.\d+\.attention\.gate")
_V2 = re.compile(r"layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])_(scale|bias)")
_MULTIMODAL = ("llama.", "visual_", "clip")
_FIX = (
    f"Take the model that it was trained on, and of a training checkpoint only {_QUERY}, layers.N.attention.gate "
    "and what else was trained."
)


def reads(path: Path) -> bool:
    """Whether this is a file of tensors by the names of the LLaMA-Adapter repository."""
    if path.suffix not in (".pth", ".pt") or not path.is_file():
        return False
    try:
        tensors = _read_tensors(path)
    except FileFormatError:
        return False
    return _QUERY in tensors or any(_V2.fullmatch(key) for key in tensors)


def read_llama_adapter_checkpoint(
    path: Path,
    sites: Sequence[Site],
    *,
    layers: int | None = None,
    gate: Literal["tanh", "linear"] | None = None,
) -> StoredAdapter:
    """Read an adapter for a model with these sites.

    Args:
        sites: of zoo's decoder.
        layers: how many of the topmost layers have prompts (``adapter_layer``); by default so many that a prompt has
            `PROMPT_LENGTH` vectors.
        gate: what bounds the gates. By default ``tanh``, as in the code that trains; the repository's code that
            generates (``llama/model.py``) leaves it out, which is ``linear``, and so did all of its code while there
            was one gate a layer, so that files with such gates are ``linear`` by default.

    Raises:
        FileFormatError: the file is missing or damaged, of another model or of a multimodal one, or holds norms of
            some layers and not of all.
        InputError: the prompts can not be divided among so many layers.
    """
    tensors = _read_tensors(path)
    if alien := [key for key in tensors if key.startswith(_MULTIMODAL)]:
        raise FileFormatError(
            f"{path} holds {some(alien)}: it is of a multimodal LLaMA-Adapter.", fix="Zoo reads those for text alone."
        )
    options: dict[str, Any] = {}
    wanted: dict[str, StoredTensor] = {}
    notes: tuple[str, ...] = ()
    is_v2 = any(_V2.fullmatch(key) for key in tensors)
    if _QUERY in tensors:
        wanted, options = _prompts(path, tensors, sites, layers, gate)
        idle = {f"layers.{site.layer}.attention.gate" for site in sites if site.kind == "attention"} - wanted.keys()
        tensors = {key: tensor for key, tensor in tensors.items() if key not in idle}
        notes = _assumed(path, options, layers, gate)
    elif not is_v2:
        raise FileFormatError(f"{path} lacks {_QUERY}.", fix="Give the file with the prompts and gates.")
    if not is_v2:
        return StoredAdapter("llama-adapter", options, take_apart(tensors, wanted, path, fix=_FIX), notes)
    norms, trained = _norms(path, tensors, sites)
    linears = [site for site in sites if site.role in _LINEARS]
    options |= {"scale_on": "input", "norms": trained, "prompts": bool(wanted)}
    options["targets"] = tuple(f"={site.name}" for site in linears)
    state = take_apart(tensors, wanted | _affine(linears) | norms, path, fix=_FIX)
    return StoredAdapter("llama-adapter-v2", options, state | _biases_in_our_order(state, sites), notes)


def _assumed(path: Path, options: Mapping[str, Any], layers: int | None, gate: str | None) -> tuple[str, ...]:
    given = {"layers": layers, "gate": gate}
    assumed = [f"{name}={options[name]}" for name, value in given.items() if value is None]
    said = f"{path} does not say how it was trained: {' and '.join(assumed)} assumed. Else give it, as in {path},"
    return (said + ",".join(f"{name}=..." for name, value in given.items() if value is None) + ".",) if assumed else ()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    content = load_torch_file(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    return checked_tensors(content, str(path))


def _prompts(
    path: Path, tensors: Mapping[str, Tensor], sites: Sequence[Site], layers: int | None, gate: str | None
) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Prompts (L P, D) and gates (1, N, 1, 1), or (1,), of the topmost L layers; and the options that say so.

    The lower layers may have gates, which that code creates everywhere and does not use there.
    """
    attention = {site.layer: site for site in sites if site.kind == "attention"}
    length, n_layers = _divided(path, tensors[_QUERY], len(attention), layers)
    top = dict(list(attention.items())[-n_layers:])
    per_layer = any(tensors[key].shape == (1,) for key in tensors if _GATE.fullmatch(key))
    # Meta's wk has its rows in another order. That does not concern prompts: they are inputs of k, not rows of it, and
    # the queries that meet their keys have that other order too.
    prompts = {f"{site.name}.prompt": (length, site.shape[0]) for site in top.values()}
    wanted = {_QUERY: StoredTensor.stacked(prompts)}
    for layer, site in top.items():
        n_heads = site.shape[1]
        shape, ours = ((1,), (1,)) if per_layer else ((1, n_heads, 1, 1), (n_heads,))
        wanted[f"layers.{layer}.attention.gate"] = StoredTensor(shape, {f"{site.name}.gate": ours})
    options = {
        "prompt_length": length,
        "layers": n_layers,
        "gate": gate or ("linear" if per_layer else "tanh"),
        "gate_per": "layer" if per_layer else "head",
    }
    return wanted, options


def _divided(path: Path, query: Tensor, n_attention: int, layers: int | None) -> tuple[int, int]:
    """P and L."""
    rows = query.shape[0] if query.dim() == 2 else 0
    n_layers = rows // PROMPT_LENGTH if layers is None else layers
    length = PROMPT_LENGTH if layers is None else rows // max(1, layers)
    if not 1 <= n_layers <= n_attention or length < 1 or length * n_layers != rows:
        among = f"prompts of {PROMPT_LENGTH}" if layers is None else f"the prompts of {layers} layers"
        raise InputError(
            f"{path}: {_QUERY} is {tuple(query.shape)}, which can not be divided into {among} for the topmost layers "
            f"of a model of {n_attention}.",
            fix="Give layers=, the adapter_layer that it was trained with.",
        )
    return length, n_layers


def _affine(linears: Sequence[Site]) -> dict[str, StoredTensor]:
    """Scales (D_in,) and biases (D_out,) of the linears of every layer."""
    wanted = {}
    for site in linears:
        d_out, d_in = site.shape
        at = f"layers.{site.layer}.{_LINEARS[site.role]}"
        wanted[f"{at}_scale"] = StoredTensor((d_in,), {f"{site.name}.v2_scale": (d_in,)})
        wanted[f"{at}_bias"] = StoredTensor((d_out,), {f"{site.name}.v2_bias": (d_out,)})
    return wanted


def _norms(
    path: Path, tensors: Mapping[str, Tensor], sites: Sequence[Site]
) -> tuple[dict[str, StoredTensor], bool | tuple[str, ...]]:
    """The norms that the file holds, each in all layers or in none, and the option that says which those are.

    The released code trains those of layers, and leaves the last one as it is.
    """
    norms: dict[str, Site] = {}
    for site in (site for site in sites if site.kind == "norm"):
        at = "norm" if site.layer is None else f"layers.{site.layer}.{_NORMS.get(site.role, site.role)}"
        norms[f"{at}.weight"] = site
    roles = {site.role for key, site in norms.items() if key in tensors}
    trained = {key: site for key, site in norms.items() if site.role in roles}
    if missing := trained.keys() - tensors.keys():
        raise FileFormatError(f"{path} holds norms of some layers, and lacks {some(missing)}.", fix=_FIX)
    wanted = {key: StoredTensor(site.shape, {f"{site.name}.weight": site.shape}) for key, site in trained.items()}
    return wanted, norms_option(trained.values(), norms.values())


def _biases_in_our_order(state: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """The biases of q and k; in Meta's layout the two sides of a rotary pair are neighbours, in ours H / 2 apart."""
    heads = {site.layer: site.shape[1] for site in sites if site.kind == "attention"}
    queries = {site.layer: site.shape[0] for site in sites if site.role == "attn.q"}
    moved = {}
    for site in sites:
        if site.role in ("attn.q", "attn.k"):
            d_head = queries[site.layer] // heads[site.layer]
            pairs = state[f"{site.name}.v2_bias"].view(-1, d_head // 2, 2)
            moved[f"{site.name}.v2_bias"] = pairs.transpose(1, 2).flatten()
    return moved
