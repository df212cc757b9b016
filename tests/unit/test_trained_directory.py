"""A run, a step or a store where a model or an adapter is asked for: what of it is taken, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import reference
from zoo.api import LanguageModel, load
from zoo.errors import FileFormatError, InputError
from zoo.registry import Registry
from zoo.runs.files import AdapterFiles, ModelDirectoryFiles
from zoo.runs.model import Trained
from zoo.store.files import FileRecord
from zoo.store.locate import trained_directory
from zoo.store.manifest import read_manifest
from zoo.store.store import CheckpointStore
from zoo.text.prompts import choose_prompt_style


@pytest.fixture
def lm(tmp_path: Path, registry: Registry) -> LanguageModel:
    reference.save_tiny_chat_model(tmp_path / "base", num_hidden_layers=1)
    return load(tmp_path / "base", precision="32-true", device="cpu", registry=registry)


def make_run(run: Path, lm: LanguageModel, registry: Registry, adapter: str, steps: tuple[int, ...]) -> Path:
    """A run that was stopped, with what the trainer saves at these steps; the trained values are the step's number."""
    handle = lm.adapt(adapter, name="trained")
    trained = Trained(lm, handle)
    style = choose_prompt_style("plain", lm.tokenizer, registry)
    files = ModelDirectoryFiles(trained, registry) if adapter == "full" else AdapterFiles(trained, style)
    run.mkdir()
    (run / "recipe.yaml").write_text("model: base\n")
    (run / "checkpoints").mkdir()
    with CheckpointStore(run / "checkpoints", keep=9, model_files=files) as store:
        for step in steps:
            with torch.no_grad():
                for parameter in handle.trainable().values():
                    parameter.fill_(step / 1000)
            store.save(step, {"model": handle, "more": torch.full((3,), float(step))})
    return run


def step_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def damage(step: Path, file: str) -> None:
    """Change a byte, not the size."""
    path = step / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def weight_file(step: Path, kind: str) -> str:
    files: dict[str, FileRecord] = dict(read_manifest(step).files)
    return next(name for name in files if name.startswith(f"model/{kind}") and name.endswith(".safetensors"))


@pytest.fixture
def run(tmp_path: Path, lm: LanguageModel, registry: Registry) -> Path:
    return make_run(tmp_path / "run", lm, registry, "lora", (4, 8))


def test_what_a_path_stands_for(run: Path) -> None:
    """Guards the newest step of a run that goes on, and the result of one that has ended."""
    newest = step_of(run, 8) / "model"
    assert trained_directory(run, "adapter") == newest
    assert trained_directory(run / "checkpoints", "adapter") == newest
    assert trained_directory(step_of(run, 4), "adapter") == step_of(run, 4) / "model"
    assert trained_directory(newest, "adapter") == newest
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")  # being written: the run has not ended
    assert trained_directory(run, "adapter") == newest
    (run / "result.json").write_text("{}")
    assert trained_directory(run, "adapter") == run / "adapter"


def test_everything_else_stands_for_itself(tmp_path: Path, lm: LanguageModel) -> None:
    (tmp_path / "file.pt").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "base" / "recipe.yaml").write_text("")  # other programs have recipes too
    for path in (tmp_path / "base", tmp_path / "file.pt", tmp_path / "empty", tmp_path / "missing"):
        for kind in ("model", "adapter"):
            assert trained_directory(path, kind) == path


def test_the_step_that_was_saved_last_is_the_newest(tmp_path: Path, lm: LanguageModel, registry: Registry) -> None:
    """Guards against the highest number: a run that went back to an earlier step is at that step."""
    run = make_run(tmp_path / "run", lm, registry, "lora", (8, 4))
    assert trained_directory(run, "adapter") == step_of(run, 4) / "model"


