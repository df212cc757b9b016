"""GGUF files that zoo writes: the tensors and metadata of llama.cpp's own converter, the tokenizer, the refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests import gguf_files, reference, trained_tokenizers
from zoo.convert.export import export_model
from zoo.convert.gguf import GGUF
from zoo.convert.load import open_checkpoint
from zoo.errors import InputError, ZooError
from zoo.registry import Registry
from zoo.text import gguf_tokenizer

VOCAB = {"vocab_size": trained_tokenizers.VOCAB_SIZE}
DTYPES = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16, "q8_0": Kind.Q8_0}
VARIANTS = pytest.mark.parametrize("variant", gguf_files.CONFIGS)

Save = Callable[..., Path]
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def bpe() -> tokenizers.Tokenizer:
    return trained_tokenizers.byte_level()


@pytest.fixture
def save(tmp_path: Path, bpe: tokenizers.Tokenizer) -> Save:
    """Saves a tiny reference model whose vocabulary is the tokenizer's, unless told otherwise."""

    def run(model_type: str, config: dict[str, Any], tokenizer: Any = bpe, **tokenizer_config: Any) -> Path:
        directory = tmp_path / "source"
        config = config | VOCAB if config["vocab_size"] == reference.LLAMA["vocab_size"] else config
        gguf_files.round_norms(reference.tiny_model(model_type, config)).save_pretrained(directory)
        if tokenizer is not None:
            trained_tokenizers.save(directory, tokenizer, **tokenizer_config)
        return directory

    return run


@pytest.fixture
def write(tmp_path: Path, registry: Registry) -> Write:
    """Writes a model as GGUF."""

    def run(source: Path, dtype: torch.dtype | str | None = None) -> Path:
        target = tmp_path / f"{source.stem}.gguf"
        export_model(open_checkpoint(source, registry), target, writer=GGUF(), dtype=dtype)
        return target

    return run


def llama(**changes: Any) -> tuple[str, dict[str, Any]]:
    return "llama", gguf_files.LLAMA | VOCAB | changes


def parameters(path: Path, registry: Registry) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(path, registry).parameters())


# --- tensors ---------------------------------------------------------------------------------------------------


@VARIANTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_llama_cpp_writes_it(
    dtype: torch.dtype | str, variant: str, save: Save, write: Write, tmp_path: Path
) -> None:
    """Guards names, layouts, types and bytes of tensors and the metadata, against a file written the other way."""
    model_type, config = gguf_files.CONFIGS[variant]
    ours = gguf.GGUFReader(write(save(model_type, config | VOCAB), dtype))
    model = gguf_files.round_norms(reference.tiny_model(model_type, config | VOCAB))
    theirs = gguf.GGUFReader(gguf_files.write_model(tmp_path / "theirs.gguf", model, DTYPES[dtype]))
    found = {tensor.name: tensor for tensor in ours.tensors}
    wanted = {tensor.name: tensor for tensor in theirs.tensors}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name == "position_embd.weight":  # always float32 in llama.cpp's converter
            assert found[name].tensor_type == Kind.F32
            continue
        assert found[name].tensor_type == tensor.tensor_type, name
        assert list(found[name].shape) == list(tensor.shape), name
        assert np.array_equal(found[name].data.view(np.uint8), tensor.data.view(np.uint8)), name
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.fields[name].types == field.types, name
            assert ours.fields[name].contents() == field.contents(), name


