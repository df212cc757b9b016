"""Putting loaded values into the objects that train, so that it can be taken back."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zoo.errors import InputError, ZooError
from zoo.store.matching import changed_bits, check_model, check_optimizer
from zoo.store.parts import MODEL
from zoo.store.rng import State, capture_rng, restore_rng
from zoo.store.state import is_stateful, place, unwrap

_NOTHING = object()


class NotTakenBackError(ZooError):
    """A load failed, and an object could not be made as it was. It must be made anew."""


class Change(Protocol):
    """One object or value that takes what was stored."""

    @property
    def at(self) -> str:
        """Its place in the state."""
        ...

    def apply(self) -> None:
        """Take it. Whatever happens here, `undo` restores what was before."""
        ...

    def undo(self) -> None:
        """Be as before."""
        ...


def apply_all(changes: Sequence[Change]) -> None:
    """All of them or none.

    Raises:
        NotTakenBackError: an object refused what was stored, and one of them its old state.
    """
    done: list[Change] = []
    try:
        for change in changes:
            done.append(change)
            change.apply()
    except BaseException as error:
        try:
            undo_all(done)
        except NotTakenBackError as trouble:
            raise NotTakenBackError(f"{type(error).__name__}: {error}; {trouble}") from error
        raise


def undo_all(changes: Sequence[Change]) -> None:
    """Take them back, the last first.

    Raises:
        NotTakenBackError: an object refused its old state. All others have theirs.
    """
    troubles = []
    for change in reversed(changes):
        try:
            change.undo()
        except Exception as error:  # noqa: BLE001 - the others must be taken back nevertheless
            troubles.append(f"{change.at} did not take its own state back: {type(error).__name__}: {error}")
    if troubles:
        raise NotTakenBackError("; ".join(troubles))


class ModuleChange:
    """A module's tensors are overwritten in place, so that the old ones are kept on the CPU meanwhile.

    This is the one copy that loading makes beyond what the step holds; optimizers need none.
    """

    def __init__(self, module: nn.Module, stored: Any, at: str) -> None:
        self._module, self.at = module, at
        self._stored = OrderedDict(stored)
        self._before: Any = None

    def apply(self) -> None:
        """Load, and see that the module gives back the same bits."""
        now = self._module.state_dict()
        self._before = {
            name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in now.items()
        }
        self._stored._metadata = getattr(now, "_metadata", None)  # type: ignore[attr-defined]  # layouts' versions
        self._module.load_state_dict(self._stored)
        _check_taken(self.at, self._stored, self._module)

    def undo(self) -> None:
        """Copy the old values back, past hooks that may have been what failed."""
        if self._before is None:
            return
        with torch.no_grad():
            for name, value in self._module.state_dict().items():
                if isinstance(value, Tensor):
                    value.copy_(self._before[name])
        if not all(isinstance(value, Tensor) for value in self._before.values()):
            self._module.load_state_dict(self._before)


class OptimizerChange:
    """An optimizer of torch makes its state anew when it loads: the old one is kept by reference."""

    def __init__(self, optimizer: Optimizer, stored: Any, at: str) -> None:
        self._optimizer, self._stored, self.at = optimizer, stored, at
        self._before: Any = None

    def apply(self) -> None:
        """Load, and see that the optimizer gives back the same bits."""
        self._before = self._optimizer.state, self._optimizer.param_groups
        self._optimizer.load_state_dict(self._stored)
        self._restore_dtypes()
        _check_taken(self.at, self._stored, self._optimizer)

    def undo(self) -> None:
        """Put the old state back."""
        if self._before is not None:
            self._optimizer.state, self._optimizer.param_groups = self._before

    def _restore_dtypes(self) -> None:
        """Torch converts state to the dtype of its parameter: float32 moments of bfloat16 weights would be rounded."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        numbers = [number for group in self._stored["param_groups"] for number in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            taken = self._optimizer.state.get(parameter, {})
            for key, value in self._stored["state"].get(number, {}).items():
                if isinstance(value, Tensor) and taken[key].dtype != value.dtype:
                    taken[key] = value.to(taken[key].device)


class ObjectChange:
    """Any other object with a state: what it had is copied."""

    def __init__(self, target: Any, stored: Any, at: str, *, is_exact: bool) -> None:
        self._target, self._stored, self.at, self._is_exact = target, stored, at, is_exact
        self._before: Any = _NOTHING

    def apply(self) -> None:
        """Load. An optimizer or a model must then give back the same bits."""
        self._before = copy.deepcopy(self._target.state_dict())
        self._target.load_state_dict(self._stored)
        if self._is_exact:
            _check_taken(self.at, self._stored, self._target)

    def undo(self) -> None:
        """Load what it had."""
        if self._before is not _NOTHING:
            self._target.load_state_dict(self._before)


