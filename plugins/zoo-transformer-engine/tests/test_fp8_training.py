"""Whole models: they learn in FP8 as in bfloat16, go on to the bit, and several ranks have the same factors."""

from __future__ import annotations

import copy
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import fp8_tiny as tiny
import pytest
import torch
from torch import distributed, nn
from zoo_transformer_engine.emulated import FP8_EMULATED, EmulatedLayers
from zoo_transformer_engine.options import EmulatedOptions

from zoo import CheckpointStore
from zoo.errors import InputError


def convert(model: nn.Module, **options: Any) -> EmulatedLayers:
    return replace(FP8_EMULATED, options=EmulatedOptions(**options)).convert(model)


@pytest.fixture(scope="module")
def in_bfloat16() -> float:
    """The loss of new rows after 300 steps."""
    model = tiny.gpt()
    tiny.train(model, tiny.optimizer_of(model), range(300))
    return tiny.loss_of(model.eval(), tiny.chain(64, seed=9999)).item()


@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_it_learns_as_bfloat16_does(scaling: str, in_bfloat16: float) -> None:
    """Guards the recipes as a whole: a wrong factor or a lost outlier costs far more than 2%."""
    model = tiny.gpt()
    convert(model, scaling=scaling, amax_history_len=16 if scaling == "delayed" else 1024)
    tiny.train(model, tiny.optimizer_of(model), range(300))
    loss = tiny.loss_of(model.eval(), tiny.chain(64, seed=9999)).item()
    assert in_bfloat16 < 2.2  # of log(64) = 4.2 at first, and log(4) = 1.4 at best
    assert loss == pytest.approx(in_bfloat16, rel=0.02)


@pytest.mark.parametrize("scaling", ["delayed", "current", "mxfp8"])
def test_it_goes_on_to_the_bit(scaling: str, tmp_path: Path) -> None:
    """Guards factors and histories that a checkpoint leaves out: without them the next losses are others."""
    model = tiny.gpt()
    made, optimizer = convert(model, scaling=scaling), tiny.optimizer_of(model)
    tiny.train(model, optimizer, range(5))
    with CheckpointStore(tmp_path) as store:
        store.save(5, {"model": model, "optimizer": optimizer, "precision": made})
        expected = tiny.train(model, optimizer, range(5, 10))
        again = tiny.gpt()
        remade, optimizer = convert(again, scaling=scaling), tiny.optimizer_of(again)
        store.load({"model": again, "optimizer": optimizer, "precision": remade})
        assert tiny.train(again, optimizer, range(5, 10)) == expected


def test_a_state_that_does_not_fit() -> None:
    made = convert(tiny.gpt())
    state = made.state_dict()
    with pytest.raises(InputError, match="those of other layers"):
        convert(tiny.gpt(n_layers=1)).load_state_dict(state)
    with pytest.raises(InputError, match=r"amax_history of FP8 is \(1024, 12, 3\), and should be \(16, 12, 3\)"):
        convert(tiny.gpt(), amax_history_len=16).load_state_dict(state)
    with pytest.raises(InputError, match="scale of FP8 is missing"):
        made.load_state_dict({"layers": state["layers"]})


def test_micro_batches_are_steps_of_their_own() -> None:
    """As TransformerEngine has it: the history grows with every backward pass."""
    model = tiny.gpt()
    made = convert(model)
    for rows in tiny.chain(8, seed=1).split(4):
        tiny.loss_of(model, rows).backward()
    history = made.scaler.state_dict()["amax_history"]
    assert (history[-2:] > 0).all() and (history[:-2] == 0).all()


def test_a_backward_pass_that_fails_stops_nothing() -> None:
    """Guards against waiting for the end of a pass that never ended."""
    model = tiny.gpt()
    made = convert(model)

    def fail(grad: torch.Tensor) -> None:
        raise MemoryError

    loss = tiny.loss_of(model, tiny.chain(4, seed=1))
    hook = model.get_parameter("embed.weight").register_hook(fail)
    with pytest.raises(MemoryError):
        loss.backward()
    hook.remove()
    tiny.loss_of(model, tiny.chain(4, seed=1)).backward()
    assert (made.scaler.state_dict()["scale"] != 1).all()


def _rank(rank: int, address: str, results: Any) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    made = convert(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for step in range(3):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step)) * (1 + 9 * rank)
        wrapped(x).square().mean().backward()
    results[rank] = copy.deepcopy(made.scaler.state_dict())
    distributed.destroy_process_group()


def test_ranks_have_the_same_factors(tmp_path: Path) -> None:
    """Guards a checkpoint of several ranks, which holds the factors once."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        arguments = (f"file://{tmp_path / 'rendezvous'}", results)
        ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        one, other = results[0], results[1]
    assert all(torch.equal(one[name], other[name]) for name in one)
    first = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    assert one["amax_history"][-3, 0, 0] == pytest.approx(10 * first.abs().max().item())
