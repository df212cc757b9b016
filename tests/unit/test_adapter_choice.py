"""Each request with adapters of its own, on one model: the text is that of a model which has no others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import pytest
import torch

from tests import reference
from zoo.adapters.attach import AttachedAdapter
from zoo.adapters.switch import using
from zoo.api import LanguageModel, load
from zoo.errors import InputError, UnknownNameError

ADAPTERS = {"a": ("lora", 1), "b": ("lora", 2), "p": ("llama-adapter", 3), "v": ("llama-adapter-v2", 4)}
PROMPT = "Once upon a time"


def adapt(lm: LanguageModel, name: str) -> AttachedAdapter:
    kind, seed = ADAPTERS[name]
    torch.manual_seed(seed)
    handle = lm.adapt(kind, name=name, **({"layers": 2} if kind != "lora" else {}))
    with torch.no_grad():
        for parameter in handle.trainable().values():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return handle


@pytest.fixture
def model(tmp_path: Path) -> Path:
    reference.save_tiny_chat_model(tmp_path / "model")
    return tmp_path / "model"


def open_model(model: Path) -> LanguageModel:
    lm = load(model, precision="32-true", device="cpu")
    lm.checkpoint.generation["eos_token_id"] = []  # nothing ends the texts
    return lm


def alone(model: Path, names: Sequence[str]) -> list[int]:
    """Ids from a model that has these adapters only."""
    lm = open_model(model)
    for name in names:
        adapt(lm, name)
    return ids(lm, None)


def ids(lm: LanguageModel, adapter: str | Sequence[str] | None) -> list[int]:
    reply = lm.generate(PROMPT, temperature=0.0, max_new_tokens=16, adapter=adapter, stream=True)
    return reply.read().ids


CHOICES: list[list[str]] = [[], ["a"], ["b"], ["p"], ["v"], ["a", "b"], ["b", "p"]]


def test_one_after_the_other(model: Path) -> None:
    """Guards against keys and values of another adapter in the cache, and against adapters that stay on or off."""
    expected = [alone(model, names) for names in CHOICES]
    assert len({tuple(x) for x in expected}) == len(CHOICES)
    lm = open_model(model)
    handles = [adapt(lm, name) for name in ADAPTERS]
    everything = ids(lm, None)
    assert [ids(lm, names) for names in (*CHOICES, *CHOICES[::-1])] == expected + expected[::-1]
    assert ids(lm, "a") == expected[1]
    assert ids(lm, None) == everything
    assert all(handle.active for handle in handles)


def test_batch(model: Path) -> None:
    """Guards against rows that compute with a neighbour's adapter."""
    expected = [alone(model, names) for names in CHOICES]
    lm = open_model(model)
    for name in ADAPTERS:
        adapt(lm, name)
    requests = [lm.request(PROMPT, adapter=names, max_new_tokens=16, temperature=0.0) for names in CHOICES * 2]
    replies = dict(lm.run(requests, batch_size=3))
    assert [replies[number].ids for number in range(len(requests))] == expected * 2  # type: ignore[union-attr]


def test_two_streams_in_turn(model: Path) -> None:
    """Guards against an adapter that stays on between the pieces of a text."""
    expected = {name: alone(model, [name]) for name in "ab"}
    lm = open_model(model)
    for name in ADAPTERS:
        adapt(lm, name)
    streams = {}
    for name in expected:
        lm._session = None  # a sequence of its own
        streams[name] = lm.generate(PROMPT, temperature=0.0, max_new_tokens=16, adapter=name, stream=True)
    for _ in zip_longest(*streams.values()):
        pass
    assert {name: stream.ids for name, stream in streams.items()} == expected


def test_cache_after_training(model: Path) -> None:
    """Guards against keys and values that were computed before the optimizer's step, or before merging."""
    lm = open_model(model)
    handle = adapt(lm, "a")
    before = ids(lm, None)
    optimizer = torch.optim.AdamW(handle.trainable().values(), lr=0.3, fused=True)
    lm.model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    optimizer.step()
    after = ids(lm, None)
    lm._session = None
    assert after == ids(lm, None) != before
    handle.merge()
    assert ids(lm, None) == after


def test_state_is_as_before(model: Path) -> None:
    """Guards the order in which stacked adapters apply, and the norms and biases that v2 trains."""
    lm = open_model(model)
    handles = [adapt(lm, name) for name in ADAPTERS]
    handles[0].deactivate()
    handles[0].activate()  # now the last one
    orders = [holder.active for handle in handles for holder in handle.holders()]
    weights = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), using(lm.model, ["b"]):
        raise ZeroDivisionError
    assert [holder.active for handle in handles for holder in handle.holders()] == orders
    assert all(torch.equal(tensor, weights[name]) for name, tensor in lm.model.state_dict().items())


def test_refused(model: Path) -> None:
    """Guards against a name that is ignored, and against weights that hold what was not asked for."""
    lm = open_model(model)
    with pytest.raises(UnknownNameError, match="no adapters"):
        lm.generate(PROMPT, adapter="a")
    a, _ = adapt(lm, "a"), adapt(lm, "b")
    with pytest.raises(UnknownNameError, match="'c'"):
        lm.generate(PROMPT, adapter="c")
    with pytest.raises(InputError, match="twice"):
        lm.generate(PROMPT, adapter=["a", "a"])
    a.merge()
    with pytest.raises(InputError, match="'a' is merged"):
        lm.generate(PROMPT, adapter="b", max_new_tokens=1)
    assert lm.generate(PROMPT, adapter=["a", "b"], temperature=0.0, max_new_tokens=4)
    adapt(lm, "v")
    handle = lm.adapt("norm", name="n")
    with pytest.raises(InputError, match=r"'v' and 'n' both train .*norm"):
        lm.generate(PROMPT, adapter=["a", "v"], max_new_tokens=1)
    assert handle.active
