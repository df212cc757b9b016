"""Loading: everything is compared before anything changes, and what can not be finished is taken back."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.store_lab import TinyModel, Training, counted, digest
from zoo.errors import InputError, ZooError
from zoo.store.rng import capture_rng
from zoo.store.state import flatten
from zoo.store.store import CheckpointStore


def saved(directory: Path, state: dict[str, Any], step: int = 1, **options: Any) -> CheckpointStore:
    store = CheckpointStore(directory, **options)
    store.save(step, state)
    return store


def refused(store: CheckpointStore, state: dict[str, Any], **options: Any) -> str:
    """What the user is told. Nothing may have changed: no object, no value, no generator."""
    targets = {key: value for key, value in state.items() if not is_meta(value)}
    before = digest(targets), digest(capture_rng())
    with pytest.raises(ZooError) as caught:
        store.load(state, **options)
    assert (digest(targets), digest(capture_rng())) == before
    return str(caught.value)


def is_meta(value: Any) -> bool:
    return isinstance(value, nn.Module) and any(tensor.is_meta for tensor in [*value.parameters(), *value.buffers()])


def trained(seed: int = 0, steps: int = 5, width: int = 8) -> Training:
    training = Training(seed, width)
    for _ in range(steps):
        training.step()
    return training


def test_objects_are_filled_in_place_and_values_replaced(tmp_path: Path) -> None:
    """Guards against an optimizer that trains the parameters of a model that was thrown away."""
    training = trained()
    other = trained(seed=1, steps=2)
    weight, state = other.model.inner.weight, other.state()
    with saved(tmp_path, training.state()) as store:
        loaded = store.load(state)
    assert loaded.step == 1 and loaded.path == tmp_path / "step-00000001" and loaded.notes == []
    assert other.model.inner.weight is weight and other.optimizer.param_groups[0]["params"][1] is weight
    assert other.model.head.weight is other.model.embedding.weight
    other.take(state)
    assert digest(other.state()) == digest(training.state())
    assert state["data"]["position"] == 5 and type(state["data"]["order"]) is np.ndarray


def test_what_was_loaded_does_not_share_memory_with_the_file(tmp_path: Path) -> None:
    """Guards against loaded tensors that change when the same step is saved again."""
    state: dict[str, Any] = {"model": {"w": torch.zeros(1000)}, "optimizer": {"m": torch.zeros(1000)}}
    with saved(tmp_path, state) as store:
        store.load(state)
        store.save(1, {"model": {"w": torch.ones(1000)}, "optimizer": {"m": torch.ones(1000)}})
        for path in (tmp_path / "step-00000001").rglob("*.safetensors"):
            path.write_bytes(b"\xff" * path.stat().st_size)
    assert not state["model"]["w"].any() and not state["optimizer"]["m"].any()


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    """Guards against the step of another run that fits by luck: the message names what differs."""
    with saved(tmp_path, {"model": TinyModel(width=4)}) as store:
        message = refused(store, {"model": TinyModel(width=8)})
        assert "the step's 'model' is not of this TinyModel" in message
        assert "embedding.weight of shape [11, 4], here [11, 8]" in message
        model = TinyModel(width=4)
        model.extra = nn.Linear(1, 1)
        del model.inner.bias
        model.inner.register_parameter("bias", None)
        message = refused(store, {"model": model})
        assert "it lacks extra.weight, extra.bias; it has inner.bias, which the model lacks" in message
        assert "inner.weight in float32, here float64" in refused(store, {"model": TinyModel(width=4).double()})


def test_ties_must_be_the_same(tmp_path: Path) -> None:
    """Guards against a head that was untied by to_empty() or assign, and trains apart from then on."""
    untied = TinyModel()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    with saved(tmp_path / "tied", {"model": TinyModel()}) as store:
        message = refused(store, {"model": untied})
        assert "it has embedding.weight and head.weight tied, here they are not" in message
    with saved(tmp_path / "untied", {"model": untied}) as store:
        message = refused(store, {"model": TinyModel()})
        assert "here embedding.weight and head.weight are tied, in the step they are not" in message


def test_tensors_without_values_are_refused(tmp_path: Path) -> None:
    """Guards against a model that computes with meta tensors, or with what was in the memory before."""
    with saved(tmp_path, {"model": TinyModel()}) as store:
        with torch.device("meta"):
            on_meta = TinyModel()
        assert "embedding.weight, inner.weight" in refused(store, {"model": on_meta})
        half = TinyModel()
        half.scale = torch.ones(1, device="meta")
        assert refused(store, {"model": half}).startswith("scale of the model are on the meta device")
        half.scale = torch.full((1,), torch.nan)
        message = refused(store, {"model": half})
        assert message.startswith("scale of the model hold NaN and are in no checkpoint: they are not persistent")


def test_parameters_must_be_finite_and_masks_need_not(tmp_path: Path) -> None:
    """Guards against a run that goes on from NaN, and against infinities of a mask that are taken for it."""
    model = TinyModel()
    with saved(tmp_path, {"model": model}) as store:
        store.load({"model": TinyModel()})
        with torch.no_grad():
            model.inner.weight[0, 1] = torch.nan
            model.inner.bias[:3] = torch.inf
        store.save(2, {"model": model})
        message = refused(store, {"model": TinyModel()})
        assert message.startswith(
            "the step's parameters are not finite: inner.weight (1 of 64 values), inner.bias (3 of 8 values)."
        )
        assert "which=STEP" in message and "check_finite=False" in message
        other = TinyModel()
        store.load({"model": other}, check_finite=False)
        assert torch.equal(other.inner.weight.isnan(), model.inner.weight.isnan())
        with torch.no_grad():
            model.inner.weight.zero_()
            model.inner.bias.zero_()
        model.mask[0] = torch.nan
        store.save(3, {"model": model})
        assert "mask (2 of 2 values)" in refused(store, {"model": TinyModel()})


def test_large_finite_values_are_finite(tmp_path: Path) -> None:
    """Guards against a check by a sum that overflows."""
    largest = {"w": torch.full((100,), torch.finfo(torch.float32).max), "h": torch.full((100,), 65504.0).half()}
    with saved(tmp_path, {"model": largest}) as store:
        store.load({"model": {name: torch.zeros_like(tensor) for name, tensor in largest.items()}})


class Refuses:
    """An object that fails when it is loaded, after it has changed."""

    def __init__(self) -> None:
        self.value: Any = [1]

    def state_dict(self) -> Any:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        if state["value"] == ["bad"]:
            self.value.append("half")
            raise RuntimeError("it does not like this")
        self.value = state["value"]


def refusing(training: Training, value: Any) -> dict[str, Any]:
    thing = Refuses()
    thing.value = [value]
    return {**training.state(), "last": thing}


def test_what_can_not_be_finished_is_taken_back(tmp_path: Path) -> None:
    """Guards against a model of one step with the optimizer of another."""
    with saved(tmp_path, refusing(trained(), "bad")) as store:
        other = trained(seed=1, steps=3)
        state = refusing(other, "good")
        message = refused(store, state)
        assert message == (
            "nothing was loaded from step-00000001, all is as it was: RuntimeError: it does not like this"
        )
        assert state["last"].value == ["good"]
    reference = trained(seed=1, steps=3)
    assert other.losses == reference.losses and digest(other.state()) == digest(reference.state())


class Hooked(nn.Module):
    """A module whose own state fails to load after its tensors have been copied."""

    def __init__(self, extra: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return {"extra": self.extra}

    def set_extra_state(self, state: Any) -> None:
        if state["extra"] == "bad":
            raise ValueError("bad extra")
        self.extra = state["extra"]


def test_a_module_that_fails_half_way_is_taken_back(tmp_path: Path) -> None:
    """Guards against a module whose tensors are new and whose other state is old."""
    with saved(tmp_path, {"model": Hooked("bad")}) as store:
        assert "ValueError: bad extra" in refused(store, {"model": Hooked("mine")})
        store.save(2, {"model": Hooked("good")})
        target = Hooked("mine")
        store.load({"model": target})
        assert target.extra == "good"


class Forgetful(nn.Module):
    """A module that rounds what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))
        self.register_load_state_dict_post_hook(self._round)  # type: ignore[no-untyped-call]

    def _round(self, module: nn.Module, keys: Any) -> None:
        del module, keys
        with torch.no_grad():
            self.weight.copy_(self.weight.half())


