"""Names of adapter tensors outside: from our sites to the modules that a family's files are named after, and back.

Shape letters: D_out, D_in of a site, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zoo.errors import FileFormatError, InputError
from zoo.families.base import KeyMap, Rule
from zoo.families.transforms import Transposed
from zoo.spec import ModelSpec

_IN_MEMORY = {"gpt_neox": {"embed_out.weight": "lm_head.weight"}}
"""By model type, what ``transformers`` calls in memory, where PEFT finds it, but not in files: since version 5."""
Parts = list[str]
"""Our sites that one module outside holds, in its order."""


class OwnNames:
    """Of a module that is used as it is: the same on both sides.

    Args:
        modules: all that it has, where a reader should know when a file lacks one.
    """

    model_type: str | None = None
    """What ``transformers`` calls the kind of model, where the names are those of one."""
    spec: ModelSpec | None = None
    """Of a decoder of ours."""

    def __init__(self, modules: Iterable[str] = ()) -> None:
        self._all = list(modules)

    def modules(self) -> list[str]:
        """Every module outside that has a weight, as far as they are known."""
        return self._all

    def sites(self, module: str) -> Parts:
        """Our sites of a module outside."""
        return [module]

    def module(self, site: str) -> str:
        """The module outside that holds a site of ours."""
        return site

    def is_transposed(self, module: str) -> bool:
        """Whether the module holds its weight inputs first."""
        return False

    def outputs(self, module: str) -> list[int]:
        """D_out of each of our sites of a module that holds several."""
        return []

    def split(self, module: str, rows: Tensor) -> list[Tensor]:
        """A tensor with a row for each output of the module, by our sites."""
        return [rows]

    def merge(self, module: str, rows: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        return rows[0]

    def parameters(self, name: str) -> Parts:
        """Our parameters that one outside holds: a weight or a bias, by its name."""
        return [name]

    def split_parameter(self, name: str, stored: Tensor) -> list[Tensor]:
        """A parameter outside, by our `parameters`."""
        return [stored]

    def merge_parameter(self, name: str, ours: Sequence[Tensor]) -> Tensor:
        """The inverse of `split_parameter`."""
        return ours[0]

    def attention_site(self, module: str) -> str:
        """Our site of an attention layer outside."""
        return module

    def attention_module(self, site: str) -> str:
        """The attention layer outside that is a site of ours."""
        return site


class FamilyNames(OwnNames):
    """Of a decoder of ours: by its family's key map.

    Args:
        model_type: the family's, for formats that depend on it.
    """

    def __init__(self, keys: KeyMap, spec: ModelSpec, model_type: str | None = None) -> None:
        self._in_memory = _IN_MEMORY.get(model_type or "", {})
        self._parameters = {self._in_memory.get(rule.stored, rule.stored): rule for rule in keys.rules(spec)}
        weights = {name: rule for name, rule in self._parameters.items() if name.endswith(".weight")}
        self._rules = {name.removesuffix(".weight"): rule for name, rule in weights.items()}
        self._modules = {_parent(name): module for module, rule in self._rules.items() for name in rule.ours}
        self.spec, self.model_type = spec, model_type
        super().__init__(self._rules)

    def sites(self, module: str) -> Parts:
        """Our sites of a module outside.

        Raises:
            FileFormatError: the model has no such module.
        """
        return [_parent(name) for name in self._rule(module).ours]

    def module(self, site: str) -> str:
        """The module outside that holds a site of ours.

        Raises:
            InputError: none does, as for a head whose weight is the embedding's.
        """
        if site not in self._modules:
            raise InputError(f"the family's files have no module of its own for {site}")
        return self._modules[site]

    def is_transposed(self, module: str) -> bool:
        """Whether the module holds its weight inputs first."""
        return isinstance(self._rule(module).transform, Transposed)

    def outputs(self, module: str) -> list[int]:
        """D_out of each of our sites of a module outside."""
        return [shape[0] for shape in self._rule(module).shapes]

    def split(self, module: str, rows: Tensor) -> list[Tensor]:
        """A tensor (D_out, ...) of a module outside, by our sites.

        Raises:
            FileFormatError: it has another number of rows than the module that holds several of ours.
        """
        rule = self._rule(module)
        if len(rule.ours) > 1 and len(rows) != sum(self.outputs(module)):
            raise FileFormatError(
                f"the adapter has {len(rows)} rows for {module}, which has {sum(self.outputs(module))} outputs."
            )
        if rule.transform.moves_rows:
            return rule.split_rows(rows)
        return list(rows.split(self.outputs(module)))

    def merge(self, module: str, rows: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        rule = self._rule(module)
        return rule.merge(rows) if rule.transform.moves_rows else torch.cat(list(rows))

    def parameters(self, name: str) -> Parts:
        """Our parameters that one outside holds: a weight or a bias, by its name.

        Raises:
            FileFormatError: the model has no such parameter.
        """
        return list(self._parameter(name).ours)

    def split_parameter(self, name: str, stored: Tensor) -> list[Tensor]:
        """A parameter outside, by our `parameters`.

        Raises:
            FileFormatError: it has another shape than in the model.
        """
        rule = self._parameter(name)
        if tuple(stored.shape) != rule.stored_shape:
            raise FileFormatError(
                f"the adapter has {name} of the shape {tuple(stored.shape)}, which is {rule.stored_shape} in the model."
            )
        return rule.split(stored)

    def merge_parameter(self, name: str, ours: Sequence[Tensor]) -> Tensor:
        """The inverse of `split_parameter`."""
        return self._parameter(name).merge(ours)

    def attention_site(self, module: str) -> str:
        """Our site of an attention layer outside: that of its queries.

        Raises:
            FileFormatError: the model has no such layer.
        """
        queries = (site for site, outside in self._modules.items() if _parent(outside) == module)
        site = next((site for site in queries if site.endswith(".attn.q")), None)
        if site is None:
            raise FileFormatError(f"the adapter has prompts for {module}, and the model has no such attention layer.")
        return _parent(site)

    def attention_module(self, site: str) -> str:
        """The attention layer outside that is a site of ours."""
        return _parent(self.module(f"{site}.q"))

    def _rule(self, module: str) -> Rule:
        name = self._in_memory.get(f"{module}.weight", module).removesuffix(".weight")
        if name not in self._rules:
            raise FileFormatError(f"the adapter has weights for {module}, and the model has no such module.")
        return self._rules[name]

    def _parameter(self, name: str) -> Rule:
        known = self._in_memory.get(name, name)
        if known not in self._parameters:
            raise FileFormatError(f"the adapter has {name}, and the model has no such parameter.")
        return self._parameters[known]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
