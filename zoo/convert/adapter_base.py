"""What model an adapter directory was made for: ``base`` in a ``zoo.yaml`` beside its two files.

It is in a file of its own because PEFT warns of keys that it does not know in ``adapter_config.json``, and what is in
the header of the weights would change their digest. PEFT leaves the file alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from zoo.adapters.discover import parameters_of, sites_of
from zoo.convert.adapter_files import WEIGHTS
from zoo.convert.base import facts_of
from zoo.errors import FileFormatError, InputError
from zoo.models.attention import attention_scale
from zoo.models.gpt import GPT
from zoo.sources.provenance import FILE_NAME, Provenance, read_facts, read_provenance, sha256_of, write_provenance
from zoo.spec import ModelSpec

_SAME_MEANING = {
    "max_seq_len": "a context is stretched without new weights",
    "window": "as max_seq_len: how far a model looks",
    "full_attention_layers": "as window",
    "rope.scaling": "as max_seq_len",
    "vocab_size": "rows are padded, and added for new tokens; an adapter of those rows has their number in its shapes",
    "tie_embeddings": "a copy of a weight computes the same",
    "norm_bias": "merging adds biases; an adapter that holds biases names them",
    "qkv_bias": "as norm_bias",
    "attn_out_bias": "as norm_bias",
    "mlp_bias": "as norm_bias",
    "head_bias": "as norm_bias",
}
"""Fields of a spec that may differ, and why: the parameters that both models have mean the same in both."""


def record_base(directory: Path, root: nn.Module, name: str | None) -> None:
    """Write what model an adapter is for, beside its files; what else ``zoo.yaml`` says stays.

    A decoder of zoo's is described by its spec; another module by a digest of the names and shapes of its parameters.

    Args:
        directory: with the weights, whose digest is written too.
        root: the model, with or without adapters.
        name: where it came from.
    """
    base: dict[str, Any] = {"model": name, "module": type(root).__name__}
    if isinstance(root, GPT):
        base["spec"] = root.spec.to_dict()
    else:
        base |= {"parameters": _count(root), "shapes": _digest(root)}
    known = read_provenance(directory)
    digests = {**known.sha256, WEIGHTS: sha256_of(directory / WEIGHTS)}
    write_provenance(directory, Provenance(known.source, known.model, digests), base=base)


def check_base(directory: Path, root: nn.Module) -> None:
    """Refuse an adapter of another model, where its directory says what it was made for.

    A record of a decoder of zoo's says nothing about another module, nor the other way round; nor does one whose
    weights have been replaced, as by training on with PEFT.

    Raises:
        InputError: it was made for another model; the message says what differs.
        FileFormatError: ``zoo.yaml`` is damaged, or describes a model that this version of zoo does not know.
    """
    base = read_facts(directory).get("base")
    if not isinstance(base, Mapping) or not (differences := _differences(base, root, directory)):
        return
    if read_provenance(directory).sha256.get(WEIGHTS) != sha256_of(directory / WEIGHTS):
        return
    more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
    made_for = f", {base['model']}" if base.get("model") else ""
    raise InputError(
        f"the adapter {directory} was made for another model{made_for}: {'; '.join(differences[:5])}{more}.",
        fix="Take the model that it was made for. If you know that it fits this one: load_adapter(..., any_base=True), "
        f"or on the command line {directory},any_base=true.",
    )


def _differences(base: Mapping[str, Any], root: nn.Module, directory: Path) -> list[str]:
    if isinstance(root, GPT) and isinstance(base.get("spec"), Mapping):
        try:
            there = _meaning(ModelSpec.from_dict(base["spec"]))
        except InputError as error:
            raise FileFormatError(
                f"{directory / FILE_NAME} describes a model that this version of zoo does not know: {error.message}"
            ) from None
        here = _meaning(root.spec)
        names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        return [f"{name} is {here.get(name)} here and {there.get(name)} there" for name in names]
    if not isinstance(root, GPT) and "shapes" in base and base["shapes"] != _digest(root):
        ours = f"{type(root).__name__} with {_count(root)} parameters here"
        theirs = f"{base.get('module')} with {base.get('parameters')} there"
        return [f"the names or shapes of its modules are others, of {ours} and {theirs}"]
    return []


def _meaning(spec: ModelSpec) -> dict[str, Any]:
    """The facts of a spec that say what its parameters mean; numbers as far as every file format keeps them."""
    facts = facts_of(spec, lambda number: float(f"{number:.5g}"))
    kept = {k: v for k, v in facts.items() if not any(k == f or k.startswith(f"{f}.") for f in _SAME_MEANING)}
    return kept | {"attn_scale": float(f"{attention_scale(spec, 0):.5g}"), "embed_scale": kept["embed_scale"] or 1.0}


def _count(root: nn.Module) -> int:
    return sum(parameter.numel() for parameter in parameters_of(root).values())


def _digest(root: nn.Module) -> str:
    """Of the names and shapes of a model's parameters, but for biases and the rows of embeddings and the head.

    Those may differ for the reasons that there are for specs.
    """
    lines = (f"{name} {'x'.join(map(str, shape))}" for name, shape in _shapes(root))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _shapes(root: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    sites = [site for site in sites_of(root) if site.kind != "attention"]
    for site in sites:
        yield site.name, site.shape[1:] if site.kind == "embedding" or site.role == "head" else site.shape
    named = {name for site in sites for name in site.parameters}
    for name, parameter in parameters_of(root).items():
        if name not in named:
            yield name, tuple(parameter.shape)
