"""What can not be used here: told from metadata, found by probing, explained on use, and never replaced in silence."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import invalidate_caches
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest

from tests.plugin_lab import PluginLab, lab_on_path, plugin_of, run_inside
from zoo.cli.main import main
from zoo.errors import UnavailableError
from zoo.plugins import load_zoo
from zoo.registry import Component, DeviceNeeds, Origin, Registry, availability, component_status, probe

ORIGIN = Origin(distribution="acme", version="1.0")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[PluginLab]:
    with lab_on_path(tmp_path) as lab:
        lab.install_healthy()
        yield lab


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU of any kind, whatever this machine has."""
    monkeypatch.setattr(availability, "_CUDA_DRIVERS", ())
    monkeypatch.setattr("platform.system", lambda: "Linux")


def install_attention(lab: PluginLab, arguments: str, *, kernel: str | None = None, imports: str = "") -> None:
    """The plugin ``acme`` with the attention backend ``fast``."""
    hook = f"@hookimpl\ndef zoo_register_attention(register):\n    register('fast', {arguments}, help='quick')\n"
    source = f"{imports}\n{hook}"
    lab.install("acme", source, files={} if kernel is None else {"acme/kernel.py": kernel})


def listed(lab: PluginLab, *options: str) -> dict[str, Any]:
    """The row of ``fast`` in ``list attention``."""
    result = run_inside(load_zoo(), "list", "attention", "--json", *options)
    assert result.exit_code == 0
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert rows["sdpa"]["state"] == "ok"
    assert rows["healthy-attention"]["state"] == ("ok" if "--probe" in options else "unprobed")
    fast: dict[str, Any] = rows["fast"]
    return fast


def use(ref: str = "fast") -> object:
    return load_zoo().registry.load("attention", ref)


@pytest.mark.parametrize(
    ("requirement", "reason"),
    [
        ("zoo-no-such-package>=2.6", "needs zoo-no-such-package>=2.6 (not installed)"),
        ("click<1", "needs click<1 (installed: *)"),
    ],
)
def test_an_unmet_requirement(requirement: str, reason: str, lab: PluginLab) -> None:
    """Guards against a backend that is offered and then fails with a bare ImportError."""
    install_attention(lab, f"'acme.kernel:Kernel', requires=[{requirement!r}], fix='pip install fast'")
    row = listed(lab)
    assert row["state"] == "unavailable"
    (told,) = row["reasons"]
    assert told.startswith(reason.partition("*")[0])
    assert row["fix"] == "pip install fast"
    with pytest.raises(UnavailableError, match=r"attention 'fast' is unavailable: needs .* pip install fast") as error:
        use()
    assert error.value.exit_code == 3
    assert load_zoo().problems() == []


def test_requirements_that_are_met_or_for_other_machines(lab: PluginLab) -> None:
    """Guards against refusing what would work: the marker of another system, a version that is there."""
    install_attention(lab, "'acme.kernel:Kernel', requires=['click>=1', 'x>=9; python_version < \"3\"']")
    assert listed(lab)["state"] == "unprobed"
    assert use()


def test_a_missing_device(lab: PluginLab, bare_machine: None) -> None:
    """Guards against a CUDA kernel that is imported on a machine without a GPU."""
    install_attention(
        lab,
        "'acme.kernel:Kernel', needs=DeviceNeeds(accelerator='cuda', min_capability=(8, 0))",
        imports="from zoo.registry import DeviceNeeds",
        kernel="raise RuntimeError('no driver')",
    )
    row = listed(lab)
    assert row["state"] == "unavailable"
    reason = "needs cuda with compute capability 8.0 or newer (no such device on this machine)"
    assert row["reasons"] == [reason]
    with pytest.raises(UnavailableError) as error:
        use()
    assert str(error.value) == f"attention 'fast' is unavailable: {reason}."