@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_there_and_back(
    dtype: torch.dtype, variant: str, save: Save, write: Write, tmp_path: Path, registry: Registry
) -> None:
    """Guards both directions at once: HF -> GGUF -> HF, and GGUF -> GGUF, are bit for bit what they were."""
    model_type, config = gguf_files.CONFIGS[variant]
    source, rounded = save(model_type, config), tmp_path / "rounded"
    export_model(open_checkpoint(source, registry), rounded, dtype=dtype)
    first = write(rounded)
    assert open_checkpoint(first, registry).tensors.dtype("blk.0.ffn_up.weight") == dtype
    export_model(open_checkpoint(first, registry), tmp_path / "back", dtype=dtype)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("rounded", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    second = tmp_path / "second.gguf"
    export_model(open_checkpoint(first, registry), second, writer=GGUF())
    spec, again = (open_checkpoint(path, registry).spec for path in (first, second))
    assert spec == again
    ours, theirs = (gguf.GGUFReader(path).tensors for path in (first, second))
    assert [(a.name, a.data.tobytes()) for a in ours] == [(b.name, b.data.tobytes()) for b in theirs]


def test_q8_0_is_what_it_says(save: Save, write: Write, registry: Registry) -> None:
    """Guards the values of quantized weights: those of gguf's quantizer, norms left as they are."""
    source = save(*llama())
    before, after = parameters(source, registry), parameters(write(source, "q8_0"), registry)
    for name, values in before.items():
        quantized = gguf.quants.quantize(values.numpy(), Kind.Q8_0) if values.dim() > 1 else None
        wanted = values if quantized is None else torch.from_numpy(gguf.quants.dequantize(quantized, Kind.Q8_0))
        assert torch.equal(after[name], wanted), name


def test_float16_overflow(save: Save, write: Write, registry: Registry) -> None:
    """Guards against weights that become infinite in silence."""
    source = save(*llama())
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 70000.0
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ZooError, match=r"holds 70000; float16 ends at 65504"):
        write(source, torch.float16)
    assert not list(source.parent.glob("*gguf*"))
    write(source, torch.bfloat16)


# --- rotary scaling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling(factor: float, save: Save, write: Write, registry: Registry) -> None:
    """Guards the factors that llama.cpp divides rotary frequencies by."""
    scaling = reference.LLAMA3_ROPE | {"factor": factor, "original_max_position_embeddings": 8192}
    _, config = llama(rope_scaling=scaling, rope_theta=5e5)
    path = write(save("llama", config))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](reference.tiny_model("llama", config).config, "cpu")
    plain = 5e5 ** -(torch.arange(0, 16, 2) / 16)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = tensors["rope_freqs.weight"]
    assert found.tensor_type == Kind.F32
    assert np.allclose(found.data, (plain / scaled).numpy(), rtol=1e-5)
    rope = open_checkpoint(path, registry).spec.rope
    assert rope is not None and rope.scaling is not None
    assert (rope.scaling.kind, rope.scaling.factor) == ("llama3", factor)


def test_linear_scaling(save: Save, write: Write) -> None:
    """Guards the two keys from which llama.cpp takes a linear scaling."""
    fields = gguf.GGUFReader(write(save(*llama(rope_scaling={"rope_type": "linear", "factor": 4.0})))).fields
    assert fields["llama.rope.scaling.type"].contents() == "linear"
    assert fields["llama.rope.scaling.factor"].contents() == 4.0


# --- what is said about the model ------------------------------------------------------------------------------


def test_general(save: Save, write: Write, registry: Registry, tmp_path: Path) -> None:
    source = save(*llama())
    for dtype, file_type in ((torch.float32, 0), (torch.float16, 1), (torch.bfloat16, 32), ("q8_0", 7)):
        path = write(source, dtype)
        fields = gguf.GGUFReader(path).fields
        path.unlink()
        assert fields["general.file_type"].contents() == file_type
    assert fields["general.name"].contents() == "source"
    assert fields["general.type"].contents() == "model"
    assert fields["general.quantization_version"].contents() == 2
    assert "general.license" not in fields


def ids_in(path: Path) -> dict[str, int]:
    """The ids of special tokens, by what they are for."""
    fields = gguf.GGUFReader(path).fields
    names = ("bos", "eos", "eot", "eom", "padding", "unknown")
    keys = {name: f"tokenizer.ggml.{name}_token_id" for name in names}
    return {name: fields[key].contents() for name, key in keys.items() if key in fields}


def test_ends_and_sampling(save: Save, write: Write, registry: Registry) -> None:
    """Guards generation_config.json: every token that ends a reply, and the sampling defaults."""
    backend = trained_tokenizers.byte_level()
    backend.add_special_tokens(["<|turn|>", "<|message|>", "<|more|>"])
    source = save(*llama(vocab_size=520), backend, bos_token="<|end|>", pad_token="<|end|>")
    written = {"bos_token_id": 0, "eos_token_id": [512, 513, 0], "pad_token_id": 0, "temperature": 0.6, "top_k": 20}
    (source / "generation_config.json").write_text(json.dumps(written))
    path = write(source)
    assert ids_in(path) == {"bos": 0, "eos": 512, "eot": 513, "eom": 0, "padding": 0}
    assert open_checkpoint(path, registry).generation == written
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 512, 513, 514]}))
    path.unlink()
    with pytest.raises(InputError, match="4 tokens end a text"):
        write(source)


