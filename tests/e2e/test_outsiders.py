"""Twelve outsiders, one of each kind: installed with pip, listed, used by ``python -m zoo``, uninstalled, and gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import reference
from tests.plugin_environment import Environment
from zoo.registry import KINDS

OUTSIDERS = Path(__file__).parents[1] / "outsiders"
NAMES = sorted(path.name for path in OUTSIDERS.iterdir() if path.is_dir())
MAX_LINES = 40


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """With all of them; a test that uses one must not be run alone after the last."""
    made = Environment(tmp_path_factory.mktemp("environment"))
    pip = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    made.run(*pip, *(OUTSIDERS / name for name in NAMES))
    return made


@pytest.fixture(scope="module")
def model(environment: Environment) -> Path:
    """A tiny model with the tokenizer of bytes."""
    directory = environment.directory / "model"
    reference.save_tiny_chat_model(directory, num_key_value_heads=2, max_position_embeddings=256)
    return directory


@pytest.fixture(scope="module")
def rows(environment: Environment) -> Path:
    """Examples to train on."""
    path = environment.directory / "rows.jsonl"
    examples = [{"prompt": f"{n} and one is ", "completion": str(n + 1)} for n in range(40)]
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


def generate(environment: Environment, model: Path | str, *options: str) -> dict[str, object]:
    found: dict[str, object] = environment.zoo_json(
        "generate", model, "--prompt", "Once", "--temperature", "0", "--max-new-tokens", "8", *options
    )
    return found


@pytest.fixture(scope="module")
def usual(environment: Environment, model: Path) -> object:
    """What the model writes without any outsider."""
    return generate(environment, model)["ids"]


def finetune(environment: Environment, model: Path, rows: Path, *options: str) -> Path:
    out = environment.directory / f"run-{len(list(environment.directory.glob('run-*')))}"
    fixed = (
        "--max-steps",
        "2",
        "--batch-size",
        "4",
        "--max-seq-len",
        "64",
        "--prompt-style",
        "plain",
        "--device",
        "cpu",
    )
    environment.zoo("finetune", model, "--data", rows, "--out", out, *fixed, *options)
    return out


def test_there_is_one_of_each_kind() -> None:
    """Guards the claim that a component of any kind is a few lines."""
    assert {name.removeprefix("outsider-") for name in NAMES} == KINDS.keys() - {"model"}
    for name in NAMES:
        lines = [line for path in (OUTSIDERS / name).rglob("*.py") for line in path.read_text().splitlines()]
        assert sum(bool(line.strip()) for line in lines) <= MAX_LINES, name


def test_they_are_listed(environment: Environment) -> None:
    plugins = {plugin["name"]: plugin["state"] for plugin in environment.zoo_json("plugins", "list")}
    assert {name: plugins[name] for name in NAMES} == dict.fromkeys(NAMES, "ok")
    everything = environment.zoo_json("list", "--probe")
    for kind in KINDS.keys() - {"model"}:
        (row,) = [row for row in everything[KINDS[kind]] if row["name"] == "outsider"]
        assert (row["state"], row["origin"]) == ("ok", f"outsider-{kind} 1.0")


def test_family(environment: Environment) -> None:
    """A model of the family is trained, written and run."""
    text = environment.directory / "text.txt"
    text.write_text("Once upon a time there was an outsider. " * 50)
    out = environment.directory / "pretrained"
    sizes = (
        "--set",
        "spec.d_ffn=48",
        "--max-seq-len",
        "32",
        "--batch-size",
        "2",
        "--max-steps",
        "2",
        "--device",
        "cpu",
    )
    environment.zoo("pretrain", "outsider-tiny", "--data", text, "--tokenizer", "byte", "--out", out, *sizes)
    config = json.loads(next(out.rglob("config.json")).read_text())
    assert config["model_type"] == "outsider"
    assert len(generate(environment, out)["ids"]) == 8  # type: ignore[arg-type]


def test_attention(environment: Environment, model: Path, rows: Path, usual: object) -> None:
    """It computes what zoo's own does, and what it can not do is refused with its words."""
    found = generate(environment, model, "--attention", "outsider")
    assert (found["attention"], found["ids"]) == ("outsider", usual)
    refused = environment.zoo(
        "finetune", model, "--data", rows, "--attention", "outsider", "--out", "refused", exit_code=3
    )
    assert "it is no good at training" in refused.stderr