def test_a_module_that_does_not_take_all_bits_is_refused(tmp_path: Path) -> None:
    """Guards against hooks, tied or quantized layers that turn what was saved into something near it."""
    with saved(tmp_path, {"model": Forgetful()}) as store:
        message = refused(store, {"model": Forgetful()})
        assert "state['model']: load_state_dict of Forgetful did not take weight as it was stored" in message


class WideMoments(torch.optim.SGD):
    """Keeps float32 moments for bfloat16 weights, as mixed-precision optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                moment = self.state[parameter].setdefault("moment", torch.zeros_like(parameter, dtype=torch.float32))
                moment.add_(torch.rand_like(moment))


def test_float32_moments_of_bfloat16_weights_stay_float32(tmp_path: Path) -> None:
    """Guards against torch's conversion of optimizer state to the dtype of the weights, which rounds it."""
    parameters = [nn.Parameter(torch.rand(4).bfloat16())]
    optimizer, other = WideMoments(parameters, lr=1), WideMoments(parameters, lr=1)
    optimizer.step()
    other.step()
    with saved(tmp_path, {"optimizer": optimizer}) as store:
        store.load({"optimizer": other})
    moment, expected = (o.state[parameters[0]]["moment"] for o in (other, optimizer))
    assert moment.dtype == torch.float32 and torch.equal(moment, expected)


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    """Guards against moments that are given to the wrong parameters: torch compares only how many there are."""
    a, b = nn.Parameter(torch.rand(2)), nn.Parameter(torch.rand(3))
    optimizer = torch.optim.Adam([a, b])
    a.grad, b.grad = torch.ones(2), torch.ones(3)
    optimizer.step()
    with saved(tmp_path, {"optimizer": optimizer}) as store:
        message = refused(store, {"optimizer": torch.optim.Adam([b, a])})
        assert "parameter 0 is ['float32', [2]] in the step and ['float32', [3]] here" in message
        message = refused(store, {"optimizer": torch.optim.Adam([a])})
        assert "its parameter groups have [2] parameters, and here they have [1]" in message