class ValueChange:
    """A plain value in a dict or list of the caller's is replaced. Its tensors come to the device of the old ones."""

    def __init__(self, container: Any, key: Any, stored: Any, at: str) -> None:
        self._container, self._key, self._stored, self.at = container, key, stored, at
        self._before: Any = _NOTHING

    def apply(self) -> None:
        """Replace it."""
        before = self._container[self._key]
        self._container[self._key] = _placed(before, self._stored)
        self._before = before

    def undo(self) -> None:
        """Put the old one back."""
        if self._before is not _NOTHING:
            self._container[self._key] = self._before


class RngChange:
    """The random generators of this process."""

    at = "the random generators"

    def __init__(self, stored: State) -> None:
        self._stored = stored
        self._before: State | None = None
        self.notes: list[str] = []

    def apply(self) -> None:
        """Set them."""
        self._before = capture_rng()
        self.notes = restore_rng(self._stored)

    def undo(self) -> None:
        """Set them back."""
        if self._before is not None:
            restore_rng(self._before)


def changes_for(
    state: Any, stored: Any, optimizers: dict[str, Any], *, check_finite: bool, at: tuple[Any, ...] = ()
) -> list[Change]:
    """What must change for the state to be as stored, in the order of the state. Nothing is changed yet.

    Args:
        state: the caller's: a dict (or a list or dict in it) of objects and plain values.
        stored: the same, with state dicts in place of objects.
        optimizers: of each optimizer, by place, dtypes and shapes of the parameters it was saved with.

    Raises:
        InputError: something that is stored does not fit what is here.
    """
    keys, there = _keys(state), _keys(stored)
    if set(keys) != set(there):
        raise InputError(f"{place(at)} has {keys} here, and the step has {there}.", fix="Name the same things.")
    changes: list[Change] = []
    for key in keys:
        inside = (*at, key)
        target, value = unwrap(state[key]), stored[key]
        if at == () and key == MODEL:
            check_model(target, value, inside, check_finite=check_finite)
        if is_stateful(target):
            changes.append(_object_change(target, value, optimizers, inside, check_finite=check_finite))
        elif _holds_objects(target):
            changes += changes_for(target, value, optimizers, check_finite=check_finite, at=inside)
        elif isinstance(state, tuple):
            raise InputError(f"{place(inside)} is in a tuple, where nothing can be replaced.", fix="Make it a list.")
        else:
            changes.append(ValueChange(state, key, value, place(inside)))
    return changes


def _object_change(
    target: Any, stored: Any, optimizers: dict[str, Any], path: tuple[Any, ...], *, check_finite: bool
) -> Change:
    if isinstance(target, nn.Module):
        if path != (MODEL,):
            check_model(target, stored, path, check_finite=check_finite)
        return ModuleChange(target, stored, place(path))
    if isinstance(target, Optimizer):
        check_optimizer(target, stored, optimizers.get(place(path)), place(path))
        if type(target).load_state_dict is Optimizer.load_state_dict:
            return OptimizerChange(target, stored, place(path))
    is_exact = isinstance(target, Optimizer) or path == (MODEL,)
    return ObjectChange(target, stored, place(path), is_exact=is_exact)


def _keys(container: Any) -> list[Any]:
    if isinstance(container, list | tuple):
        return list(range(len(container)))
    return list(container) if isinstance(container, dict) else [type(container).__name__]


def _holds_objects(value: Any) -> bool:
    """Whether there is an object to load in it: then the container stays, and else it is replaced as a whole."""
    inside = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
    return any(is_stateful(item) or _holds_objects(item) for item in inside)


def _check_taken(at: str, stored: Any, target: Any) -> None:
    if changed := changed_bits(stored, target):
        raise ZooError(f"{at}: load_state_dict of {type(target).__name__} did not take {changed[0]} as it was stored.")


def _placed(before: Any, stored: Any) -> Any:
    if isinstance(stored, Tensor):
        return stored.to(before.device) if isinstance(before, Tensor) and not before.is_meta else stored
    if isinstance(stored, dict) and isinstance(before, dict):
        return type(stored)({key: _placed(before.get(key), value) for key, value in stored.items()})
    if isinstance(stored, list | tuple) and isinstance(before, list | tuple) and len(stored) == len(before):
        return type(stored)(_placed(a, b) for a, b in zip(before, stored, strict=True))
    return stored
