"""Puts an adapter on a model, in place, and hands back what controls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapted, Adapter, AttentionPart, Part, Prompts
from zoo.adapters.discover import attention_site, sites_of
from zoo.adapters.weights import is_quantized, is_transposed, weight_of
from zoo.errors import InputError
from zoo.plan.sites import AdapterPlan, Addition, Place

_ATTACHED, _PROMPTS = "_adapters", "_adapter_prompts"


Save = Callable[["AttachedAdapter", Path], list[str]]
"""Writes an adapter to a directory; returns what a reader should know."""


def attach(root: nn.Module, adapter: Adapter, *, name: str = "default", save: Save | None = None) -> AttachedAdapter:
    """Add an adapter to a model and freeze everything else; adapters that are there already stay active, and train.

    Args:
        save: what `AttachedAdapter.save` calls; adapters themselves know no files.

    Raises:
        InputError: its options do not fit the model, or it has an adapter of this name.
    """
    sites = sites_of(root)
    if not sites:
        raise InputError(
            f"{type(root).__name__} holds no module that an adapter can attach to.",
            fix="Adapters replace what a model holds: give the model, or put a single layer into nn.Sequential.",
        )
    plan: AdapterPlan = adapter.options.plan(sites)
    _refuse_quantized(root, plan)
    _refuse_place(root, adapter, plan)
    if "." in name or not name:
        raise InputError(f"{name!r} is no name for an adapter: it has no dots, and is not empty.")
    attached: dict[str, AttachedAdapter] = root.__dict__.setdefault(_ATTACHED, {})
    if name in attached:
        raise InputError(
            f"the model has an adapter named {name!r} already.", fix="Give this one another name, or detach that one."
        )
    parts = {addition.site.name: _add(root, adapter, addition, name) for addition in plan.additions}
    for addition in plan.additions:
        for key, owner in addition.shared.items():
            parts[addition.site.name].register_parameter(key, parts[owner].get_parameter(key))
    handle = AttachedAdapter(root, adapter, plan, name, parts, save)
    attached[name] = handle
    trained = {id(p) for one in attached.values() for p in one.trainable().values()}
    for parameter in root.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return handle


def attached_to(root: nn.Module) -> dict[str, AttachedAdapter]:
    """The adapters of a model, by their names."""
    attached: dict[str, AttachedAdapter] = root.__dict__.get(_ATTACHED, {})
    return attached


def _refuse_quantized(root: nn.Module, plan: AdapterPlan) -> None:
    for name in plan.unfrozen or {}:
        if is_quantized(root.get_submodule(name.rpartition(".")[0])) and name.endswith(".weight"):
            raise InputError(
                f"{name} is quantized, and integers can not be trained.", fix="Load the model without quantizing it."
            )


def _refuse_place(root: nn.Module, adapter: Adapter, plan: AdapterPlan) -> None:
    for site in (addition.site for addition in plan.additions if addition.site.kind == "attention"):
        places = getattr(attention_site(root.get_submodule(site.name)), "places", ("before_projection",))
        if adapter.place not in places:
            raise InputError(
                f"{site.name} takes the results of prompts {' or '.join(places)}, not {adapter.place}.",
                fix="Choose another place. after_projection needs a zoo.adapters.base.AttentionSite that has it in its "
                "places, and heads that together are as wide as the model.",
            )


def _add(root: nn.Module, adapter: Adapter, addition: Addition, name: str) -> Part | AttentionPart:
    module = root.get_submodule(addition.site.name)
    if addition.site.kind == "attention":
        return _add_prompts(adapter, addition, module, name)
    if not isinstance(module, Adapted):
        module = Adapted(module)
        root.set_submodule(addition.site.name, module)
    part = adapter.part(addition, module.base).train(root.training)
    module.parts[name] = part
    module.active = (*module.active, name)
    return part


def _add_prompts(adapter: Adapter, addition: Addition, module: nn.Module, name: str) -> AttentionPart:
    site = attention_site(module)
    by_place: dict[Place, Prompts] = module.__dict__.setdefault(_PROMPTS, {})
    if adapter.place not in by_place:
        by_place[adapter.place] = Prompts()  # not a submodule: the site puts it where it belongs
        site.install(by_place[adapter.place], *(() if adapter.place == "before_projection" else (adapter.place,)))
    prompts = by_place[adapter.place]
    part = adapter.attention_part(addition, site).train(module.training)
    prompts.parts[name] = part
    prompts.active = (*prompts.active, name)
    return part


class AttachedAdapter:
    """An adapter on a model.

    Attributes:
        name: tells it from other adapters on the same model.
        plan: what it added and unfroze.
        notes: what was assumed when it was read because its files do not say it, one line each.
    """

    def __init__(
        self,
        root: nn.Module,
        adapter: Adapter,
        plan: AdapterPlan,
        name: str,
        parts: Mapping[str, Part | AttentionPart],
        save: Save | None = None,
    ) -> None:
        self.root, self.adapter, self.plan, self.name = root, adapter, plan, name
        self._parts, self._save = dict(parts), save
        self.notes: list[str] = []
        self._unmerged: dict[str, tuple[Tensor, Tensor | None]] | None = None
        kept = self._unfrozen() if adapter.keeps_original else {}
        self._original = {key: p.detach().clone() for key, p in kept.items()}

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that it trains, under its names in `state_dict`: a tied one may have two."""
        shared = {addition.site.name: addition.shared for addition in self.plan.additions}
        own = ((site, *named) for site, part in self._parts.items() for named in part.named_parameters())
        return {f"{site}.{key}": p for site, key, p in own if key not in shared[site]} | self._unfrozen()

    @property
    def n_trained(self) -> int:
        """Numbers that it trains; those of tied parameters once."""
        return sum({id(p): p.numel() for p in self.trainable().values()}.values())

    def _unfrozen(self) -> dict[str, nn.Parameter]:
        names = self.plan.unfrozen or {}
        return {name: self.base_parameter(name) for name in names}

    def base_parameter(self, name: str) -> nn.Parameter:
        """A parameter of the model by its name before anything was adapted."""
        module_name, _, leaf = name.rpartition(".")
        module = self.root.get_submodule(module_name)
        base = module.base if isinstance(module, Adapted) else module
        return base.get_parameter(leaf)

    def state_dict(self) -> dict[str, Tensor]:
        """What the adapter is: new parameters and persistent buffers by site, unfrozen ones under their own names."""
        return {name: tensor.detach() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        buffers = {
            f"{site}.{key}": tensor
            for site, part in self._parts.items()
            for key, tensor in part.state_dict(keep_vars=True).items()
            if not isinstance(tensor, nn.Parameter)
        }
        return {**self.trainable(), **buffers}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy values in; nothing is copied unless all fit.

        Raises:
            InputError: a key is missing or unexpected, or a shape is another.
        """
        own = self._tensors()
        problems = [f"{key} is missing" for key in own if key not in state]
        problems += [f"{key} is unknown" for key in state if key not in own]
        problems += [
            f"{key} is {tuple(state[key].shape)} and should be {tuple(p.shape)}"
            for key, p in own.items()
            if key in state and state[key].shape != p.shape
        ]
        if problems:
            more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise InputError(f"the state does not fit the adapter: {', '.join(problems[:5])}{more}.")
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(state[key])

    def save(self, directory: str | Path) -> list[str]:
        """Write an adapter directory, as PEFT does what it has. Returns what a reader should know, one line each.

        Raises:
            InputError: the layout can not hold it.
        """
        assert self._save is not None, "attached without a way to save"
        return self._save(self, Path(directory))

    @property
    def active(self) -> bool:
        """Whether the model computes with it."""
        return all(self.name in holder.active for holder in self.holders())

    @property
    def merged(self) -> bool:
        """Whether the weights hold it."""
        return self._unmerged is not None

    def activate(self) -> None:
        """Have the model compute with it, after the adapters that are active already."""
        for holder in self.holders():
            if self.name not in holder.active:
                holder.active = (*holder.active, self.name)

    def deactivate(self) -> None:
        """Have the model compute without its parts; parameters that it unfroze stay as they are."""
        for holder in self.holders():
            holder.active = tuple(name for name in holder.active if name != self.name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model as it was: without the parts, and with the former values of what was unfrozen.

        Raises:
            InputError: the former values are not kept.
        """
        if not self.adapter.keeps_original:
            raise InputError(f"adapter {self.name!r} keeps no copy of what it trains.", fix="Load the model anew.")
        was_active = self.active
        trained = {key: p.detach().clone() for key, p in self._unfrozen().items()}
        self.deactivate()
        self._put(self._original)
        try:
            yield
        finally:
            self._put(trained)
            if was_active:
                self.activate()

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for key, value in values.items():
                self.base_parameter(key).copy_(value)

    def unmergeable(self) -> list[str]:
        """Why it can not be merged, one sentence each; empty: it can."""
        reasons = self.adapter.unmergeable(self.plan)
        if quantized := self._quantized():
            reasons.append(f"{quantized[0]} and {len(quantized) - 1} other weights are quantized")
        prompts = [addition.site.name for addition in self.plan.additions if addition.site.kind == "attention"]
        if prompts:
            reasons.append(f"prompts in {len(prompts)} attention layers are no change of a weight")
        return reasons

    def _quantized(self) -> list[str]:
        return [site for site in self._parts if is_quantized(self._base(site))]

    def merge(self) -> None:
        """Compute the parts into the weights, and deactivate them; `unmerge` restores the weights to the bit.

        Raises:
            InputError: it is merged already, is not active, or can not be merged.
        """
        if self._unmerged is not None:
            raise InputError(f"adapter {self.name!r} is merged already.")
        if not self.active:
            raise InputError(f"adapter {self.name!r} is not active: there is nothing to merge.")
        if reasons := self.unmergeable():
            raise InputError(
                f"adapter {self.name!r} can not be merged: {'; '.join(reasons)}.",
                fix="Keep the adapter apart" + (", or load the model unquantized." if self._quantized() else "."),
            )
        self._unmerged = {}
        with torch.no_grad():
            for site, part in self._parts.items():
                assert isinstance(part, Part)
                self._merge(site, part)
        self.deactivate()

    def _merge(self, site: str, part: Part) -> None:
        assert self._unmerged is not None
        base: Any = self._base(site)
        bias = getattr(base, "bias", None)
        self._unmerged[site] = (base.weight.data, None if bias is None else bias.data)
        weight, merged_bias = part.merged(weight_of(base), None if bias is None else bias.float())
        base.weight.data = (weight.T if is_transposed(base) else weight).to(base.weight.dtype).contiguous()
        if merged_bias is not None and bias is not None:
            base.bias.data = merged_bias.to(bias.dtype)
        elif merged_bias is not None:
            base.bias = nn.Parameter(merged_bias.to(base.weight.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Take it out of the weights again.

        Raises:
            InputError: it is not merged.
        """
        if self._unmerged is None:
            raise InputError(f"adapter {self.name!r} is not merged.")
        for site, (weight, bias) in self._unmerged.items():
            base: Any = self._base(site)
            base.weight.data = weight
            if bias is not None:
                base.bias.data = bias
            elif getattr(base, "bias", None) is not None:
                base.bias = None
        self._unmerged = None
        self.activate()

    def detach(self) -> None:
        """Take it off the model; what it unfroze has its former values again, where they are kept.

        Raises:
            InputError: the weights hold it.
        """
        if self.merged:
            raise InputError(f"adapter {self.name!r} is merged.", fix="Call unmerge() first.")
        self.deactivate()
        self._put(self._original)
        for parameter in self._unfrozen().values():
            parameter.requires_grad_(False)
        for addition in self.plan.additions:
            holder = self._holder(addition)
            del holder.parts[self.name]
            if isinstance(holder, Adapted) and not holder.parts:
                self.root.set_submodule(addition.site.name, holder.base)
        del self.root.__dict__[_ATTACHED][self.name]

    def _base(self, site: str) -> nn.Module:
        module = self.root.get_submodule(site)
        return module.base if isinstance(module, Adapted) else module

    def holders(self) -> Iterator[Adapted | Prompts]:
        """The modules that hold its parts, and know which are active."""
        return map(self._holder, self.plan.additions)

    def _holder(self, addition: Addition) -> Adapted | Prompts:
        module, place = self.root.get_submodule(addition.site.name), self.adapter.place
        holder: Adapted | Prompts = module if isinstance(module, Adapted) else module.__dict__[_PROMPTS][place]
        return holder
