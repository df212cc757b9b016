"""State as tensors and JSON: back to the bit, or an error that names the place."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.store_lab import Training, digest
from zoo.errors import InputError
from zoo.store.files import DTYPES, FileRecord, read_tensors, write_tensors
from zoo.store.rng import capture_rng, restore_rng
from zoo.store.state import flatten, unflatten, unwrap


def again(state: Any) -> Any:
    """Through JSON text, as a file has it."""
    flat = flatten(state)
    return unflatten(json.loads(json.dumps(flat.tree, allow_nan=False)), flat.tensors)


def same(a: Any, b: Any) -> bool:
    """Equal in every type and bit; NaN is NaN, and -0.0 is not 0.0."""
    return exact(a) == exact(b)


def exact(value: Any) -> Any:
    """What tells values apart that are equal to Python."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return kind, str(value.dtype), value.shape, bytes_of(value)
    if isinstance(value, np.ndarray | np.generic):
        return kind, str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return kind, [(exact(key), exact(item)) for key, item in value.items()]
    return kind, list(map(exact, value)) if isinstance(value, list | tuple) else repr(value)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
KEYS = st.one_of(
    st.text(max_size=4), st.sampled_from(["$tensor", "$", "", "a.b", "__metadata__"]), st.integers(), st.none()
)
TENSORS = st.builds(
    lambda values, dtype: torch.tensor(values).to(dtype),
    st.lists(st.floats(-100, 100), max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]),
)
ARRAYS = TENSORS.map(lambda tensor: tensor.numpy().copy())
STATES = st.recursive(
    SCALARS | TENSORS | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=2).map(OrderedDict)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(STATES)
def test_any_state_comes_back_as_it_was(state: Any) -> None:
    """Guards against a type, a key or a special float that JSON turns into another."""
    assert same(again(state), state)