def test_what_is_asked_for_must_be_what_is_there(tmp_path: Path) -> None:
    """Guards against a schedule that begins anew because nobody asked for it, and an object that was never saved."""
    training = trained()
    with saved(tmp_path, training.state()) as store:
        state = training.state()
        del state["scheduler"]
        assert "step-00000001 also holds 'scheduler'" in refused(store, state)
        assert "step-00000001 holds no 'ema'; it holds" in refused(store, {**training.state(), "ema": 1})
        other = Training(seed=9)
        before = digest(capture_rng())
        store.load({"model": other.model}, partial=True)
        assert digest({"m": other.model}) == digest({"m": training.model}) and digest(capture_rng()) == before
        assert not other.optimizer.state


def test_objects_in_lists_and_dicts(tmp_path: Path) -> None:
    """Guards against nested objects that are replaced by their state dicts."""

    def state(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        models = [nn.Linear(2, 2), nn.Linear(2, 2)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=seed + 1) for model in models]
        return {"gan": {"models": models, "note": seed}, "optimizers": optimizers, "pair": (models[0], models[1])}

    mine = state(3)
    models = list(mine["gan"]["models"])
    with saved(tmp_path, state(0)) as store:
        store.load(mine)
        assert mine["gan"]["models"][1] is models[1] and mine["gan"]["note"] == 0
        assert mine["optimizers"][0].param_groups[0]["lr"] == 1
        assert flatten(mine).tree == flatten(state(0)).tree and digest(mine) == digest(state(0))
        mine["optimizers"].append(torch.optim.SGD(nn.Linear(2, 2).parameters()))
        assert "state['optimizers'] has [0, 1, 2] here, and the step has [0, 1]" in refused(store, mine)


