"""What every family has to do: say the same of a model in its own files and in zoo's words, and compute it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from zoo.attention.eager import Eager
from zoo.convert.export import export_model
from zoo.convert.hf import HuggingFace
from zoo.convert.load import load_any
from zoo.errors import FileFormatError, InputError
from zoo.families.base import Family
from zoo.models.decoder import decoder_of
from zoo.plan.parameters import count_parameters
from zoo.spec import ModelSpec
from zoo.testing.contract import Contract, not_run
from zoo.testing.models import checkpoint_of, random_model, shrunk, some_tokens

Logits = Callable[[Tensor], Tensor]
"""From ids (B, T) to logits (B, T, V)."""


class FamilyContract(Contract, standard=True):
    """A family by its name; by default on its first registered model, cut down to two layers.

    Give `make_reference` where another library has these models: a key map that swaps two tensors is sound in itself.
    """

    kind = "family"

    def make_spec(self) -> ModelSpec:
        """A small spec that the family's config can say, with all mechanisms of its models."""
        own = self.record
        for _, entry in self.registry().models():
            if self.registry().find("family", entry.family) is own:
                return shrunk(entry.spec)
        not_run("no registered model is of this family: override make_spec")

    def make_reference(self, directory: Path) -> Logits | None:
        """The same model, read from the directory by another library."""
        return None

    @property
    def family(self) -> Family:
        """What is registered."""
        found: Family = self.load()
        return found

    def make_model(self) -> nn.Module:
        """A small model, every parameter random."""
        return random_model(self.family, self.make_spec())

    def written(self, directory: Path) -> tuple[nn.Module, Path]:
        """A model, and the Hugging Face directory that it was written to."""
        model, path = self.make_model(), directory / "model"
        export_model(checkpoint_of(self.family, model, self.make_spec(), path), path)
        return model, path

    def test_it_is_found_by_its_model_type(self) -> None:
        """The ``model_type`` of its configs is among what it was registered to match."""
        family = self.family
        assert isinstance(family, Family), f"the target is a zoo.families.base.Family, not {family!r}"
        found = self.registry().match("family", family.model_type)
        assert found is not None and found.target == self.record.target, (
            f"matches= lacks {family.model_type!r}, or another family has it"
        )

    def test_the_config_says_all_of_the_spec(self) -> None:
        """Written, stored as JSON and read, a spec is the same."""
        family, spec = self.family, self.make_spec()
        config = json.loads(json.dumps(family.write_config(spec)))
        again = family.read_config(config)
        wrong = {k: (v, again.to_dict().get(k)) for k, v in spec.to_dict().items() if again.to_dict().get(k) != v}
        assert again == spec, f"these fields are lost or altered on the way through config.json: {wrong}"
        assert config.get("model_type") == family.model_type
        assert config.get("architectures") == [family.architecture]

    def test_an_unknown_key_is_refused(self) -> None:
        """A key that nobody understands may change the mathematics."""
        config = {**self.family.write_config(self.make_spec()), "spare_key_of_the_contract": 7}
        with pytest.raises(InputError, match="spare_key_of_the_contract"):
            self.family.read_config(config)

    def test_the_key_map_is_a_bijection(self) -> None:
        """Every parameter has one stored tensor, and every stored tensor its parameters."""
        spec, model = self.make_spec(), self.make_model()
        rules = self.family.keys.rules(spec)
        mapped = {name: shape for rule in rules for name, shape in zip(rule.ours, rule.shapes, strict=True)}
        own = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert mapped == own, f"not both in model and map: {sorted(mapped.items() ^ own.items())[:4]}"
        if self.family.build is None:
            assert count_parameters(spec) == sum(p.numel() for p in model.parameters())

    def test_values_survive_the_key_map(self) -> None:
        """Merged into stored tensors and split again, every value is where it was."""
        parameters = dict(self.make_model().named_parameters())
        for rule in self.family.keys.rules(self.make_spec()):
            ours = [parameters[name].detach() for name in rule.ours]
            stored = rule.merge(ours)
            assert tuple(stored.shape) == rule.stored_shape, rule.stored
            assert all(map(torch.equal, rule.split(stored), ours)), f"{rule.stored} does not come back as it was"

    def test_missing_and_unexpected_tensors_are_named(self) -> None:
        """A file that lacks a tensor, or has one that is not understood, is refused by name."""
        spec, keys = self.make_spec(), self.family.keys
        names = keys.stored_names(spec)
        with pytest.raises(FileFormatError, match="spare_tensor_of_the_contract"):
            keys.locate(spec, [*names, "spare_tensor_of_the_contract"], "the file")
        lost = next(rule.stored for rule in reversed(keys.rules(spec)))
        with pytest.raises(FileFormatError) as refused:
            keys.locate(spec, [name for name in names if name != lost], "the file")
        assert lost in str(refused.value)

    def test_a_directory_comes_back(self, tmp_path: Path) -> None:
        """Written as a model directory and loaded, the parameters are the same to the bit."""
        model, path = self.written(tmp_path)
        opened = HuggingFace().open(path, self.registry())
        assert opened.family.name == self.family.name
        again = load_any(opened, Eager(), dtype=torch.float32)
        parameters = dict(again.named_parameters())
        wrong = [name for name, p in model.named_parameters() if not torch.equal(p, parameters[name])]
        assert not wrong, f"{wrong[:4]} did not come back as they were"
        with torch.no_grad():
            torch.testing.assert_close(_logits(again)(some_tokens()), _logits(model)(some_tokens()))

    def test_the_reference_agrees(self, tmp_path: Path) -> None:
        """Another library reads the directory and computes the same: nothing is swapped, transposed or left out."""
        model, path = self.written(tmp_path)
        reference = self.make_reference(path)
        if reference is None:
            not_run("no reference: override make_reference where another library has these models")
        with torch.no_grad():
            ours, theirs = _logits(model)(some_tokens()), reference(some_tokens())
        assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, float(theirs.abs().max()))

    def test_the_future_does_not_leak(self) -> None:
        """Logits depend on no later token."""
        logits, tokens = _logits(self.make_model()), some_tokens()
        changed = tokens.clone()
        changed[:, 7:] = (changed[:, 7:] + 1) % self.make_spec().vocab_size
        with torch.no_grad():
            before, after = logits(tokens), logits(changed)
        assert (before[:, :7] - after[:, :7]).abs().max() == 0, "a token sees later ones"
        assert (before[:, 7:] - after[:, 7:]).abs().max() > 0

    def test_cached_equals_uncached(self) -> None:
        """A prompt and then token by token, as in generation."""
        model, tokens = self.make_model(), some_tokens()
        decoder = decoder_of(model, self.make_spec())
        cache = decoder.new_cache(tokens.shape[1], batch=2)
        with torch.no_grad():
            whole = _logits(model)(tokens)
            pieces = tokens.split([5] + [1] * (tokens.shape[1] - 5), dim=1)
            cached = torch.cat([decoder(piece, cache=cache) for piece in pieces], dim=1)
        assert (cached - whole).abs().max() <= 1e-4 * max(1.0, float(whole.abs().max()))

    def test_every_parameter_learns(self) -> None:
        """The loss depends on each; but a bias of keys that are not rotated adds the same to all scores of a query."""
        model = self.make_model()
        logits = _logits(model)(some_tokens())
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
        (logits.log_softmax(-1) * weights).sum().backward()
        allowed = ("attn.k.bias",) if self.make_spec().rope is None else ()
        silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        silent = [name for name in silent if not name.endswith(allowed)]
        assert not silent, f"no gradient reaches {silent[:4]}"


def _logits(model: nn.Module) -> Logits:
    def run(ids: Tensor) -> Tensor:
        result = model(ids)
        found: Tensor = result[0] if isinstance(result, tuple) else getattr(result, "logits", result)
        return found

    return run
