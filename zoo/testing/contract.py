"""What all contracts share: the component that is meant, failures that are expected, and what can not run here.

A contract is a class of pytest checks. Subclass it, name a component, and every check is inherited::

    class TestMyKernel(AttentionContract):
        component = "my-kernel"
"""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass, replace
from functools import cache
from typing import Any, ClassVar, NoReturn

import pytest
import torch

from zoo.errors import UnavailableError
from zoo.plugins import load_zoo
from zoo.registry import Component, Registry, component_status, import_target, probe

NOT_RUN = "not run: "
"""What the reason of every skipped check begins with."""
NO_GPU = "no GPU"


def not_run(reason: str) -> NoReturn:
    """Skip the check: it is told as not run, never as passed."""
    pytest.skip(NOT_RUN + reason)


def require_gpu() -> None:
    """Skip the check where there is no GPU."""
    if not torch.cuda.is_available():
        not_run(NO_GPU)


def devices() -> list[str]:
    """Types of devices that a component can be asked about here."""
    return ["cpu", "cuda", *(["mps"] if torch.backends.mps.is_built() else [])]


@cache
def installed() -> Registry:
    """All that is installed here."""
    return load_zoo().registry


class Contract:
    """Checks of one component.

    Attributes:
        kind: of component; the contracts of zoo set it.
        component: its registered name.
        options: what it is made with, by the names of its options.
        expected_failures: checks by name that are known to fail, each with the reason. One that passes is a failure.
    """

    kind: ClassVar[str]
    component: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    expected_failures: ClassVar[dict[str, str]] = {}
    _is_standard: ClassVar[bool] = True

    def __init_subclass__(cls, *, standard: bool = False, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls._is_standard = standard
        checks = cls.checks()
        for declared, reason in cls.expected_failures.items():
            if declared.partition("[")[0] not in checks:
                raise TypeError(f"{cls.__name__}.expected_failures names {declared!r}; checks are {', '.join(checks)}.")
            if not reason.strip():
                raise TypeError(f"{cls.__name__}.expected_failures gives no reason for {declared!r}.")
        for name, check in {} if standard else checks.items():
            if inspect.getattr_static(cls, name) is not check:
                setattr(cls, name, check if name in cls.expected_failures else _refusing(name))

    @classmethod
    def checks(cls) -> dict[str, Any]:
        """The standard checks by name, as the contracts of zoo define them."""
        standard = [base for base in reversed(cls.__mro__) if base.__dict__.get("_is_standard")]
        return {n: check for base in standard for n, check in vars(base).items() if n.startswith("test_")}

    def registry(self) -> Registry:
        """Where the component is registered; by default all that is installed."""
        return installed()

    @property
    def record(self) -> Component:
        """What is registered."""
        return self.registry().find(self.kind, self.component)

    def load(self) -> Any:
        """What the component points to; where it can not be used, the check is not run."""
        component = self.record
        status = component_status(component)
        status = probe(component) if status.state != "unavailable" else status
        if status.state == "unavailable":
            lacks_gpu = component.needs is not None and not torch.cuda.is_available()
            not_run(NO_GPU if lacks_gpu else "; ".join(status.reasons))
        if status.state == "broken":
            raise UnavailableError(f"{component.kind} {component.name!r} is broken: {'; '.join(status.reasons)}.")
        return import_target(component)

    def make_options(self) -> Any:
        """`options` as the component's dataclass; ``None`` if it has none."""
        if self.record.options is None:
            assert not self.options, f"{self.component!r} registers no options, and is given {sorted(self.options)}"
            return None
        return import_target(replace(self.record, target=self.record.options))(**self.options)

    @pytest.fixture(autouse=True)
    def _expect(self, request: pytest.FixtureRequest) -> None:
        """Declared failures are expected, and nothing else will do."""
        node: Any = request.node
        reason = self.expected_failures.get(node.name) or self.expected_failures.get(node.originalname)
        if reason is not None:
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))

    def test_registration(self) -> None:
        """What is listed tells a user enough: one line of help, and the remedy where something can be missing."""
        component = self.record
        assert component.help.strip(), "register(..., help=...) is the line that users read in a listing"
        if component.requires or component.needs is not None:
            assert component.fix, "what requires or needs something says in fix= how to get it"
        if component.options is not None:
            kind = import_target(replace(component, target=component.options))
            assert is_dataclass(kind), f"options are a dataclass, not {kind!r}"


def _refusing(name: str) -> Any:
    """Takes the place of a standard check that a subclass has removed or overridden."""

    def check(self: Contract) -> None:
        pytest.fail(
            f"{type(self).__name__} replaces the standard check {name!r}. Give yours another name; if the standard one "
            f"is known to fail, say why: expected_failures = {{{name!r}: 'reason'}}."
        )

    return check
