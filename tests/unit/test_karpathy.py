"""nanoGPT and minGPT files: the logits of the published models, through zoo into transformers."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

from tests.e2e.test_command_line import Zoo, zoo  # noqa: F401 - a fixture
from tests.karpathy import CHARACTERS, SIZES, KarpathyGPT, save_meta, save_mingpt, save_nanogpt
from tests.unit.test_torch_files import Attack
from zoo.attention.eager import Eager
from zoo.convert.load import load_model, open_checkpoint
from zoo.errors import FileFormatError
from zoo.registry import Registry

NANO = {"n_layer": 3, "n_head": 3, "n_embd": 48}
"""minGPT's gpt-nano."""
TEXT = "a lime\n\n  'ahead' é日 ? lo !\n"


def check_logits(source: Path, target: Path, theirs: KarpathyGPT, registry: Registry) -> Any:
    """Ours and transformers' (from ``target``) are the published model's, and all probabilities come out."""
    ids = torch.randint(SIZES["vocab_size"], (2, SIZES["block_size"]))
    ours = load_model(open_checkpoint(source, registry), Eager(), dtype=torch.float32)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager")
    with torch.no_grad():
        expected = theirs.eval()(ids)
        assert expected.std() > 0.5
        assert_close(ours(ids), expected, rtol=1e-5, atol=1e-4)
        assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-4)
    return loaded


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(bias: bool, prefix: str, zoo: Zoo, tmp_path: Path, registry: Registry) -> None:  # noqa: F811
    """Guards the whole way of a nanoGPT user: layout, exact GELU, tied head, zeros for absent biases, characters."""
    theirs = KarpathyGPT(SIZES, bias=bias)
    save_nanogpt(tmp_path / "out-char" / "ckpt.pt", theirs, prefix=prefix, bias=bias)
    save_meta(tmp_path / "data" / "shakespeare_char" / "meta.pkl")
    assert zoo("convert", "out-char", "hf").code == 0
    loaded = check_logits(tmp_path / "out-char", tmp_path / "hf", theirs, registry)
    assert loaded.config.activation_function == "gelu"
    assert loaded.config.tie_word_embeddings
    assert (loaded.config.embd_pdrop, loaded.config.attn_pdrop, loaded.config.resid_pdrop) == (0.2, 0.2, 0.2)
    biases = [p for name, p in loaded.named_parameters() if name.endswith(".bias")]
    assert biases and any(b.any() for b in biases) == bias
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer(TEXT)["input_ids"] == [CHARACTERS.index(c) for c in TEXT]
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT


def test_nanogpt_before_there_was_a_bias_option(tmp_path: Path, registry: Registry) -> None:
    """Guards the tanh GELU of the first months, whose files lack 'bias' and carry the causal mask."""
    theirs = KarpathyGPT(SIZES, tanh=True, mask=True)
    saved = save_nanogpt(tmp_path / "ckpt.pt", theirs)
    del saved["model_args"]["bias"]
    torch.save(saved, tmp_path / "ckpt.pt")
    checkpoint = open_checkpoint(tmp_path / "ckpt.pt", registry)
    assert checkpoint.config["activation_function"] == "gelu_new"
    ids = torch.randint(SIZES["vocab_size"], (1, 9))
    with torch.no_grad():
        ours = load_model(checkpoint, Eager(), dtype=torch.float32)(ids)
        assert_close(ours, theirs(ids), rtol=1e-5, atol=1e-4)


