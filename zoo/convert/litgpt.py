"""LitGPT's directories: ``lit_model.pth``, ``model_config.yaml`` and Hugging Face's tokenizer files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.convert.base import Checkpoint, WriteOptions, Writing, parameter_slots, what_is_lost
from zoo.convert.hf import COMPANIONS
from zoo.convert.hf_writer import plain_dtype, rounding, tokenizer_to_save, write_companions
from zoo.convert.litgpt_config import CONFIG, WEIGHTS, config_from_spec, looks_like_litgpt, spec_from_config
from zoo.convert.torch_file import TorchTensors, checked_tensors, load_torch_file
from zoo.convert.torch_writer import write_torch_file
from zoo.errors import FileFormatError, InputError
from zoo.families.base import Family, KeyMap
from zoo.registry import Registry
from zoo.sources.provenance import read_provenance, sha256_of
from zoo.spec import ModelSpec
from zoo.text.json_files import read_json_object
from zoo.text.tokenizer import Tokenizer

_COMMON = """
    transformer.wte.weight                 embed.weight
    transformer.h.{i}.norm_1.weight        blocks.{i}.attn_norm.weight
    transformer.h.{i}.norm_1.bias          blocks.{i}.attn_norm.bias
    transformer.h.{i}.attn.qkv.weight      blocks.{i}.attn.{q,k,v}.weight  rows
    transformer.h.{i}.attn.qkv.bias        blocks.{i}.attn.{q,k,v}.bias    rows
    transformer.h.{i}.attn.norm_q.weight   blocks.{i}.attn.q_norm.weight
    transformer.h.{i}.attn.norm_k.weight   blocks.{i}.attn.k_norm.weight
    transformer.h.{i}.attn.proj.weight     blocks.{i}.attn.out.weight
    transformer.h.{i}.attn.proj.bias       blocks.{i}.attn.out.bias
    transformer.h.{i}.norm_2.weight        blocks.{i}.mlp_norm.weight
    transformer.h.{i}.norm_2.bias          blocks.{i}.mlp_norm.bias
    transformer.h.{i}.mlp.proj.weight      blocks.{i}.mlp.down.weight
    transformer.h.{i}.mlp.proj.bias        blocks.{i}.mlp.down.bias
    transformer.ln_f.weight                norm.weight
    transformer.ln_f.bias                  norm.bias
    lm_head.weight                         head.weight
    lm_head.bias                           head.bias
"""
_PLAIN = """
    transformer.h.{i}.mlp.fc.weight        blocks.{i}.mlp.up.weight
    transformer.h.{i}.mlp.fc.bias          blocks.{i}.mlp.up.bias
"""
_GATED = """
    transformer.h.{i}.mlp.fc_1.weight      blocks.{i}.mlp.gate.weight
    transformer.h.{i}.mlp.fc_1.bias        blocks.{i}.mlp.gate.bias
    transformer.h.{i}.mlp.fc_2.weight      blocks.{i}.mlp.up.weight
    transformer.h.{i}.mlp.fc_2.bias        blocks.{i}.mlp.up.bias
"""
KEYS = {"plain": KeyMap(_COMMON + _PLAIN), "gated": KeyMap(_COMMON + _GATED)}
"""By the spec's kind of feed-forward layer."""
_FAMILIES = {"plain": ("gpt_neox", "phi", "falcon"), "gated": ("llama", "qwen2", "qwen3", "stablelm")}
"""Those that may say what a LitGPT config says, by the same."""