def test_default_ids(save: Save, write: Write) -> None:
    """Guards text from being split at '!' because transformers' default BOS is 1; such an EOS still ends a text."""
    source = save(*llama(bos_token_id=1, eos_token_id=2, pad_token_id=90))
    assert ids_in(write(source)) == {"eos": 0, "eot": 2}


@pytest.mark.parametrize(
    "template", ["{{ x }}", [{"name": "default", "template": "{{ d }}"}, {"name": "tools", "template": "{{ t }}"}]]
)
def test_chat_templates(template: Any, save: Save, write: Write, registry: Registry) -> None:
    source = save(*llama(), chat_template=template)
    assert open_checkpoint(write(source), registry).load_tokenizer().config["chat_template"] == template


# --- tokenizers ------------------------------------------------------------------------------------------------


def split(*patterns: str, digits: bool = False) -> Any:
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=not patterns)
    return pre_tokenizers.Sequence([*steps, last])


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BACKENDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "gpt-2": trained_tokenizers.byte_level,
    "mpt": lambda: trained_tokenizers.byte_level(normalizer=normalizers.NFC()),
    "smollm": lambda: trained_tokenizers.byte_level(split(digits=True)),
    "llama-bpe": lambda: trained_tokenizers.byte_level(split(LLAMA3), ignore_merges=True),
    "qwen2": lambda: trained_tokenizers.byte_level(split(LLAMA3.replace("{1,3}", "")), normalizers.NFC()),
    "stablelm2": lambda: trained_tokenizers.byte_level(split(LLAMA3.replace("{1,3}", ""))),
    "dbrx": lambda: trained_tokenizers.byte_level(split(LLAMA3)),
    "falcon": lambda: trained_tokenizers.byte_level(trained_tokenizers.falcon_splitting()),
    "default": trained_tokenizers.sentencepiece_style,
}
"""By the name that llama.cpp has for how they split text."""


@pytest.mark.parametrize("name", BACKENDS)
def test_tokenizer(name: str, save: Save, write: Write, registry: Registry) -> None:
    """Guards tokens, merges or scores, the splitting's name and BOS: the same ids as before."""
    source = save(*llama(), BACKENDS[name]())
    path = write(source)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert fields["tokenizer.ggml.add_bos_token"].contents() == (name == "default")
    before, after = (open_checkpoint(each, registry).load_tokenizer() for each in (source, path))
    for text in trained_tokenizers.texts():
        assert after.encode(text) == before.encode(text), text
    assert after.special_tokens == before.special_tokens


def test_sentencepiece_scores(save: Save, write: Write) -> None:
    """Guards the order in which llama.cpp joins pieces, and the types by which it knows bytes."""
    backend = trained_tokenizers.sentencepiece_style()
    fields = gguf.GGUFReader(write(save(*llama(), backend))).fields
    scores, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("scores", "token_type"))
    best = np.argsort(scores)[::-1][:20].tolist()
    assert best == sorted(best), "ids are in the order of merges here"
    assert (types[:4], types[258], types[-1]) == ([2, 3, 3, 6], 6, 1)
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True


def test_gemma_puts_no_space_before_the_text(save: Save, write: Write, registry: Registry) -> None:
    source = save(*llama(), trained_tokenizers.gemma_style())
    path = write(source)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.add_space_prefix"].contents() is False
    before, after = (open_checkpoint(each, registry).load_tokenizer() for each in (source, path))
    for text in ["a b", " a", "a  b \n", "1 22"]:
        assert after.encode(text) == before.encode(text), text


def test_every_splitting_has_its_own_mark() -> None:
    """Guards the text by which splittings are told apart: two that it does not tell apart would share a name."""
    marks: dict[tuple[object, ...], object] = {}
    for name, splitting in gguf_tokenizer._SPLITTINGS.items():
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        gguf_tokenizer._split_as(backend, splitting)
        pieces = (*gguf_tokenizer.split_text(backend, gguf_tokenizer._PROBE), splitting.ignore_merges)
        assert marks.setdefault(pieces, splitting) == splitting, name
    assert len(marks) == len(set(gguf_tokenizer._SPLITTINGS.values()))


