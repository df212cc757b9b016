"""What every precision has to do: name dtypes that a model can train or run in, or say why it can not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.eager import Eager
from zoo.errors import UnavailableError
from zoo.models.gpt import GPT
from zoo.models.init import init_weights
from zoo.precision.base import Precision, choose_precision
from zoo.testing.attention import SPEC
from zoo.testing.contract import Contract, devices, not_run, require_gpu

STEPS = 12
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PrecisionContract(Contract, standard=True):
    """A precision by its name.

    Attributes:
        tolerance: how far logits may be from those in float32, as a part of the largest.
    """

    kind = "precision"
    tolerance: ClassVar[float] = 0.05

    @property
    def precision(self) -> Precision:
        """What is registered."""
        found: Precision = self.load()
        return found

    def chosen(self, *, training: bool, device: str = "cpu") -> Precision:
        """As a run chooses it; where it refuses with a reason, the check is not run."""
        self.load()
        options: dict[str, Any] = {"stored": torch.float32, "quantized": False, "registry": self.registry()}
        try:
            return choose_precision(self.component, device=device, training=training, **options)
        except UnavailableError as error:
            refusal = error
        assert refusal.message and refusal.fix, "a refusal gives the reason, and what to take instead"
        not_run(refusal.message)

    def model(self, precision: Precision, device: str = "cpu") -> GPT:
        """A small model, its weights in the precision's dtype."""
        model = GPT(SPEC, Eager())
        init_weights(model, torch.Generator().manual_seed(0))
        model = model.to(device, precision.param_dtype)
        if hasattr(precision, "convert"):
            precision.convert(model)
        return model

    def inside(self, precision: Precision, device: str = "cpu") -> AbstractContextManager[Any]:
        """What the forward pass of a step runs in."""
        if precision.autocast_dtype is not None:
            return torch.autocast(device, precision.autocast_dtype)
        return nullcontext()

    def tokens(self) -> Tensor:
        """Ids (B, T), always the same."""
        return torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))

    def test_it_says_what_it_is(self) -> None:
        """Its name, floating-point dtypes, and reasons as sentences."""
        precision = self.precision
        assert precision.name == self.record.name, f"its name is {precision.name!r}"
        assert precision.param_dtype in DTYPES, f"weights in {precision.param_dtype}"
        assert precision.autocast_dtype in (None, torch.bfloat16, torch.float16), precision.autocast_dtype
        for device in devices():
            answer = precision.supports(device)
            assert isinstance(answer, list) and all(isinstance(r, str) and r for r in answer), repr(answer)

    def test_it_is_of_use(self) -> None:
        """On a device that it supports it trains, or it runs: one of the two is not refused."""
        precision = self.precision
        device = next((d for d in devices() if not precision.supports(d)), None)
        assert device is not None, f"it supports no device: {precision.supports('cpu')}"
        refused = []
        for training in (True, False):
            try:
                choose_precision(
                    self.component,
                    stored=torch.float32,
                    quantized=False,
                    device=device,
                    registry=self.registry(),
                    training=training,
                )
            except UnavailableError as error:
                refused.append(error)
        assert len(refused) < 2, f"{refused[0]} {refused[-1]}"

    def test_logits(self) -> None:
        """Near those in float32, as the dtype is."""
        precision = self.chosen(training=False)
        model, exact = self.model(precision), self.model(Precision(name="", param_dtype=torch.float32))
        with torch.no_grad():
            right = exact(self.tokens())
            found = model(self.tokens())
        assert found.isfinite().all()
        assert (found.float() - right).abs().max() <= self.tolerance * right.abs().max()

    def test_parameters_stay_the_same_objects(self) -> None:
        """Optimizers and ties know parameters as objects: whatever is converted, they stay, under their names."""
        precision = self.precision
        model = GPT(SPEC, Eager()).to(precision.param_dtype)
        before = {name: id(p) for name, p in model.named_parameters()}
        if hasattr(precision, "convert"):
            precision.convert(model)
        assert {name: id(p) for name, p in model.named_parameters()} == before
        assert {p.dtype for p in model.parameters()} == {precision.param_dtype}

    def test_it_learns(self) -> None:
        """Twelve steps on one batch: the loss falls about as in float32, and all stays finite."""
        self._learns("cpu")

    def test_on_a_gpu(self) -> None:
        """It learns there."""
        self.load()
        require_gpu()
        self._learns("cuda")

    def _learns(self, device: str) -> None:
        precision = self.chosen(training=True, device=device)
        falls = [self._fall(p, device) for p in (Precision(name="", param_dtype=torch.float32), precision)]
        assert falls[1] > 0.5 * falls[0] > 0, f"the loss falls by {falls[1]:.3f}; in float32 by {falls[0]:.3f}"

    def _fall(self, precision: Precision, device: str) -> float:
        """By how much the loss falls."""
        model, tokens = self.model(precision, device).train(), self.tokens().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-6)
        scaler = torch.amp.GradScaler(device, enabled=precision.autocast_dtype == torch.float16)
        losses = []
        for _ in range(STEPS):
            with self.inside(precision, device), _own_context(precision):
                logits = model(tokens)[:, :-1].float()
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            scaler.scale(loss).backward()
            assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert all(p.isfinite().all() for p in model.parameters()), "a parameter is not finite"
        return losses[0] - losses[-1]

    def test_it_can_be_copied(self) -> None:
        """It is data: other processes and recipes have copies of it."""
        assert deepcopy(self.precision) == self.precision


def _own_context(precision: Precision) -> AbstractContextManager[Any]:
    """A context of the precision's own, if it has one."""
    make: Any = getattr(precision, "context", nullcontext)
    context: AbstractContextManager[Any] = make()
    return context