def test_what_schedulers_and_numpy_hold_comes_back() -> None:
    """Guards against a Counter that became a dict, and a numpy number that became Python's."""
    state = {
        "milestones": Counter({3: 2, 5: 1}),
        "numbers": (np.float32(0.1), np.int64(7), np.bool_(True), np.float64(math.nan)),
        "array": np.arange(6, dtype=np.uint16).reshape(2, 3).T,
        "shape": torch.Size([2, 3]),
        "big": 2**80,
        -1: {1.5: -0.0, True: math.inf, (1, "a"): -math.inf},
    }
    expected = {**state, "shape": (2, 3)}
    assert same(again(state), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_from_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """Guards against a dtype that is written as another: every byte pattern is in it, next to tensors of odd sizes."""
    raw = torch.arange(256, dtype=torch.uint8) if dtype != torch.bool else torch.tensor([0, 1] * 128, dtype=torch.uint8)
    tensors = {
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "all": raw.view(dtype),
        "none": torch.empty(0, 3, dtype=dtype),
        "one": raw[-8:].view(dtype)[-1],
        "strided": raw.view(dtype)[::2],
    }
    record = write_tensors(tmp_path / "x.safetensors", tensors)
    found = read_tensors(tmp_path / "x.safetensors", record)
    public = load_file(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0, "readers that map the file find every tensor at a multiple of its item size"
    assert all(header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0 for name, tensor in tensors.items())
    for name, tensor in tensors.items():
        for other in (found[name], public[name]):
            assert other.dtype == dtype or name == "odd"
            assert other.shape == tensor.shape
            assert bytes_of(other) == bytes_of(tensor), name


def test_a_file_of_many_pieces_is_hashed_as_it_is(tmp_path: Path) -> None:
    """Guards against a digest that misses a piece or takes them in another order."""
    import hashlib

    tensors = {"a": torch.randn(5_000_000), "b": torch.arange(5_000_000, dtype=torch.int64)}
    record = write_tensors(tmp_path / "x", tensors)
    content = (tmp_path / "x").read_bytes()
    assert record == FileRecord(len(content), hashlib.sha256(content).hexdigest())
    found = read_tensors(tmp_path / "x", record)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_tied_tensors_are_stored_once_and_come_back_tied() -> None:
    """Guards against a tied head that is saved twice, and comes back as two tensors."""
    weight = torch.randn(3, 2)
    flat = flatten(
        {"embedding": weight, "head": weight, "slice": weight[:2], "turned": weight.T, "copy": weight.clone()}
    )
    assert flat.ties == {"head": "embedding"}
    assert set(flat.tensors) == {"embedding", "slice", "turned", "copy"}
    state = unflatten(flat.tree, flat.tensors)
    assert state["head"] is state["embedding"]
    assert state["turned"].shape == (2, 3)


def test_names_that_meet_stay_apart(tmp_path: Path) -> None:
    """Guards against a tensor that another one overwrites, or that the header of the file takes for its own."""
    names: list[Any] = ["a.b", "__metadata__", "", "a.b#2", 1, "1", 1.5]
    state = {name: torch.tensor([i]) for i, name in enumerate(names)} | {"a": {"b": torch.tensor([7])}}
    flat = flatten(state)
    record = write_tensors(tmp_path / "x", flat.tensors)
    assert same(unflatten(flat.tree, read_tensors(tmp_path / "x", record)), state)
    assert len(load_file(tmp_path / "x")) == len(state)


def test_names_of_a_module_are_those_of_its_state_dict() -> None:
    """Guards against files whose tensor names only zoo can read."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert set(flatten(model).tensors) == set(model.state_dict())


def test_wrappers_do_not_change_names() -> None:
    """Guards against a state saved under torch.compile that a plain model can not load."""
    model = nn.Linear(2, 2)
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    assert set(flatten({"model": compiled}).tensors) == {"model.weight", "model.bias"}


class Foreign:
    """Not a thing that can be saved."""


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [1, {"b": Foreign()}]}, "state['a'][1]['b'] is a Foreign, which no checkpoint can hold"),
        ({"a": {1, 2}}, "state['a'] is a set"),
        ({"a": b"raw"}, "state['a'] is a bytes"),
        ({"a": lambda: 0}, "state['a'] is a function"),
        ({"a": nn.Linear}, "state['a'] is a type"),
        ({"a": {Foreign(): 1}}, "state['a'] has a key of type Foreign"),
        ({"a": np.array(["x"])}, "state['a'] is a numpy ndarray of dtype <U1"),
        ({"a": np.array([None])}, "state['a'] is a numpy ndarray of dtype object"),
        ({"a": np.ma.masked_array([1])}, "state['a'] is a numpy MaskedArray"),
        ({"a": torch.zeros(2, device="meta")}, "state['a'] is on the meta device"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "state['a'] is a tensor of dtype torch.complex128"),
        ({"a": torch.eye(2).to_sparse()}, "state['a'] is a tensor of layout torch.sparse_coo"),
    ],
)
def test_what_can_not_be_saved_is_named_with_its_place(state: Any, message: str) -> None:
    """Guards against a pickle in disguise, and an error that leaves the user searching."""
    with pytest.raises(InputError) as caught:
        flatten(state)
    assert message in str(caught.value)


def test_a_state_that_contains_itself_is_refused() -> None:
    """Guards against a stack overflow."""
    state: dict[str, Any] = {"a": {}}
    state["a"]["b"] = state
    with pytest.raises(InputError, match=r"state\['a'\]\['b'\] contains itself"):
        flatten(state)


def test_every_generator_goes_on_where_it_was() -> None:
    """Guards against a generator that is forgotten, and a normal deviate of Python or numpy that waits in reserve."""

    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]

    random.gauss(0, 1), np.random.randn()  # each keeps the second of a pair
    saved = flatten(capture_rng())
    expected = [draw(), draw()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    notes = restore_rng(unflatten(json.loads(json.dumps(saved.tree)), saved.tensors))
    assert [draw(), draw()] == expected and notes == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_generators_of_cuda_devices_go_on_where_they_were() -> None:
    """Guards against dropout that differs after a resume on a GPU."""
    torch.rand(1, device="cuda")
    saved = capture_rng()
    expected = torch.rand(5, device="cuda").tolist()
    assert restore_rng(saved) == []
    assert torch.rand(5, device="cuda").tolist() == expected


def test_a_training_state_comes_back_whole() -> None:
    """Guards against integer keys, tuples, tied weights and infinities of real optimizers and schedulers."""
    training = Training()
    for _ in range(5):
        training.step()
    state = training.state()
    flat = flatten(state)
    tree = json.loads(json.dumps(flat.tree, allow_nan=False))
    assert digest(unflatten(tree, flat.tensors)) == digest(state)
    assert flat.ties == {"model.head.weight": "model.embedding.weight"}
