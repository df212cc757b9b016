"""Every contract over every component of zoo: what ``zoo plugins check zoo`` runs, and what needs other libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.hub_server import FakeHub
from tests.unit import test_sources_hub
from zoo.plugins import PluginSelection, load_zoo
from zoo.testing import Contract, SourceContract
from zoo.testing.check import contracts_of

hub = test_sources_hub.hub
Logits = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    """Operations on tiny tensors take longer on several threads, which wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def by_transformers(directory: Path) -> Logits:
    """The logits of a model directory, as ``transformers`` computes them."""
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}  # the defaults are beyond a small vocabulary
    model = load(directory, attn_implementation="eager", **special).eval()
    return lambda ids: model(ids).logits


class Hub(SourceContract):
    """Against a server that speaks the Hub's API."""

    component = "hub"

    @pytest.fixture(autouse=True)
    def _served(self, hub: FakeHub) -> None:
        self.hub = hub

    def make_address(self, files: Mapping[str, bytes], directory: Path) -> str:
        self.hub.add("org/tiny", dict(files))
        return "org/tiny"


def _with_reference(contract: type[Contract]) -> type[Contract]:
    return type(contract.__name__, (contract,), {"make_reference": lambda self, directory: by_transformers(directory)})


FOUND = contracts_of("zoo", built=load_zoo(PluginSelection(only=frozenset())))
for name, contract in FOUND.items():
    if contract.kind == "family":
        globals()[name] = _with_reference(contract)
    elif (contract.kind, contract.component) != ("source", "hub"):
        globals()[name] = contract
TestHub = type("TestHub", (Hub,), {})
del contract, name