def test_which_step(tmp_path: Path) -> None:
    """Guards against the wrong step, and answers that leave the user guessing which there are."""
    with CheckpointStore(tmp_path, keep=None, keep_best="accuracy:max") as store:
        with pytest.raises(InputError, match="holds no step yet"):
            store.load({"v": 0})
        for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.9), (4, 0.1)):
            store.save(step, {"v": step}, metrics={"accuracy": accuracy})
        for which, expected in (("latest", 4), ("best", 2), (3, 3)):
            state = {"v": 0}
            assert store.load(state, which).metrics == store.list()[expected - 1].metrics and state["v"] == expected
        with pytest.raises(InputError, match=r"step 7 of .* is not there. There are the steps 1, 2, 3, 4"):
            store.load({"v": 0}, 7)
        for bad in ("newest", -1, True, None):
            with pytest.raises(InputError, match="is no step"):
                store.load({"v": 0}, bad)  # type: ignore[arg-type]
        (tmp_path / "step-00000002/state/shared.json").write_text("")
        loaded = store.load({"v": 0}, "best")
        assert loaded.step == 3 and loaded.skipped[0].startswith("step-00000002: state/shared.json: truncated")
    with CheckpointStore(tmp_path, keep_best="loss") as store:
        with pytest.raises(InputError, match=r"the metric 'loss'\. There are accuracy"):
            store.load({"v": 0}, "best")
    with CheckpointStore(tmp_path) as store, pytest.raises(InputError, match='keep_best="val_loss"'):
        store.load({"v": 0}, "best")


def test_another_version_of_torch_is_noted(tmp_path: Path) -> None:
    """Guards against a run that differs after an upgrade, and nobody knows why."""
    from zoo.store.manifest import _text

    with saved(tmp_path, {"v": 1}) as store:
        path = tmp_path / "step-00000001/MANIFEST.json"
        content = json.loads(path.read_text())
        content.pop("sha256")
        content["versions"]["torch"] = "1.0"
        path.write_text(_text(content))
        assert store.load({"v": 0}).notes == [
            f"saved with torch 1.0, loaded with {torch.__version__}: results may differ."
        ]


def test_a_reader_beside_a_writer(tmp_path: Path) -> None:
    """Guards against a reader that fails because the step it reads is deleted or replaced, or that mixes two."""
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(0, counted(0))
        writer = threading.Thread(target=lambda: [store.save(n // 3, counted(n)) for n in range(1, 30)])
        writer.start()
        found = []
        with CheckpointStore(tmp_path, read_only=True) as reader:
            while writer.is_alive():
                state = counted(-1)
                reader.load(state, partial=True)
                assert {int(tensor.unique()) for tensor in state["model"].values()} == {state["count"]}
                found.append(state["count"])
        writer.join()
    assert found == sorted(found) and len(set(found)) > 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_training_on_a_gpu_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Guards against values that stay on the CPU, and generators of the GPU that are forgotten."""

    def make() -> dict[str, Any]:
        model = TinyModel().cuda()
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "average": torch.zeros(2).cuda()}

    def step(state: dict[str, Any]) -> float:
        loss = state["model"](torch.arange(5, device="cuda")).square().mean()
        loss.backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        return loss.item()

    state, other = make(), make()
    step(state)
    state["average"] += 1
    with saved(tmp_path, state, background=True) as store:
        expected = [step(state) for _ in range(5)]
        store.load(other)
    assert [step(other) for _ in range(5)] == expected
    assert other["average"].is_cuda and other["average"].tolist() == [1, 1]
