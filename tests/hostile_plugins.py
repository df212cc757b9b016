"""Everything a plugin has been seen to do wrong, as tiny distributions, with what zoo must say of each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent, indent

from tests.plugin_lab import PluginLab


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """One misbehaving distribution."""

    name: str
    plugin: str = ""
    reason: str
    """What is wrong, in the words that the user reads; ROOT is where it is installed, ``*`` is any text."""
    files: Mapping[str, str] = field(default_factory=dict)
    entry_points: str | None = None
    metadata: str | None = None
    reported_as: str = ""
    """The plugin's name, where it is not the distribution's."""
    version: str = "1.0"

    @property
    def plugin_name(self) -> str:
        return self.reported_as or self.name

    def install(self, lab: PluginLab) -> None:
        lab.install(self.name, self.plugin, files=self.files, entry_points=self.entry_points, metadata=self.metadata)

    def expected(self, root: Path) -> re.Pattern[str]:
        """The reason as a pattern."""
        return _pattern(self.reason, root)

    def line(self, root: Path) -> re.Pattern[str]:
        """The one line on standard error."""
        told = f"is broken and was skipped: {self.reason}"
        return _report(self.plugin_name, self.version, told, root)


@dataclass(frozen=True, kw_only=True)
class Flawed(Hostile):
    """One that loads, with something that is worth a line."""

    def line(self, root: Path) -> re.Pattern[str]:
        return _report(self.plugin_name, self.version, self.reason, root)


def _report(name: str, version: str, told: str, root: Path) -> re.Pattern[str]:
    told = told if told.endswith((".", "?", ")", "*")) else f"{told}."
    return _pattern(f"{f'plugin {name} {version}'.strip()} {told} See: python -m zoo plugins show {name}.", root)


def _pattern(text: str, root: Path) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in text.replace("ROOT", str(root)).split("*")))


def _registering(what: str, *calls: str) -> str:
    """A plugin with one hook that makes these calls of ``register``."""
    body = indent("\n".join(f"register({call})" for call in calls), "    ")
    return f"@hookimpl\ndef zoo_register_{what}(register):\n{body}\n"


def _with_file(package: str, text: str | None) -> dict[str, str]:
    """A registry file inside a package."""
    return {} if text is None else {f"{package}/registry.yaml": dedent(text)}


def _reading(package: str) -> str:
    return f"@hookimpl\ndef zoo_register_models(register):\n    register.file({package!r})\n"


def _yaml(name: str, text: str | None, reason: str, kind: type[Hostile] = Hostile) -> Hostile:
    package = name.replace("-", "_")
    return kind(name=name, plugin=_reading(package), files=_with_file(package, text), reason=reason)


IMPORT = [
    Hostile(
        name="import-error",
        plugin="import not_there_at_all",
        reason="ModuleNotFoundError: No module named 'not_there_at_all'",
    ),
    Hostile(name="syntax-error", plugin="def (:", reason="SyntaxError: invalid syntax (plugin.py, line 2)"),
    Hostile(name="exits", plugin="import sys\nsys.exit(3)", reason="calls sys.exit(3) when it is imported"),
    Hostile(
        name="speechless",
        plugin="class Odd(Exception):\n    def __str__(self):\n        raise RuntimeError\nraise Odd",
        reason="Odd: (its message can not be read)",
    ),
    Hostile(name="wrong-api", plugin="ZOO_API = 2", reason="built for zoo API 2; this zoo speaks 1"),
    Hostile(
        name="half-way",
        plugin=_registering("attention", "'half', 'half_way.kernel:Kernel', help=''")
        + "@hookimpl\ndef zoo_register_models(register):\n    raise ValueError('half-way')\n",
        reason="ValueError: half-way",
    ),
]
"""What goes wrong while the module is imported or its hooks run."""

HOOKS = [
    Hostile(
        name="wrong-argument",
        plugin="@hookimpl\ndef zoo_register_attention(registry):\n    pass\n",
        reason="zoo_register_attention takes 'registry', which the hook does not have; it has 'register'",
    ),
    Hostile(
        name="misspelt",
        plugin="@hookimpl\ndef zoo_register_atention(register):\n    pass\n",
        reason="there is no hook zoo_register_atention; did you mean zoo_register_attention?",
    ),
    Hostile(
        name="unmarked",
        plugin="def zoo_register_attention(register):\n    pass\n",
        reason="zoo_register_attention lacks the @hookimpl marker",
    ),
    Hostile(
        name="unmarked-observer",
        plugin="def zoo_step_ended(step):\n    pass\n",
        reason="zoo_step_ended lacks the @hookimpl marker",
    ),
    Hostile(
        name="wrapping",
        plugin="@hookimpl(wrapper=True)\ndef zoo_register_attention(register):\n    return (yield)\n",
        reason="zoo_register_attention returns a generator; a register hook returns nothing",
    ),
]
"""Hooks that would be ignored, or do nothing."""

CALLS = [
    Hostile(
        name="twice",
        plugin=_registering("attention", *["'again', 'twice.kernel:Kernel', help=''"] * 2),
        reason="registers attention 'again' twice",
    ),
    Hostile(
        name="bad-name",
        plugin=_registering("attention", "'My Attention', 'bad_name.kernel:Kernel', help=''"),
        reason="'My Attention' is no valid attention name: use a-z, 0-9, '.', '_' and '-'.",
    ),
    Hostile(
        name="takes-auto",
        plugin=_registering("attention", "'auto', 'takes_auto.kernel:Kernel', help=''"),
        reason="'auto' is no attention name: the word is zoo's own.",
    ),
    Hostile(
        name="bad-target",
        plugin=_registering("attention", "'bad', 'bad_target.kernel', help=''"),
        reason="attention 'bad' has the target 'bad_target.kernel'; write 'package.module:Object'.",
    ),
    Hostile(
        name="one-string",
        plugin=_registering("attention", "'bad', 'one_string.kernel:Kernel', help='', requires='numpy'"),
        reason="attention 'bad': requires is a list of strings, not 'numpy'.",
    ),
    Hostile(
        name="bad-requirement",
        plugin=_registering("attention", "'bad', 'bad_requirement.kernel:Kernel', help='', requires=['numpy >> 1']"),
        reason="attention 'bad': 'numpy >> 1' is no requirement; write it as for pip: 'name>=1.0'.",
    ),
    Hostile(
        name="bad-needs",
        plugin="from zoo.registry import DeviceNeeds\n"
        + _registering("attention", "'bad', 'bad_needs.kernel:Kernel', help='', needs=DeviceNeeds(accelerator='tpu')"),
        reason="a component can need the accelerator 'cuda' or 'mps', not 'tpu'.",
    ),
    Hostile(
        name="no-help",
        plugin=_registering("attention", "'bad', 'no_help.kernel:Kernel', help=Kernel")
        + "class Kernel:\n    def __repr__(self): return 'Kernel'\n",
        reason="attention 'bad': help is a string, not *.",
    ),
]
"""Arguments of ``register`` that would break a listing later, for everybody."""

METADATA = [
    Hostile(
        name="no-module",
        entry_points="[zoo.plugins]\nx = no_module:plugin\n",
        reason="its entry point must name a module, 'package.module', not 'no_module:plugin'",
    ),
    Hostile(
        name="garbled",
        entry_points="[zoo.plugins]\nthis is no entry point\n",
        reason="its entry_points.txt can not be read: *",
    ),
    Hostile(
        name="bare",
        metadata="",
        reason="the METADATA of its distribution is missing or damaged; install it again",
        version="",
    ),
    Hostile(
        name="zoo-imposter",
        metadata="Metadata-Version: 2.1\nName: zoo\nVersion: 1.0\n",
        reason="its distribution is named 'zoo', which means the built-ins",
        reported_as="zoo",
    ),
    Hostile(
        name="pair",
        entry_points="[zoo.plugins]\na = pair.plugin\nb = pair.plugin\n",
        plugin=_registering("attention", "'of-a-pair', 'pair.kernel:Kernel', help=''"),
        reason="attention 'of-a-pair' is registered twice by pair 1.0.",
        reported_as="pair:b",
    ),
]
"""Damaged or misleading metadata."""

FILES = [
    _yaml("file-missing", None, "package 'file_missing' has no file 'registry.yaml'."),
    _yaml("file-garbled", "models: [", "ROOT/file_garbled/registry.yaml is not valid YAML: *"),
    _yaml("file-number", "schema: 1\nmodels: {m: {family: !!float x}}", "ROOT/file_number/registry.yaml is not *"),
    _yaml(
        "file-other",
        "- a list",
        "ROOT/file_other/registry.yaml is no registry file. It starts with 'schema: 1' and has a mapping 'models:'.",
    ),
    _yaml(
        "file-key",
        "schema: 1\nmodels: {m: {familly: gpt2}}",
        "no key of model 'm' in ROOT/file_key/registry.yaml is named 'familly'. Did you mean 'family'?",
    ),
    _yaml(
        "file-key-number",
        "schema: 1\nmodels: {m: {1: gpt2}}",
        "no key of model 'm' in ROOT/file_key_number/registry.yaml is named '1'. Known: *.",
    ),
    _yaml(
        "file-name",
        "schema: 1\nmodels: {7: {family: gpt2}}",
        "ROOT/file_name/registry.yaml: 7 is no valid model name: use a-z, 0-9, '.', '_' and '-'.",
    ),
    _yaml(
        "file-spec",
        "schema: 1\nmodels: {m: {family: gpt2, spec: [12]}}",
        "ROOT/file_spec/registry.yaml: model 'm': spec is a mapping, not [12].",
    ),
    _yaml(
        "file-sources",
        "schema: 1\nmodels: {m: {family: gpt2, sources: hf:a/b}}",
        "ROOT/file_sources/registry.yaml: model 'm': sources is a list of strings, not 'hf:a/b'.",
    ),
]
"""Registry files that are not what they should be."""

BROKEN = [*IMPORT, *HOOKS, *CALLS, *METADATA, *FILES]

_UNUSABLE = "registers a model that can not be used: model"

MODELS = [
    _yaml(
        "spec-missing",
        "schema: 1\nmodels: {lacking: {family: gpt2, spec: {n_layers: 2, d_model: 8, n_heads: 2}}}",
        f"{_UNUSABLE} 'lacking' (spec-missing 1.0): spec lacks vocab_size, max_seq_len, norm, norm_eps.",
        Flawed,
    ),
    _yaml(
        "spec-key",
        "schema: 1\nmodels: {keyed: {extends: gpt2, spec: {n_layer: 2}}}",
        f"{_UNUSABLE} 'keyed' (spec-key 1.0): no key of spec is named 'n_layer'. Did you mean 'n_layers'*?",
        Flawed,
    ),
    _yaml(
        "spec-zero",
        "schema: 1\nmodels: {zeroed: {extends: gpt2, spec: {n_heads: 0}}}",
        f"{_UNUSABLE} 'zeroed' (spec-zero 1.0): *",
        Flawed,
    ),
    _yaml(
        "spec-type",
        "schema: 1\nmodels: {typed: {extends: gpt2, spec: {n_heads: many}}}",
        f"{_UNUSABLE} 'typed' (spec-type 1.0): *",
        Flawed,
    ),
    _yaml(
        "base-unknown",
        "schema: 1\nmodels: {lost: {extends: gpt3}}",
        f"{_UNUSABLE} 'lost' (base-unknown 1.0) extends 'gpt3': no model is named 'gpt3'. Did you mean 'gpt2'*",
        Flawed,
    ),
    _yaml(
        "circle",
        "schema: 1\nmodels: {_a: {extends: _b}, _b: {extends: _a}, round: {extends: _a}}",
        f"{_UNUSABLE} 'round' (circle 1.0) inherits in a circle: round -> _a -> _b -> _a.",
        Flawed,
    ),
    _yaml(
        "family-unknown",
        "schema: 1\nmodels: {orphan: {extends: gpt2, family: gpt5}}",
        f"{_UNUSABLE} 'orphan' (family-unknown 1.0): no family is named 'gpt5'. *",
        Flawed,
    ),
    _yaml(
        "several-lost",
        "schema: 1\nmodels: {lost1: {extends: nowhere}, lost2: {extends: nowhere}, lost3: {extends: nowhere}}",
        f"{_UNUSABLE} 'lost1' (several-lost 1.0) extends 'nowhere': no model is named 'nowhere'. * (and 2 more)",
        Flawed,
    ),
]
"""Models that are well-formed and can not be used. They are reported and left out; the plugin's others stay."""

NOISY = [
    Flawed(
        name="prints",
        plugin="print('{ hello')\n@hookimpl\ndef zoo_register_loggers(register):\n    print('more')\n",
        reason="prints when it registers: '{ hello'.",
    ),
    Flawed(name="hookless", plugin="answer = 42", reason="has no hook in hookless.plugin."),
]
"""What is no fault but a defect."""

FLAWED = [*MODELS, *NOISY]