def test_ids_without_a_token(save: Save, write: Write, registry: Registry) -> None:
    """Guards padded vocabularies: llama.cpp wants a token for every row of the embedding."""
    path = write(save(*llama(vocab_size=520)))
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD519]"
    assert fields["tokenizer.ggml.token_type"].contents()[-9:] == [1] + [5] * 8
    assert open_checkpoint(path, registry).spec.vocab_size == 520


def with_token(token: AddedToken) -> Callable[[], tokenizers.Tokenizer]:
    def build() -> tokenizers.Tokenizer:
        backend = trained_tokenizers.byte_level()
        backend.add_tokens([token])
        return backend

    return build


def unigram() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(tokenizers.models.Unigram([("<|end|>", 0.0), ("a", -1.0)], unk_id=0))


def lowercase() -> tokenizers.Tokenizer:
    backend = trained_tokenizers.sentencepiece_style()
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), backend.normalizer])
    return backend


def whitespace() -> tokenizers.Tokenizer:
    steps = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return trained_tokenizers.byte_level(pre_tokenizers.Sequence(steps))


def in_brackets() -> tokenizers.Tokenizer:
    backend = trained_tokenizers.byte_level()
    backend.post_processor = tokenizers.processors.TemplateProcessing("a $A", None, [("a", backend.token_to_id("a"))])
    return backend


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (with_token(AddedToken("<x>", lstrip=True)), "'<x>' has lstrip set"),
        (with_token(AddedToken("<x>", rstrip=True, single_word=True)), "rstrip and single_word"),
        (unigram, "of the kind Unigram"),
        (lowercase, "changes text before it splits it"),
        (whitespace, "no name in llama.cpp"),
        (lambda: trained_tokenizers.byte_level(split(r"\p{L}+")), "no name in llama.cpp"),
        (lambda: trained_tokenizers.byte_level(split(digits=True), ignore_merges=True), "no name in llama.cpp"),
        (in_brackets, "before a text"),
        (lambda: None, "has no tokenizer"),
    ],
)
def test_tokenizers_that_llama_cpp_has_not(build: Callable[[], Any], says: str, save: Save, write: Write) -> None:
    """Guards against a file with which llama.cpp would give other ids."""
    with pytest.raises(InputError, match=says):
        write(save(*llama(vocab_size=520), build()))


def test_more_tokens_than_embeddings(save: Save, write: Write) -> None:
    with pytest.raises(InputError, match=r"with the id 500; the model has 500 rows"):
        write(save(*llama(vocab_size=500)))


# --- what can not be said --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "config", "says"),
    [
        (*llama(hidden_act="gelu"), "activation = 'gelu'"),
        (*llama(attention_bias=True), "qkv_bias = True, attn_out_bias = True"),
        (*llama(mlp_bias=True), "mlp_bias = True"),
        (*llama(rope_scaling=reference.LLAMA3_ROPE), "original_max_seq_len = 32"),
        ("gpt2", gguf_files.GPT2 | {"activation_function": "relu"}, "activation = 'relu'"),
        ("gpt2", gguf_files.GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "attn_scale_by_layer = True"),
        ("gpt_neox", gguf_files.NEOX | {"attention_bias": False}, "qkv_bias = False"),
        ("gpt_neox", gguf_files.NEOX | {"tie_word_embeddings": True}, "head is its embedding"),
        ("gpt_neox", gguf_files.NEOX | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope.scaling"),
    ],
)
def test_models_that_a_file_can_not_say(
    model_type: str, config: dict[str, Any], says: str, save: Save, write: Write
) -> None:
    """Guards against a file that loads and computes something else."""
    with pytest.raises(InputError, match=says):
        write(save(model_type, config))


def test_rows_that_q8_0_can_not_cut(save: Save, write: Write) -> None:
    with pytest.raises(InputError, match=r"a multiple of 32 values; 'blk\.0\.ffn_down\.weight' has 80"):
        write(save(*llama(intermediate_size=80)), "q8_0")
