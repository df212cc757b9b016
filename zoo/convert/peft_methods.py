"""PEFT's directories of (IA)^3 and of LLaMA-Adapter v1, which it calls adaption prompts; LoRA's are in `peft`.

PEFT and zoo compute the same but for this: zoo takes the scores of prompts in float32, PEFT in the dtype of the
queries; on GPT-2 in training, PEFT adds prompts after the residual dropout and zoo before it. Models on which PEFT's
formula is another are refused, both ways: it always scales scores by 1 / sqrt(H), takes D / (K H) for the size of
groups, and adds the bias of a projection that it sends prompts through once more.

Shape letters: D_out, D_in of a module, P prompt, D model width, N heads, K kv heads, H head size.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.adapters.attach import AttachedAdapter
from zoo.adapters.plans import LLaMAAdapterOptions
from zoo.convert.adapter_files import CONFIG, StoredAdapter, write_files
from zoo.convert.adapter_names import OwnNames
from zoo.errors import FileFormatError, InputError
from zoo.models.attention import attention_scale
from zoo.plan.sites import Place

_COMMON_KEYS = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
}
_IA3_KEYS = _COMMON_KEYS | {"exclude_modules", "feedforward_modules", "fan_in_fan_out", "init_ia3_weights"}
_PROMPT_KEYS = _COMMON_KEYS | {"adapter_len", "adapter_layers"}
PROMPT_PLACES: dict[str, Place] = {
    "gpt2": "after_projection",
    "llama": "before_projection",
    "mistral": "before_projection",
}
"""The model types for which PEFT has prompts, and where it adds their results."""


def read_ia3(config: Mapping[str, Any], tensors: Mapping[str, Tensor], names: OwnNames, where: Path) -> StoredAdapter:
    """Factors ``<module>.ia3_l``: (D_out, 1), or (1, D_in) of a feed-forward module; also of transposed weights.

    Raises:
        FileFormatError: an option is not zoo's, or a tensor is unknown.
    """
    _refuse_options(config, _IA3_KEYS, where)
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        shape = tuple(tensor.shape)
        if leaf != "ia3_l" or len(shape) != 2 or 1 not in shape:
            raise FileFormatError(f"{where}: the tensor {key} {shape} is no ia3_l of (outputs, 1) or (1, inputs).")
        sites = names.sites(module)
        if shape[1] == 1:
            parts = zip(sites, names.split(module, tensor.flatten()), strict=True)
            state |= {f"{site}.ia3_output": part for site, part in parts}
        else:
            state |= {f"{site}.ia3_input": tensor.flatten() for site in sites}
    options = {
        "targets": tuple(f"={key.removesuffix('.ia3_output')}" for key in state if key.endswith(".ia3_output")),
        "feedforward": tuple(f"={key.removesuffix('.ia3_input')}" for key in state if key.endswith(".ia3_input")),
    }
    return StoredAdapter("ia3", options, state)


def write_ia3(handle: AttachedAdapter, directory: Path, names: OwnNames, *, base: str | None = None) -> list[str]:
    """Write (IA)^3 as PEFT does; returns what a reader should know, one line each.

    Raises:
        InputError: PEFT's layout can not hold it. Nothing is written.
    """
    state = handle.state_dict()
    modules = list(dict.fromkeys(names.module(addition.site.name) for addition in handle.plan.additions))
    factors = {module: _factor(module, names, state) for module in modules}
    inputs = sorted(module for module in modules if f"{names.sites(module)[0]}.ia3_input" in state)
    config = common_config("IA3", handle, names, base) | {
        "target_modules": sorted(modules),
        "feedforward_modules": _exactly(inputs, [module for module in modules if module not in inputs]),
        "fan_in_fan_out": all(map(names.is_transposed, modules)),
        "init_ia3_weights": True,
        "modules_to_save": None,
    }
    write_files(directory, config, {f"{module}.ia3_l": factor for module, factor in factors.items()})
    notes = []
    for module in (module for module in modules if module not in inputs):
        inside = names.sites(module)
        n_given = sum(f"{site}.ia3_output" in state for site in inside)
        if n_given < len(inside):
            notes.append(f"{module}: has factors for {n_given} of its {len(inside)} parts; ones for the others")
    return notes


def _factor(module: str, names: OwnNames, state: Mapping[str, Tensor]) -> Tensor:
    """The factors of a module that holds one or several of our sites: (D_out, 1) or (1, D_in)."""
    sites = names.sites(module)
    inputs = [state[f"{site}.ia3_input"] for site in sites if f"{site}.ia3_input" in state]
    if inputs:
        if len(inputs) < len(sites) or not all(torch.equal(one, inputs[0]) for one in inputs):
            raise InputError(f"{module} holds {', '.join(sites)}, whose inputs are not scaled alike")
        return inputs[0][None]
    outputs = [state.get(f"{site}.ia3_output") for site in sites]
    some = next(one for one in outputs if one is not None)
    rows = [some.new_ones(names.outputs(module)[i]) if one is None else one for i, one in enumerate(outputs)]
    return names.merge(module, rows)[:, None]


def _exactly(wanted: list[str], others: Collection[str]) -> list[str] | str:
    """``feedforward_modules`` that name these targets and no others: for PEFT ``fc2`` is the end of ``my_fc2`` too."""
    if any(other.endswith(name) for name in wanted for other in others):
        return "|".join(map(re.escape, wanted))
    return wanted


def read_prompts(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], names: OwnNames, where: Path
) -> StoredAdapter:
    """Prompts ``<attention>.adaption_prompt`` (1, P, D) and gates ``<attention>.adaption_gate`` (1,).

    Raises:
        FileFormatError: an option is not zoo's, a tensor is unknown, or PEFT has another formula for this model.
    """
    _refuse_options(config, _PROMPT_KEYS, where)
    if names.spec is not None and (reason := _why_not(names)):
        raise FileFormatError(f"{where} holds prompts of PEFT's, and {reason}.")
    sizes = {"prompt_length": config.get("adapter_len"), "layers": config.get("adapter_layers")}
    for key, size in zip(("adapter_len", "adapter_layers"), sizes.values(), strict=True):
        if type(size) is not int or size < 1:
            raise FileFormatError(f"{where / CONFIG} has {key} = {size!r}, which should be a number of at least 1.")
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        shape = tuple(tensor.shape)
        if leaf == "adaption_prompt" and len(shape) == 3 and shape[0] == 1:
            state[f"{names.attention_site(module)}.prompt"] = tensor[0]
        elif leaf == "adaption_gate" and shape == (1,):
            state[f"{names.attention_site(module)}.gate"] = tensor
        else:
            raise FileFormatError(
                f"{where}: the tensor {key} {shape} is no adaption_prompt of (1, length, width), nor an adaption_gate "
                "of (1,)."
            )
    place = PROMPT_PLACES.get(names.model_type or "", "before_projection")
    return StoredAdapter("llama-adapter", sizes | {"gate": "linear", "gate_per": "layer", "place": place}, state)


def write_prompts(handle: AttachedAdapter, directory: Path, names: OwnNames, *, base: str | None = None) -> list[str]:
    """Write LLaMA-Adapter v1 as PEFT does; returns what a reader should know, one line each.

    PEFT has one linear gate a layer: other gates are written as what they are worth, if that is the same in all heads.

    Raises:
        InputError: PEFT's layout can not hold it. Nothing is written.
    """
    options: LLaMAAdapterOptions = handle.adapter.options
    if reason := _why_not(names):
        raise InputError(reason)
    place = PROMPT_PLACES[names.model_type or ""]
    if options.place != place:
        raise InputError(f"PEFT adds the results of prompts {place} on {names.model_type}, not {options.place}")
    state, tensors = handle.state_dict(), {}
    modules = {addition.site.name: names.attention_module(addition.site.name) for addition in handle.plan.additions}
    for site, module in modules.items():
        gates = state[f"{site}.gate"]
        if not torch.equal(gates, gates[:1].expand_as(gates)):
            raise InputError(f"PEFT has one gate for a layer, and the heads of {site} have their own")
        tensors[f"{module}.adaption_prompt"] = state[f"{site}.prompt"][None]
        tensors[f"{module}.adaption_gate"] = gates[:1].tanh() if options.gate == "tanh" else gates[:1]
    config = common_config("ADAPTION_PROMPT", handle, names, base) | {
        "target_modules": next(iter(modules.values())).rpartition(".")[2],
        "adapter_len": options.prompt_length,
        "adapter_layers": len(modules),
    }
    write_files(directory, config, tensors)
    if (options.gate, options.gate_per) == ("linear", "layer"):
        return []
    return [f"gates of {options.gate} per {options.gate_per} written as PEFT's: read again, they are linear per layer"]


def _why_not(names: OwnNames) -> str:
    """Why prompts of PEFT's and of zoo's are not the same on a model; empty: they are."""
    spec = names.spec
    if names.model_type not in PROMPT_PLACES or spec is None:
        model = f"the type of this one is {names.model_type}" if names.model_type else "this one goes by its own names"
        return f"PEFT has prompts for models of the types {', '.join(PROMPT_PLACES)}, and {model}"
    if spec.attn_out_bias and PROMPT_PLACES[names.model_type] == "before_projection":
        return "PEFT adds the bias of the attention's projection a second time, which this model has"
    if any(attention_scale(spec, i) != spec.d_head**-0.5 for i in range(spec.n_layers)):
        return "PEFT scales the scores of prompts by 1 / sqrt(head size), and this model scales scores otherwise"
    if spec.n_heads * spec.d_head != spec.d_model:
        return (
            f"PEFT's prompts need heads that together are as wide as the model, and this one has {spec.n_heads} of "
            f"{spec.d_head} for a width of {spec.d_model}"
        )
    return ""


def _refuse_options(config: Mapping[str, Any], known: Collection[str], where: Path) -> None:
    for option, value in config.items():
        if option not in known and value not in (None, False, [], {}):
            raise FileFormatError(
                f"{where} was made with {option} = {value!r}, which zoo does not know for the peft_type "
                f"{config['peft_type']}.",
                fix=f"If it does not change what is computed, remove it from {CONFIG}.",
            )


def common_config(kind: str, handle: AttachedAdapter, names: OwnNames, base: str | None) -> dict[str, Any]:
    """What is in every ``adapter_config.json``; PEFT loads a task's adapter only on a model that has its methods."""
    is_language_model = names.spec is not None or hasattr(handle.root, "prepare_inputs_for_generation")
    task = "CAUSAL_LM" if is_language_model else None
    return {"peft_type": kind, "task_type": task, "base_model_name_or_path": base, "inference_mode": True}