class LitGPT:
    """The converter of LitGPT's directories."""

    def reads(self, path: Path) -> bool:
        """A directory with lit_model.pth and model_config.yaml, and no weights in the Hugging Face layout."""
        return looks_like_litgpt(path)

    def open(self, path: Path, registry: Registry) -> Checkpoint:
        """Open the directory; weights stay memory-mapped.

        Raises:
            FileFormatError: a file is damaged or missing, or the weights are of LitGPT before 0.5.5.
            InputError: the config says something that zoo does not understand, or that no family of zoo computes.
        """
        settings = read_settings(path / CONFIG)
        tensors = _read_weights(path / WEIGHTS)
        head, embedding = tensors.get("lm_head.weight"), tensors.get("transformer.wte.weight")
        tied = head is not None and embedding is not None and head.data_ptr() == embedding.data_ptr()
        try:
            spec = spec_from_config(settings, tie_embeddings=tied)
            family, config = _family(spec, registry)
        except InputError as error:
            raise InputError(f"{path / CONFIG}: {error.message}", fix=error.fix) from None
        name = settings.get("hf_config") or {}
        if name.get("name"):
            config["_name_or_path"] = "/".join(filter(None, (name.get("org"), name["name"])))
        generation = path / "generation_config.json"
        return Checkpoint(
            path=path,
            family=family,
            spec=spec,
            keys=KEYS[spec.mlp],
            tensors=TorchTensors(tensors),
            config=config,
            load_tokenizer=lambda: Tokenizer.from_directory(path),
            generation=read_json_object(generation) if generation.is_file() else {},
            companions=tuple(path / name for name in COMPANIONS if (path / name).is_file()),
        )

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Writing:
        """Prepare a directory that LitGPT loads. Raises as `Writer.write`."""
        org, name = _name(checkpoint)
        settings = config_from_spec(checkpoint.spec, org, name)
        untied = ModelSpec.from_dict(checkpoint.spec.to_dict() | {"tie_embeddings": False})
        dtype = plain_dtype(options, "litgpt")
        slots = parameter_slots(checkpoint, KEYS[untied.mlp].rules(untied), dtype, options.progress)
        shared = {"lm_head.weight": "transformer.wte.weight"} if checkpoint.spec.tie_embeddings else {}
        slots = [slot for slot in slots if slot.name not in shared]
        tokenizer = tokenizer_to_save(checkpoint)

        def to(directory: Path) -> None:
            directory.mkdir()
            write_torch_file(directory / WEIGHTS, slots, shared)
            _yaml().dump(settings, directory / CONFIG)
            write_companions(directory, checkpoint, tokenizer, {WEIGHTS: sha256_of(directory / WEIGHTS)})

        return Writing(len(slots), sum(slot.n_bytes for slot in slots), to, rounding(dtype))


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)  # LitGPT's: 1e-05 is a text there, 1.0e-05 a number
    yaml.default_flow_style = False
    return yaml


def read_settings(path: Path) -> dict[str, Any]:
    """What one of LitGPT's YAML files says.

    Raises:
        FileFormatError: it is damaged.
    """
    from ruamel.yaml.error import YAMLError

    try:
        content = _yaml().load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise FileFormatError(f"{path} must be a mapping of LitGPT's settings.")
    return content


def _read_weights(path: Path) -> dict[str, Any]:
    content = load_torch_file(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]  # what training has saved, beside its optimizer
    tensors = checked_tensors(content, str(path))
    if any(".attn.attn." in name for name in tensors):
        raise FileFormatError(
            f"{path} keeps q, k and v interleaved by head ('attn.attn'), as LitGPT did before 0.5.5.",
            fix="Convert the original again: litgpt convert_to_litgpt DIRECTORY.",
        )
    return tensors


def _family(spec: ModelSpec, registry: Registry) -> tuple[Family, dict[str, Any]]:
    """The first family whose config says all of ``spec``, and that config."""
    reasons = []
    for name in _FAMILIES[spec.mlp]:
        family: Family = registry.load("family", name)
        config = {key: value for key, value in family.write_config(spec).items() if value is not None}
        lost = what_is_lost(spec, family.read_config(config))
        if not lost:
            return family, config
        reasons.append(f"{name} can not say {', '.join(lost)}")
    raise InputError(f"none of zoo's families computes such a model: {'; '.join(reasons)}.")


def _name(checkpoint: Checkpoint) -> tuple[str, str]:
    """Organization and name of the model: where it came from, or what its files or its directory are called."""
    source = read_provenance(checkpoint.directory).source or ""
    hub = source.removeprefix("hf:").partition("@")[0] if source.startswith("hf:") else ""
    known = hub or str(checkpoint.config.get("_name_or_path") or "")
    parts = known.split("/") if known.count("/") == 1 else ["", checkpoint.path.stem]
    return parts[0], parts[1]
