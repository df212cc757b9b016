"""Which linears of a model compute in FP8, why the others do not, and how new ones take their place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from zoo.errors import InputError
from zoo_transformer_engine.options import RecipeOptions

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Chosen:
    """The linears of a model.

    Attributes:
        linears: those that are to compute in FP8, by their names.
        skipped: the names of all others, each with the reason.
    """

    linears: Mapping[str, nn.Linear]
    skipped: Mapping[str, str]

    def describe(self, options: RecipeOptions) -> str:
        """How many, by which recipe, and which not, a layer's number replaced by ``*``."""
        total = len(self.linears) + len(self.skipped)
        head = f"{len(self.linears)} of {total} linears in FP8 with {options.describe()}"
        return "; ".join([head, *grouped(self.skipped)])


def choose_linears(model: nn.Module, options: RecipeOptions, *, any_shape: bool = False) -> Chosen:
    """The linears of a model that FP8 can compute.

    Only what is exactly a `torch.nn.Linear`: a subclass, such as an adapter's, may compute something else, and taking
    its place would lose that.

    Args:
        any_shape: take those too whose shape the kernels refuse.

    Raises:
        InputError: there are none.
    """
    linears: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not _is_linear(module):
            continue
        reason = _reason(name, module, options, any_shape=any_shape)
        if reason is None and isinstance(module, nn.Linear):
            linears[name] = module
        else:
            skipped[name] = reason or ""
    if not linears:
        why = "; ".join(grouped(skipped)) or f"{type(model).__name__} has none"
        raise InputError(f"no linear of the model can compute in FP8: {why}.", fix="Take --precision bf16-true.")
    return Chosen(linears, skipped)


def grouped(skipped: Mapping[str, str]) -> list[str]:
    """Lines for people: names that differ in a number alone and have the same reason are one."""
    counts = Counter((_NUMBER.sub("*", name), reason) for name, reason in skipped.items())
    return [f"{name} stays as it is ({n}x): {why}" if n > 1 else f"{name} stays as it is: {why}"
            for (name, why), n in counts.items()]  # fmt: skip


def replace_modules(model: nn.Module, make: Callable[[str, nn.Module], nn.Module], names: Sequence[str]) -> None:
    """Put new modules in the places of those of these names; one that stands in several places stays one module."""
    new = {id(old): make(name, old) for name, old in ((name, model.get_submodule(name)) for name in names)}
    places = [(name, new[id(m)]) for name, m in model.named_modules(remove_duplicate=False) if id(m) in new]
    for name, module in places:
        model.set_submodule(name, module)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_quantized(module)


def _is_quantized(module: nn.Module) -> bool:
    return hasattr(type(module), "dequantized")  # of the class: what carries adapters shows its base's attributes


def _reason(name: str, module: nn.Module, options: RecipeOptions, *, any_shape: bool) -> str | None:
    if _is_quantized(module):
        return "its weight is quantized already"
    if not isinstance(module, nn.Linear) or type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, which may do more than a linear"
    if any(fnmatchcase(name, pattern) for pattern in options.skip):
        return "named by skip"
    sizes = {"inputs": module.in_features, "outputs": module.out_features}
    odd = [f"{size} {what}" for what, size in sizes.items() if size % options.multiple]
    if odd and not any_shape:
        are = "are no multiples" if len(odd) > 1 else "is no multiple"
        return f"{' and '.join(odd)} {are} of {options.multiple}"
    return None