def test_adapter(environment: Environment, model: Path, rows: Path) -> None:
    """It is trained, saved, and found again by its directory."""
    run = finetune(environment, model, rows, "--adapter", "outsider", "--set", "adapter.role=attn.v")
    assert '"outsider"' in next(run.rglob("adapter_config.json")).read_text()
    said = environment.zoo("generate", model, "--prompt", "Once", "--max-new-tokens", "2", "--adapter", run).stderr
    assert "outsider" in said


def test_precision(environment: Environment, model: Path) -> None:
    assert generate(environment, model, "--precision", "outsider")["precision"] == "outsider"


def test_quantizer(environment: Environment, model: Path) -> None:
    said = environment.zoo("generate", model, "--prompt", "Once", "--max-new-tokens", "2", "--quantize", "outsider")
    assert ", outsider, " in said.stderr


def test_converter(environment: Environment, model: Path, usual: object) -> None:
    """Written, recognized and read."""
    written = environment.directory / "converted"
    environment.zoo("convert", model, written, "--to", "outsider")
    assert (written / "outsider" / "config.json").is_file()
    assert generate(environment, written)["ids"] == usual


def test_source(environment: Environment, model: Path, usual: object) -> None:
    """What it brings is recorded and run."""
    assert generate(environment, f"outsider:{model}")["ids"] == usual
    assert (environment.directory / "checkpoints" / "model" / "zoo.yaml").is_file()


def test_dataset(environment: Environment) -> None:
    report = environment.zoo("prepare", "outsider", "--out", environment.directory / "prepared")
    assert "30" in report.stdout + report.stderr
    assert (environment.directory / "prepared").is_dir()


def test_prompt(environment: Environment, model: Path, rows: Path) -> None:
    """Its words are in the sample that is shown, and what is learnt of it is marked."""
    options = ("--data", rows, "--prompt-style", "outsider", "--out", "dry", "--dry-run", "--device", "cpu")
    shown = environment.zoo("finetune", model, *options).stderr
    assert "\nA:[[ " in shown


def test_sampler(environment: Environment, model: Path) -> None:
    """By name, with its options; mistakes are told."""
    found = generate(environment, model, "--sampler", "outsider,least=200")
    assert all(token >= 200 for token in found["ids"])  # type: ignore[attr-defined]
    for wrong, message in (("outsider,most=1", "outsider takes least."), ("outsidr", "Did you mean 'outsider'?")):
        refused = environment.zoo("generate", model, "--prompt", "Once", "--sampler", wrong, exit_code=2)
        assert message in refused.stderr


def test_logger(environment: Environment, model: Path, rows: Path) -> None:
    run = finetune(environment, model, rows, "--logger", "outsider")
    lines = (run / "outsider.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("1 loss ")] and lines[-1] == "-1 finished"


def test_command(environment: Environment) -> None:
    assert environment.zoo("outsider").stdout.endswith(" models\n")
    assert environment.zoo_json("outsider")["models"] > 100


def test_they_are_gone(environment: Environment, model: Path, rows: Path) -> None:
    """The last: nothing of them is left, and what names them says so."""
    run = finetune(environment, model, rows, "--logger", "outsider", "--adapter", "outsider")
    assert "plugins:\n  outsider-adapter: '1.0'\n  outsider-logger: '1.0'\n" in (run / "recipe.yaml").read_text()
    environment.run("-m", "pip", "uninstall", "--yes", "--quiet", *NAMES)
    again = environment.zoo("finetune", "--recipe", run / "recipe.yaml", "--out", "again", exit_code=3)
    assert "written with the plugin outsider-adapter 1.0, which is not installed" in again.stderr
    assert not set(NAMES) & {plugin["name"] for plugin in environment.zoo_json("plugins", "list")}
    everything = environment.zoo_json("list")
    assert not [row for kind in everything.values() for row in kind if row["name"].startswith("outsider")]
    environment.zoo("outsider", exit_code=2)
    for option in ("--attention", "--precision", "--quantize", "--sampler"):
        refused = environment.zoo("generate", model, "--prompt", "Once", option, "outsider", exit_code=2)
        assert "is named 'outsider'" in refused.stderr
