"""Whether what a step holds is what the objects here expect: compared in full before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import InputError
from zoo.store.parts import is_finite
from zoo.store.shards import local_part
from zoo.store.state import Flat, flatten

_SHOWN = 5
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_model(module: Any, stored: Any, at: tuple[Any, ...], *, check_finite: bool) -> None:
    """Compare a model with its stored state dict.

    Args:
        module: a module, or anything with a state dict of tensors.
        stored: what the step holds for it.
        at: its place in the state, for messages.

    Raises:
        InputError: names, shapes, dtypes or ties differ, the model has tensors without values, or the step's
            parameters are not finite.
    """
    check_has_values(module)
    here, there = flatten(module, at), flatten(stored, at)
    problems = [*_compare(here.all(), there.all()), *_compare_ties(here, there)]
    if problems:
        raise InputError(
            f"the step's {at[0]!r} is not of this {type(module).__name__}: {'; '.join(problems)}.",
            fix="It was saved by another run, or the model was built differently: use the spec it was saved with.",
        )
    if check_finite:
        _check_finite(module, there.all())


def check_optimizer(optimizer: torch.optim.Optimizer, stored: Any, shapes: list[Any] | None, at: str) -> None:
    """Compare an optimizer with its stored state dict.

    Args:
        shapes: dtypes and shapes of the parameters it was saved with, in order.

    Raises:
        InputError: it is of other parameters.
    """
    here = [len(group["params"]) for group in optimizer.param_groups]
    there = [len(group["params"]) for group in stored["param_groups"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if here != there:
        problem = f"its parameter groups have {there} parameters, and here they have {here}"
    else:
        mine = [[str(p.dtype).removeprefix("torch."), list(p.shape)] for p in parameters]
        pairs = enumerate(zip(mine, shapes or mine, strict=True))
        unlike = [f"parameter {i} is {b} in the step and {a} here" for i, (a, b) in pairs if a != b]
        if not unlike:
            return
        problem = _some(unlike)
    raise InputError(
        f"{at} is not of this {type(optimizer).__name__}: {problem}.",
        fix="Make the optimizer of the same parameters, in the same order and groups.",
    )


def changed_bits(stored: Any, taken: Any) -> list[str]:
    """Names of stored tensors that an object gives back with other bits, or not at all, after it took them."""
    there, here = flatten(stored).all(), flatten(taken).all()
    return [name for name, tensor in there.items() if name not in here or not _same_bits(tensor, here[name])]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = local_part(a), local_part(b)
    return torch.equal(_bits(a), _bits(b.to(a.device)))


def _bits(tensor: Tensor) -> Tensor:
    """Integers of the same width, which are compared by value: NaN is not equal to itself, and -0.0 is to 0.0."""
    return tensor.contiguous().reshape(-1).view(_INTEGERS[tensor.dtype.itemsize])


def check_has_values(module: Any) -> None:
    """Buffers that are not persistent are in no checkpoint, and must have their values here.

    Raises:
        InputError: a tensor of the module, if it is one, is on the meta device, or such a buffer holds NaN.
    """
    if not isinstance(module, nn.Module):
        return
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    if meta := [name for name, tensor in tensors if tensor.is_meta]:
        raise InputError(
            f"{_some(meta)} of the model are on the meta device.",
            fix="Give the model memory and initialise its buffers before a step is loaded into it.",
        )
    saved = module.state_dict()
    own = [(name, b) for name, b in module.named_buffers() if name not in saved and b.is_floating_point()]
    if undefined := [name for name, buffer in own if bool(torch.isnan(buffer.float()).any())]:
        raise InputError(
            f"{_some(undefined)} of the model hold NaN and are in no checkpoint: they are not persistent.",
            fix="Initialise these buffers; to_empty() leaves what was in the memory.",
        )


def _check_finite(module: Any, there: dict[str, Tensor]) -> None:
    """Infinities are at home in buffers, such as masks; a NaN is at home nowhere."""
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)} if _is_module(module) else set()
    wrong = []
    for name, whole in there.items():
        tensor = local_part(whole)
        if is_finite(tensor):
            continue
        n_wrong = int((~torch.isfinite(tensor.to(torch.complex64 if tensor.is_complex() else torch.float64))).sum())
        if name not in buffers or bool(torch.isnan(tensor).any()):
            wrong.append(f"{name} ({n_wrong} of {tensor.numel()} values)")
    if wrong:
        raise InputError(
            f"the step's parameters are not finite: {_some(wrong)}.",
            fix="Load an earlier step: which=STEP. To look at this one, load it with check_finite=False.",
        )


def _is_module(module: Any) -> bool:
    return isinstance(module, nn.Module)


def _compare(here: dict[str, Tensor], there: dict[str, Tensor]) -> list[str]:
    problems = []
    if missing := [name for name in here if name not in there]:
        problems.append(f"it lacks {_some(missing)}")
    if unknown := [name for name in there if name not in here]:
        problems.append(f"it has {_some(unknown)}, which the model lacks")
    both = [(name, here[name], there[name]) for name in here if name in there]
    shapes = [f"{n} of shape {list(b.shape)}, here {list(a.shape)}" for n, a, b in both if a.shape != b.shape]
    dtypes = [f"{n} in {_dtype(b)}, here {_dtype(a)}" for n, a, b in both if a.dtype != b.dtype]
    return problems + [f"it has {_some(found)}" for found in (shapes, dtypes) if found]


def _compare_ties(here: Flat, there: Flat) -> list[str]:
    mine, theirs = _groups(here), _groups(there)
    problems = [f"it has {' and '.join(group)} tied, here they are not" for group in theirs - mine]
    return problems + [f"here {' and '.join(group)} are tied, in the step they are not" for group in mine - theirs]


def _groups(flat: Flat) -> set[tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for name, stored in flat.ties.items():
        groups.setdefault(stored, [stored]).append(name)
    return {tuple(sorted(group)) for group in groups.values()}


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
