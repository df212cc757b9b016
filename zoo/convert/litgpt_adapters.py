"""Adapter files of LitGPT, as its finetuning scripts save them: LoRA, LLaMA-Adapter v1 and v2.

LitGPT since 0.5.5 takes a prompt's keys and values from the wrong rows of its fused qkv, some of which are queries,
unless the model has a single kv head; and it does not normalize a prompt's keys where the model normalizes keys. Zoo
takes the layer's own keys and values, as the paper and LitGPT before 0.5.5 do. On such models the prompts of later
files give other results here than there; those of older files, and everything else, the same.

Shape letters: R rank, D_in and D_out of a linear, P prompt, D model width, N query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.convert.adapter_files import StoredAdapter
from zoo.convert.adapter_names import FamilyNames, OwnNames
from zoo.convert.adapter_tensors import StoredTensor, norms_option, take_apart
from zoo.convert.litgpt import KEYS, read_settings
from zoo.convert.litgpt_config import WEIGHTS
from zoo.convert.torch_file import checked_tensors, load_torch_file, some
from zoo.errors import FileFormatError, InputError, ZooError
from zoo.plan.sites import Site
from zoo.spec import ModelSpec

HYPERPARAMETERS = "hyperparameters.yaml"
_FLAGS = {
    "attn.q": "lora_query",
    "attn.k": "lora_key",
    "attn.v": "lora_value",
    "attn.out": "lora_projection",
    "mlp.gate": "lora_mlp",
    "mlp.up": "lora_mlp",
    "mlp.down": "lora_mlp",
    "head": "lora_head",
}
"""The setting that says whether sites of a role have LoRA."""
_NUMBERS = ("lora_r", "lora_alpha", "lora_dropout")
_TRAINED_NORMS = (".norm_1", ".norm_2", ".ln_f")
"""LitGPT leaves other norms, such as those of queries and keys, as they are."""
_PROMPT, _GATE = "adapter_wte.weight", "gating_factor"
_FIX = "Take the model that it was trained on."


def reads(path: Path) -> bool:
    """Whether this is ``lit_model.pth.lora``, ``.adapter`` or ``.adapter_v2``, or a directory with one of them."""
    return bool(_files(path))


def litgpt_names(spec: ModelSpec) -> OwnNames:
    """The names that LitGPT gives to the modules of a decoder of zoo's.

    Raises:
        InputError: LitGPT has no modules for some of it.
    """
    # LitGPT has a head of its own, and adapts it, also where its weight is the embedding's.
    untied = ModelSpec.from_dict(spec.to_dict() | {"tie_embeddings": False})
    try:
        return FamilyNames(KEYS[spec.mlp], untied)
    except ZooError as error:
        raise InputError(f"LitGPT has no such model: {error.message}") from None


def read_litgpt_adapter(path: Path, sites: Sequence[Site], names: OwnNames) -> StoredAdapter:
    """Read an adapter for a model with these sites: the one that was finetuned, not the one with LoRA merged into it.

    Args:
        path: the directory that ``litgpt finetune`` wrote, or the file. LoRA needs ``hyperparameters.yaml`` beside it.
        sites: of zoo's decoder.
        names: `litgpt_names` of its spec.

    Raises:
        FileFormatError: there is no such file, it is damaged, of LitGPT before 0.5.5, or of another model.
        InputError: the directory holds several.
    """
    file = _only_file(path)
    content = load_torch_file(file)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    tensors = checked_tensors(content, str(file))
    if old := [key for key in tensors if ".attn.attn." in key]:
        raise FileFormatError(
            f"{file} holds {some(old)}, as LitGPT before 0.5.5 named its fused qkv; zoo reads what later ones save.",
            fix="Finetune it anew, or merge it into the weights with the LitGPT that it is of.",
        )
    return _READERS[file.suffix](file, tensors, sites, names)


def _files(path: Path) -> list[Path]:
    possible = [path / f"{WEIGHTS}{kind}" for kind in _READERS] if path.is_dir() else [path]
    return [file for file in possible if file.suffix in _READERS and file.stem.endswith(".pth") and file.is_file()]


def _only_file(path: Path) -> Path:
    files = _files(path)
    if not files:
        wanted = ", ".join(f"{WEIGHTS}{kind}" for kind in _READERS)
        raise FileFormatError(
            f"{path} is no adapter of LitGPT's.",
            fix=f"Give the directory that it wrote, or one of its files: {wanted}.",
        )
    if len(files) > 1:
        raise InputError(f"{path} holds {' and '.join(file.name for file in files)}.", fix="Give one of the files.")
    return files[0]


def _modules(sites: Sequence[Site], names: OwnNames) -> dict[str, list[Site]]:
    """LitGPT's linears, and our sites that each of them holds, in its order."""
    linears = {site.name: site for site in sites if site.kind == "linear"}
    modules = dict.fromkeys(map(names.module, linears))
    return {module: [linears[name] for name in names.sites(module)] for module in modules}


# --- LoRA ------------------------------------------------------------------------------------------------------


def _read_lora(file: Path, tensors: Mapping[str, Tensor], sites: Sequence[Site], names: OwnNames) -> StoredAdapter:
    """A (n R, D_in) and B (D_out, R) of each linear, with D_out summed over those n of its parts that have LoRA."""
    settings = _lora_settings(file.with_name(HYPERPARAMETERS))
    rank = settings["lora_r"]
    wanted: dict[str, StoredTensor] = {}
    targets: list[str] = []
    for module, parts in _modules(sites, names).items():
        adapted = [site for site in parts if settings[_FLAGS[site.role]]]
        if adapted:
            shapes_A = {f"{site.name}.lora_A": (rank, site.shape[1]) for site in adapted}
            shapes_B = {f"{site.name}.lora_B": (site.shape[0], rank) for site in adapted}
            wanted[f"{module}.lora_A"] = StoredTensor.stacked(shapes_A)
            wanted[f"{module}.lora_B"] = StoredTensor.stacked(shapes_B)
            targets += [f"={site.name}" for site in adapted]
    state = take_apart(tensors, wanted, file, fix=f"{_FIX[:-1]}, with the {HYPERPARAMETERS} that was saved with it.")
    options = {
        "r": rank,
        "alpha": float(settings["lora_alpha"]),
        "dropout": float(settings["lora_dropout"]),
        "targets": tuple(targets),
    }
    return StoredAdapter("lora", options, state)


