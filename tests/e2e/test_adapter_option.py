"""``--adapter`` of generate and chat, with directories that PEFT made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tests import reference
from zoo.api import load
from zoo.errors import InputError, UnavailableError
from zoo.generate.compile import require_compiler


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, ``adapter`` and ``other`` (an adapter of a wider model)."""
    folder = tmp_path_factory.mktemp("adapters")
    reference.save_tiny_chat_model(folder / "model")
    reference.save_tiny_chat_model(folder / "wide", hidden_size=96)
    for model, adapter in (("model", "adapter"), ("wide", "other")):
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / model)
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.5 * torch.randn_like(parameter))
        adapted.save_pretrained(str(folder / adapter))
    return folder


def zoo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zoo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def generate(directories: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    common = ("--prompt", "Hello", "--temperature", 0, "--max-new-tokens", 12, "--precision", "32-true")
    return zoo("generate", directories / "model", *common, *arguments)


def test_generate(directories: Path) -> None:
    """Guards that it is used: the text is that of PEFT's model, and not that of the base."""
    lm = load(directories / "model", precision="32-true", device="cpu")
    plain = lm.generate("Hello", temperature=0, max_new_tokens=12)
    base = transformers.AutoModelForCausalLM.from_pretrained(directories / "model")
    theirs = peft.PeftModel.from_pretrained(base, directories / "adapter").eval()
    ids = torch.tensor([lm.tokenizer.encode("Hello")])
    ended = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)  # type: ignore[no-untyped-call]
    done = generate(directories, "--adapter", directories / "adapter")
    assert done.returncode == 0, done.stderr
    text = lm.tokenizer.decode(ended[0, ids.shape[1] :].tolist())
    adapted = load(directories / "model", precision="32-true", device="cpu", adapters=[directories / "adapter"])
    assert adapted.generate("Hello", temperature=0, max_new_tokens=12) == text != plain
    assert text.encode(errors="replace").strip() in done.stdout.encode(errors="replace")
    assert "lora, " in done.stderr and "active" in done.stderr


@pytest.mark.parametrize(
    ("adapter", "message"),
    [("model", "no adapter directory"), ("nowhere", "no adapter directory"), ("other", "does not fit this model")],
)
def test_a_directory_that_does_not_fit(adapter: str, message: str, directories: Path) -> None:
    done = generate(directories, "--adapter", directories / adapter)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_compiled_models(directories: Path) -> None:
    """Guards against an adapter that a compiled step would not see."""
    try:
        require_compiler()
    except UnavailableError:
        pytest.skip("no C++ compiler")
    lm = load(directories / "model", device="cpu", compile=True, adapters=[directories / "adapter"])
    assert lm.adapters[0].merged
    with pytest.raises(InputError, match="compiled"):
        lm.adapt("lora")
    options: dict[str, Any] = {
        "precision": "bf16-true",
        "device": "cpu",
        "quantize": "int8",
        "adapters": [directories / "adapter"],
    }
    with pytest.raises(InputError, match="quantized"):
        load(directories / "model", compile=True, **options)


def test_lines_choose(directories: Path, tmp_path: Path) -> None:
    """Guards the choice of each line, and that a line with an unknown name does not end the job."""
    lines: list[dict[str, Any]] = [{"adapter": "mine"}, {"adapter": None}, {}, {"adapter": "yours"}, {"adapter": 3}]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": "Hello", **line}) + "\n" for line in lines))
    common = ("--temperature", 0, "--max-new-tokens", 12, "--precision", "32-true")
    done = zoo(
        "generate", directories / "model", "--batch", source, *common, "--adapter", f"mine={directories}/adapter"
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    plain = load(directories / "model", precision="32-true", device="cpu")
    adapted = load(directories / "model", precision="32-true", device="cpu", adapters={"mine": directories / "adapter"})
    texts = [lm.generate("Hello", temperature=0, max_new_tokens=12) for lm in (adapted, plain)]
    assert [result.get("text") for result in results] == [texts[0], texts[1], texts[0], None, None]
    assert "'yours'" in results[3]["error"]
    assert "adapter must be a string" in results[4]["error"]
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("given", "message"), [(["a.b=X"], "'a.b' is no name"), (["a=X", "a=Y"], "two adapters are named 'a'")]
)
def test_names_that_can_not_be(given: list[str], message: str, directories: Path) -> None:
    options = [part for name in given for part in ("--adapter", name)]
    done = generate(directories, *options)
    assert done.returncode == 2
    assert message in done.stderr