def test_nanogpt_with_its_own_head(tmp_path: Path, registry: Registry) -> None:
    """Guards against a head that a descendant untied being dropped for the embedding."""
    theirs = KarpathyGPT(SIZES, tied=False)
    save_nanogpt(tmp_path / "ckpt.pt", theirs)
    spec = open_checkpoint(tmp_path, registry).spec
    assert not spec.tie_embeddings
    ids = torch.randint(SIZES["vocab_size"], (1, 9))
    with torch.no_grad():
        ours = load_model(open_checkpoint(tmp_path, registry), Eager(), dtype=torch.float32)(ids)
        assert_close(ours, theirs(ids), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("filled_in", [False, True])
def test_mingpt(filled_in: bool, zoo: Zoo, tmp_path: Path, registry: Registry) -> None:  # noqa: F811
    """Guards the whole way of a minGPT user; its scripts save the config before or after the sizes are known."""
    theirs = KarpathyGPT(SIZES | NANO, tied=False, tanh=True, mask=True)
    work = tmp_path / "out"
    work.mkdir()
    save_mingpt(work, theirs, **(SIZES | NANO if filled_in else {}))
    save_meta(work / "meta.json")
    assert zoo("convert", "out/model.pt" if filled_in else "out", "hf").code == 0
    loaded = check_logits(work, tmp_path / "hf", theirs, registry)
    assert loaded.config.activation_function == "gelu_new"
    assert not loaded.config.tie_word_embeddings
    generated = zoo("generate", "hf", "--prompt", "a hen", "--max-new-tokens", "8", "--temperature", "0")
    assert generated.code == 0
    assert len(generated.out) == len("a hen") + 8 + 1


def test_mingpt_with_a_plain_config(tmp_path: Path, registry: Registry) -> None:
    """Guards the smallest remedy that the error names: a config.json with n_head alone."""
    theirs = KarpathyGPT(SIZES, tied=False, tanh=True)
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    with pytest.raises(FileFormatError, match=r"needs a config.json beside it.*n_head"):
        open_checkpoint(tmp_path, registry)
    (tmp_path / "config.json").write_text('{"n_head": 3}')
    spec = open_checkpoint(tmp_path, registry).spec
    assert (spec.n_heads, spec.d_model, spec.n_layers, spec.max_seq_len) == (3, 24, 2, 16)


def mingpt(**changes: Any) -> Callable[[Path], object]:
    """Keys of the part 'model' of minGPT's config.json."""
    return lambda d: save_mingpt(d, KarpathyGPT(SIZES | NANO, tied=False, tanh=True), **changes)


def mingpt_of(content: Any) -> Callable[[Path], object]:
    """A good config.json, and something else in model.pt."""

    def save(directory: Path) -> None:
        mingpt()(directory)
        torch.save(content, directory / "model.pt")

    return save


def nanogpt(change: Callable[[dict[str, Any]], object], **model: bool) -> Callable[[Path], object]:
    """A ckpt.pt, changed."""

    def save(directory: Path) -> None:
        saved = save_nanogpt(directory / "ckpt.pt", KarpathyGPT(SIZES, **model))
        change(saved)
        torch.save(saved, directory / "ckpt.pt")

    return save


def vocabulary(content: Any = None, **changes: Any) -> Callable[[Path], object]:
    """A good ckpt.pt with this meta.pkl beside it."""

    def save(directory: Path) -> None:
        save_nanogpt(directory / "ckpt.pt", KarpathyGPT(SIZES))
        save_meta(directory / "meta.pkl", **changes)
        if content is not None:
            (directory / "meta.pkl").write_bytes(content)

    return save


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "old minGPT": (
        mingpt_of({"tok_emb.weight": torch.ones(3)}),
        "no state dict of minGPT.*it has tok_emb.weight",
    ),
    "other heads": (mingpt(n_head=5), r"n_embd \(48\) is not a multiple of n_head \(5\)"),
    "other width": (mingpt(model_type="gpt-mini"), "says n_layer = 6; the weights have 3"),
    "no type": (mingpt(model_type=None), "needs 'n_head', a positive integer, not None"),
    "new type": (mingpt(model_type="gpt-pico"), "model_type 'gpt-pico'; minGPT knows openai-gpt"),
    "new key": (mingpt(rotary=True), "keys of the model that minGPT does not have: rotary"),
    "text for heads": (mingpt(n_head="3"), "needs 'n_head', a positive integer, not '3'"),
    "a nanoGPT file": (
        mingpt_of({"model_args": SIZES, "model": {}}),
        "is a checkpoint of nanoGPT. Read it with --from nanogpt",
    ),
    "a state dict": (
        lambda d: torch.save(KarpathyGPT(SIZES).state_dict(), d / "ckpt.pt"),
        "must be a dict with 'model' and 'model_args'.*--from mingpt",
    ),
    "new part": (nanogpt(lambda c: c.update(ema={})), "parts that nanoGPT does not save: ema"),
    "new argument": (nanogpt(lambda c: c["model_args"].update(use_rmsnorm=True)), "does not have: use_rmsnorm.*family"),
    "no width": (nanogpt(lambda c: c["model_args"].pop("n_embd")), "needs 'n_embd', a positive integer, not None"),
    "zero heads": (nanogpt(lambda c: c["model_args"].update(n_head=0)), "needs 'n_head', a positive integer, not 0"),
    "much dropout": (nanogpt(lambda c: c["model_args"].update(dropout=1.5)), "dropout must be within"),
    "arguments in a list": (nanogpt(lambda c: c.update(model_args=[])), "model_args is a list"),
    "more layers": (nanogpt(lambda c: c["model_args"].update(n_layer=3)), "lacks 12 tensors of the model"),
    "new tensor": (nanogpt(lambda c: c["model"].update(x=torch.ones(1))), "holds 1 tensors that the model lacks: x"),
    "other shape": (
        nanogpt(lambda c: c["model"].update({"transformer.wpe.weight": torch.ones(3, 24)})),
        r"'transformer.wpe.weight' has shape \[3, 24\]; the config needs \[16, 24\]",
    ),
    "biases after all": (nanogpt(lambda c: c["model_args"].update(bias=False)), "bias = False, but there are biases"),
    "no biases": (nanogpt(lambda c: None, bias=False), "lacks 13 tensors of the model"),
    "vocabulary of another data set": (vocabulary(stoi={"a": 0}, itos={0: "a"}), "maps 1 characters to ids"),
    "words": (vocabulary(stoi={"ab": 0}), "single characters"),
    "gap in the ids": (vocabulary(stoi={c: i + 1 for i, c in enumerate(CHARACTERS)}), "must be there once"),
    "itos of another": (vocabulary(itos={0: "x"}), "contradicts itself"),
    "a vocabulary with more": (vocabulary(encoding="gpt2"), "keys that zoo does not understand: encoding"),
    "no pickle": (vocabulary(b"hello"), "no pickle of plain data"),
    "a list for a vocabulary": (vocabulary(pickle.dumps([1])), "must hold a dict, not a list"),
}