def test_a_damaged_step_is_passed_over_and_named(run: Path) -> None:
    """Guards against weights that were altered, and against an older step that is taken without a word."""
    damage(step_of(run, 8), weight_file(step_of(run, 8), "adapter"))
    told: list[str] = []
    assert trained_directory(run, "adapter", told.append) == step_of(run, 4) / "model"
    assert len(told) == 1
    assert "step-00000008 can not be used: model/adapter_model.safetensors: " in told[0]
    assert "step-00000004 is taken" in told[0]
    with pytest.raises(FileFormatError, match=r"step-00000008 can not be used: model/adapter_model\.safetensors"):
        trained_directory(step_of(run, 8), "adapter")
    (step_of(run, 4) / "MANIFEST.json").unlink()
    with pytest.raises(FileFormatError, match=r"no step in .* can be used"):
        trained_directory(run, "adapter")


def test_the_optimizer_is_not_needed(run: Path) -> None:
    """Guards against gigabytes that are read, and steps that are refused, for what a model does without."""
    names = [name for name in read_manifest(step_of(run, 8)).files if name.startswith("state/")]
    for name in names:
        damage(step_of(run, 8), name)
    told: list[str] = []
    assert trained_directory(run, "adapter", told.append) == step_of(run, 8) / "model"
    assert names and not told


def test_the_other_kind_is_refused(run: Path, tmp_path: Path, lm: LanguageModel, registry: Registry) -> None:
    """Guards the message: it says how the run is used."""
    base = str(tmp_path / "base")
    for path in (run, step_of(run, 8)):
        with pytest.raises(InputError, match="trained an adapter, and no model") as caught:
            trained_directory(path, "model")
        assert f"{base} --adapter {path}" in str(caught.value)
    lm.model.__dict__["_adapters"]["trained"].detach()
    whole = make_run(tmp_path / "whole", lm, registry, "full", (2,))
    with pytest.raises(InputError, match="trained a whole model, and no adapter"):
        trained_directory(whole, "adapter")
    assert trained_directory(whole, "model") == step_of(whole, 2) / "model"


def test_what_no_command_takes(tmp_path: Path) -> None:
    """Guards a run without steps, and steps whose model is not in the layout of a directory."""
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    (tmp_path / "new" / "recipe.yaml").write_text("")
    with pytest.raises(InputError, match="holds no step yet"):
        trained_directory(tmp_path / "new", "model")
    with CheckpointStore(tmp_path / "loop") as store:
        store.save(1, {"model": torch.nn.Linear(2, 2)})
    with pytest.raises(InputError, match="another training loop"):
        trained_directory(tmp_path / "loop", "model")


def test_loading_by_the_run(run: Path, tmp_path: Path, registry: Registry) -> None:
    """Guards ``load``, with the adapter of the newest whole step, and the note about the other."""
    damage(step_of(run, 8), weight_file(step_of(run, 8), "adapter"))
    lm = load(tmp_path / "base", precision="32-true", device="cpu", adapters=[run], registry=registry)
    (attached,) = lm.adapters
    assert all(torch.all(tensor == 4 / 1000) for tensor in attached.trainable().values())
    assert any("step-00000008 can not be used" in line for line in attached.notes)
    told: list[str] = []
    with pytest.raises(InputError, match="trained an adapter"):
        load(run, registry=registry, report=told.append)


def test_loading_a_run_of_a_whole_model(tmp_path: Path, lm: LanguageModel, registry: Registry) -> None:
    run = make_run(tmp_path / "run", lm, registry, "full", (2, 4))
    found = load(run, precision="32-true", device="cpu", registry=registry)
    assert all(torch.all(p == 4 / 1000) for p in found.model.parameters())
    (run / "model").mkdir()
    lm.model.__dict__["_adapters"].clear()
    for path in (step_of(run, 2) / "model").iterdir():
        (run / "model" / path.name).write_bytes(path.read_bytes())
    (run / "result.json").write_text("{}")
    ended = load(run, precision="32-true", device="cpu", registry=registry)
    assert all(torch.all(p == 2 / 1000) for p in ended.model.parameters())
