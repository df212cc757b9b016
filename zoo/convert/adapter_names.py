"""Names of adapter tensors outside: from our sites to the modules that a family's files are named after, and back.

Shape letters: D_out, D_in of a site, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.errors import FileFormatError
from zoo.families.base import KeyMap, Rule
from zoo.families.transforms import Transposed
from zoo.spec import ModelSpec

Parts = list[str]
"""Our sites that one module outside holds, in its order."""


class OwnNames:
    """Of a module that is used as it is: the same on both sides."""

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


class FamilyNames(OwnNames):
    """Of a decoder of ours: by its family's key map."""

    def __init__(self, keys: KeyMap, spec: ModelSpec) -> None:
        rules = [rule for rule in keys.rules(spec) if rule.stored.endswith(".weight")]
        self._rules = {rule.stored.removesuffix(".weight"): rule for rule in rules}
        self._modules = {_site(name): module for module, rule in self._rules.items() for name in rule.ours}
        self._spec = spec

    def sites(self, module: str) -> Parts:
        """Our sites of a module outside.

        Raises:
            FileFormatError: the model has no such module.
        """
        return [_site(name) for name in self._rule(module).ours]

    def module(self, site: str) -> str:
        """The module outside that holds a site of ours."""
        return self._modules[site]

    def is_transposed(self, module: str) -> bool:
        """Whether the module holds its weight inputs first."""
        return isinstance(self._rule(module).transform, Transposed)

    def outputs(self, module: str) -> list[int]:
        """D_out of each of our sites of a module outside."""
        return [shape[0] for shape in self._rule(module).shapes]

    def split(self, module: str, rows: Tensor) -> list[Tensor]:
        """A tensor (D_out, ...) of a module outside, by our sites."""
        rule = self._rule(module)
        if rule.transform.moves_rows:
            return rule.split_rows(rows)
        return list(rows.split(self.outputs(module)))

    def merge(self, module: str, rows: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        rule = self._rule(module)
        return rule.merge(rows) if rule.transform.moves_rows else torch.cat(list(rows))

    def _rule(self, module: str) -> Rule:
        if module not in self._rules:
            raise FileFormatError(f"the adapter has weights for {module}, and the model has no such module.")
        return self._rules[module]


def _site(parameter: str) -> str:
    return parameter.rpartition(".")[0]