@pytest.mark.parametrize("what", BAD)
def test_errors(what: str, tmp_path: Path, registry: Registry) -> None:
    """Guards each message; all name the file."""
    make, said = BAD[what]
    make(tmp_path)
    with pytest.raises(FileFormatError, match=said) as caught:
        open_checkpoint(tmp_path, registry).located()
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["ckpt.pt", "model.pt", "meta.pkl"])
def test_code_is_not_run(name: str, zoo: Zoo, tmp_path: Path) -> None:  # noqa: F811
    """Guards each pickle that comes with these models, also when only the weights are wanted."""
    source = tmp_path / "out"
    save_nanogpt(source / "ckpt.pt", KarpathyGPT(SIZES))
    if name == "model.pt":
        (source / "ckpt.pt").unlink()
        (source / "config.json").write_text('{"n_head": 3}')
    attack = Attack(tmp_path / "ran")
    torch.save({"x": attack}, source / name)
    if name == "meta.pkl":
        (source / name).write_bytes(pickle.dumps(attack))
    result = zoo("convert", "out", "hf")
    assert result.code == 2
    assert f"out/{name}" in result.err
    assert "Nothing in it was run" in result.err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "hf").exists()


def test_no_tokenizer(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Guards the remedy for a model on GPT-2's tokens; the weights alone can be converted, named as a bare file."""
    save_nanogpt(tmp_path / "out" / "ckpt.pt", KarpathyGPT(SIZES))
    result = zoo("generate", "out", "--prompt", "a")
    assert result.code == 2
    assert "no meta.pkl, meta.json or tokenizer.json" in result.err
    assert "GPT-2's tokenizer.json" in result.err
    monkeypatch.chdir(tmp_path / "out")
    assert zoo("convert", "ckpt.pt", "../hf").code == 0
    assert not json.loads((tmp_path / "hf" / "config.json").read_text()).get("quantization_config")


def test_a_character_that_the_model_never_saw(zoo: Zoo, tmp_path: Path) -> None:  # noqa: F811
    """Guards against a traceback, and against dropping it in silence: before the conversion and after."""
    save_nanogpt(tmp_path / "out" / "ckpt.pt", KarpathyGPT(SIZES))
    save_meta(tmp_path / "out" / "meta.pkl")
    assert zoo("convert", "out", "hf").code == 0
    for model in ("out", "hf"):
        result = zoo("generate", model, "--prompt", "a Z")
        assert result.code == 2
        assert "no tokens for 'Z'" in result.err