def _lora_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileFormatError(
            f"{path} is missing, and only it says the scaling of the LoRA beside it, and which modules have it.",
            fix="Copy it from where LitGPT wrote both.",
        )
    settings = read_settings(path)
    keys = [*_NUMBERS, *dict.fromkeys(_FLAGS.values())]
    if missing := [key for key in keys if key not in settings]:
        raise FileFormatError(f"{path} lacks {', '.join(missing)}.", fix="Take the one that was saved with the LoRA.")
    for key in keys:
        value, is_flag = settings[key], key not in _NUMBERS
        if isinstance(value, bool) != is_flag or not isinstance(value, int | float):
            raise FileFormatError(
                f"{path} has {key} = {value!r}, which should be {'a bool' if is_flag else 'a number'}."
            )
    if not isinstance(settings["lora_r"], int) or settings["lora_r"] < 1:
        raise FileFormatError(f"{path} has lora_r = {settings['lora_r']}: with LoRA that is a whole number from 1 up.")
    if not any(settings[flag] for flag in _FLAGS.values()):
        raise FileFormatError(f"{path} says of no module that it has LoRA: {', '.join(keys[len(_NUMBERS) :])} are off.")
    return settings


# --- LLaMA-Adapter ---------------------------------------------------------------------------------------------


def _read_v1(file: Path, tensors: Mapping[str, Tensor], sites: Sequence[Site], names: OwnNames) -> StoredAdapter:
    tensors = _new_gates(tensors)
    wanted, options = _prompts(tensors, sites, names)
    if not wanted:
        raise FileFormatError(f"{file} holds no {_PROMPT} of any layer of this model.", fix=_FIX)
    return StoredAdapter("llama-adapter", options, take_apart(tensors, wanted, file, fix=_FIX))


def _read_v2(file: Path, tensors: Mapping[str, Tensor], sites: Sequence[Site], names: OwnNames) -> StoredAdapter:
    """A scale and a bias (D_out,) on every linear, also the head; prompts; and the norms that LitGPT trains."""
    tensors = _new_gates(tensors)
    wanted, options = _prompts(tensors, sites, names)
    options |= {"scale_on": "output", "prompts": bool(wanted)}
    modules = _modules(sites, names)
    for module, parts in modules.items():
        for theirs, ours in (("adapter_scale", "v2_scale"), ("adapter_bias", "v2_bias")):
            shapes = {f"{site.name}.{ours}": site.shape[:1] for site in parts}
            wanted[f"{module}.{theirs}"] = StoredTensor.stacked(shapes)
    options["targets"] = tuple(f"={site.name}" for parts in modules.values() for site in parts)
    norms = [site for site in sites if site.kind == "norm"]
    trained = [site for site in norms if names.module(site.name).endswith(_TRAINED_NORMS)]
    options["norms"] = norms_option(trained, norms)
    for site in trained:
        for name, shape in site.parameters.items():
            wanted[names.module(site.name) + name.removeprefix(site.name)] = StoredTensor(shape, {name: shape})
    return StoredAdapter("llama-adapter-v2", options, take_apart(tensors, wanted, file, fix=_FIX))


def _new_gates(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gates (1, N, 1, 1) of old versions as (1, 1, N, 1)."""
    old = {key for key, tensor in tensors.items() if key.endswith(_GATE) and tensor.dim() == 4 and tensor.shape[2] == 1}
    return {key: tensor.transpose(1, 2) if key in old else tensor for key, tensor in tensors.items()}


def _prompts(
    tensors: Mapping[str, Tensor], sites: Sequence[Site], names: OwnNames
) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Prompts (P, D) and gates (1, 1, N, 1) from the first layer that has either up, and the options that say so."""
    layers = {names.module(f"{site.name}.q").rpartition(".")[0]: site for site in sites if site.kind == "attention"}
    first = next(
        (i for i, at in enumerate(layers) if {f"{at}.{_PROMPT}", f"{at}.{_GATE}"} & tensors.keys()), len(layers)
    )
    with_prompts = dict(list(layers.items())[first:])
    lengths = [
        tensors[key].shape[0] for at in with_prompts if (key := f"{at}.{_PROMPT}") in tensors and tensors[key].dim()
    ]
    options: dict[str, Any] = {
        "prompt_length": lengths[0] if lengths else 1,
        "layers": max(1, len(with_prompts)),
        "gate": "linear",
        "gate_per": "head",
    }
    wanted = {}
    for at, site in with_prompts.items():
        width, n_heads = site.shape
        prompt = {f"{site.name}.prompt": (options["prompt_length"], width)}
        wanted[f"{at}.{_PROMPT}"] = StoredTensor.stacked(prompt)
        wanted[f"{at}.{_GATE}"] = StoredTensor((1, 1, n_heads, 1), {f"{site.name}.gate": (n_heads,)})
    return wanted, options


_Reader = Callable[[Path, Mapping[str, Tensor], Sequence[Site], OwnNames], StoredAdapter]
_READERS: dict[str, _Reader] = {".lora": _read_lora, ".adapter": _read_v1, ".adapter_v2": _read_v2}
"""By how the names of their files end."""