def test_a_device_that_is_there(tmp_path: Path, bare_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against refusing CUDA where the driver lives elsewhere than NVIDIA's usual place (WSL, Jetson, ROCm)."""
    needy = Component(
        kind="attention", name="x", target="json:dumps", help="", needs=DeviceNeeds(accelerator="cuda"), origin=ORIGIN
    )
    assert component_status(needy).state == "unavailable"
    monkeypatch.setattr(availability, "_CUDA_DRIVERS", (str(tmp_path / "not-there"), str(tmp_path)))
    assert component_status(needy).state == "unprobed"
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    apple = Component(
        kind="attention", name="x", target="json:dumps", help="", needs=DeviceNeeds(accelerator="mps"), origin=ORIGIN
    )
    assert component_status(apple).state == "unprobed"


def test_a_target_whose_package_is_missing(lab: PluginLab) -> None:
    """Guards against a listing that says all is well with what can not exist."""
    install_attention(lab, "'acme_kernels_not_there.fast:Kernel'")
    row = listed(lab)
    assert row["state"] == "broken"
    assert row["reasons"] == ["its target 'acme_kernels_not_there.fast:Kernel' does not exist"]
    with pytest.raises(UnavailableError, match=r"attention 'fast' is broken: its target .* does not exist"):
        use()


FAULTY_KERNELS = {
    "no such attribute": ("", "attention 'fast' (acme 1.0) points to 'acme.kernel:Kernel', which does not exist."),
    "its own import fails": (
        "import no_such_kernels",
        "attention 'fast' (acme 1.0) can not be imported: ModuleNotFoundError: No module named 'no_such_kernels'.",
    ),
    "built for another torch": (
        "raise ImportError('fast.so: undefined symbol:\\n  _ZN3c10')",
        "attention 'fast' (acme 1.0) can not be imported: ImportError: fast.so: undefined symbol: _ZN3c10.",
    ),
    "calls sys.exit": (
        "raise SystemExit('bye')",
        "attention 'fast' (acme 1.0) can not be imported: SystemExit: bye.",
    ),
    "fails when it is asked": (
        "def __getattr__(name):\n    raise OSError('lazy')",
        "attention 'fast' (acme 1.0) can not be imported: OSError: lazy.",
    ),
}


@pytest.mark.parametrize("fault", FAULTY_KERNELS)
def test_what_only_an_import_can_tell(fault: str, lab: PluginLab) -> None:
    """Guards against a listing that imports, a probe that dies, and a fault that is told differently on use."""
    kernel, reason = FAULTY_KERNELS[fault]
    install_attention(lab, "'acme.kernel:Kernel', fix='reinstall it'", kernel=kernel)
    assert listed(lab)["state"] == "unprobed"
    row = listed(lab, "--probe")
    assert (row["state"], row["reasons"]) == ("broken", [reason])
    with pytest.raises(UnavailableError) as error:
        use()
    assert error.value.message == reason


def test_a_kernel_that_prints_leaves_standard_output_alone(lab: PluginLab) -> None:
    """Guards against a banner in the middle of ``--json``."""
    install_attention(lab, "'acme.kernel:Kernel'", kernel="print('ACME KERNELS')\nclass Kernel: pass")
    result = lab.zoo("list", "attention", "--probe", "--json")
    assert {row["name"]: row["state"] for row in json.loads(result.stdout)}["fast"] == "ok"
    assert "ACME KERNELS" in result.stderr


def test_the_command_line_explains_and_ends_with_3(
    lab: PluginLab, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Guards against an explicit choice that falls back, and against a traceback."""
    source = "@hookimpl\ndef zoo_register_commands(register):\n"
    call = "register('acme-run', 'acme.kernel:run', requires=['zoo-no-such-package'], fix='pip install it', help='')"
    lab.install("acme", f"{source}    {call}\n")
    with pytest.raises(SystemExit) as exit_:
        main(["acme-run"])
    assert exit_.value.code == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "zoo: command 'acme-run' is unavailable: needs zoo-no-such-package (not installed). pip install it\n"
    )


def test_targets_in_a_module_that_was_never_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against calling a component of a notebook (whose ``__main__`` has no spec) broken before it is tried."""
    notebook = ModuleType("notebook_main")
    notebook.__dict__["Mine"] = "mine"
    monkeypatch.setitem(sys.modules, "notebook_main", notebook)
    registry = Registry()
    registry.add(Component(kind="attention", name="mine", target="notebook_main:Mine", help="", origin=ORIGIN))
    assert component_status(registry.find("attention", "mine")).state == "unprobed"
    assert registry.load("attention", "mine") == "mine"


def test_built_ins_are_ok_without_being_imported(registry: Registry) -> None:
    """Guards against a built-in that points to nothing."""
    for kind in ("family", "attention", "precision", "converter", "source", "sampler"):
        for ref, component in registry.components(kind):
            if component.needs is None and not component.requires:
                assert component_status(component).state == "ok", ref
                assert probe(component).state == "ok", ref


def test_options_are_shown_and_what_is_wrong_with_them(lab: PluginLab) -> None:
    """Guards against ``show`` dying of a component's options, and against a default factory shown as required."""
    options = """
    from dataclasses import dataclass, field

    @dataclass
    class Options:
        window: int
        heads: list = field(default_factory=list)
        kind: object = complex(1, 2)
    """
    install_attention(lab, "'acme.kernel:Kernel', options='acme.options:Options'")
    shown = run_inside(load_zoo(), "show", "fast")
    assert "options:" in shown.output.replace("  ", " ")
    assert "can not be read: attention 'fast'" in shown.output
    (lab.root / "acme/options.py").write_text(dedent(options))
    invalidate_caches()
    result = run_inside(load_zoo(), "show", "attention", "fast", "--json")
    assert json.loads(result.output)["options"] == {"window": "(required)", "heads": [], "kind": "(1+2j)"}
    assert plugin_of(load_zoo(), "acme").state == "ok"
