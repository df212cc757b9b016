"""Which of its adapters a model computes with, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

from torch import nn

from zoo.adapters.attach import AttachedAdapter, attached_to
from zoo.adapters.base import Adapted, Prompts
from zoo.errors import InputError, UnknownNameError

T = TypeVar("T")


@contextmanager
def using(root: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The model with these adapters alone, in this order; no names: the model as it was.

    Raises:
        UnknownNameError: the model has no adapter of such a name.
        InputError: one that is not named can not be switched off.
    """
    attached = attached_to(root)
    check_names(root, names)
    for name, handle in attached.items():
        if name not in names:
            _check_switchable(handle, [attached[chosen] for chosen in names])
    holders = {id(holder): holder for handle in attached.values() for holder in handle.holders()}.values()
    before = [(holder, holder.active) for holder in holders]
    with ExitStack() as stack:
        stack.callback(_restore, before)
        for name, handle in attached.items():
            if name not in names:
                stack.enter_context(handle.disabled())
        for holder in holders:
            holder.active = tuple(name for name in names if name in holder.parts and not attached[name].merged)
        yield


def _restore(before: Sequence[tuple[Adapted | Prompts, tuple[str, ...]]]) -> None:
    for holder, active in before:
        holder.active = active


def check_names(root: nn.Module, names: Sequence[str]) -> None:
    """Check that the model has adapters of these names, each given once.

    Raises:
        UnknownNameError: it has not.
        InputError: a name is there twice.
    """
    attached = attached_to(root)
    for name in names:
        if name not in attached:
            none = None if attached else "The model has no adapters."
            raise UnknownNameError("adapter of this model", name, attached, fix=none)
        if list(names).count(name) > 1:
            raise InputError(f"the adapter {name!r} is named twice.")


def _check_switchable(handle: AttachedAdapter, chosen: Sequence[AttachedAdapter]) -> None:
    if handle.merged:
        raise InputError(f"adapter {handle.name!r} is merged: the weights hold it.", fix="Call unmerge() first.")
    for other in chosen:
        if both := set(handle.plan.unfrozen or ()) & set(other.plan.unfrozen or ()):
            raise InputError(
                f"adapters {other.name!r} and {handle.name!r} both train {min(both)}, which has one value at a time.",
                fix="Load them one after the other instead.",
            )


def within(context: Callable[[], AbstractContextManager[None]], items: Iterator[T]) -> Iterator[T]:
    """The items, each made inside a context of its own: in between, their reader has the model as it was."""
    nothing = object()
    while True:
        with context():
            item = next(items, nothing)
        if item is nothing:
            return
        yield item  # type: ignore[misc]
