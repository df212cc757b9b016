"""What the guides say of hooks, targets, the spec and error messages is what the code says."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch.testing import assert_close

from tests import reference
from tests.unit.test_docs_examples import GUIDES, PLUGIN, ROOT, fake_install, read
from zoo import hooks
from zoo.attention.sdpa import SDPA
from zoo.convert.load import load_model, open_checkpoint
from zoo.errors import ZooError
from zoo.plugins import PluginSelection, load_zoo
from zoo.registrar import ModelRegistrar, Registrar
from zoo.registry import KINDS
from zoo.spec import ModelSpec, RopeScaling, RopeSpec
from zoo.testing import CONTRACTS

TINY = {"n_embd": 48, "n_head": 6, "n_layer": 3, "vocab_size": 97, "n_positions": 64, "rotary_dim": 4}
HOOKS = {name: value for name, value in vars(hooks).items() if hasattr(value, "zoo_spec")}


def sections(guide: str) -> dict[str, str]:
    """The text below each heading."""
    parts = re.split(r"^#+ (.+)$", read(guide), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_hook_is_described() -> None:
    text = sections("writing-a-plugin.md")["The hooks"]
    registering = {name for name in HOOKS if name.startswith("zoo_register_")}
    assert set(re.findall(r"^\| `(zoo_\w+)", text, re.MULTILINE)) == registering
    told = signatures(text)
    assert {name: told[name] for name in told if name.startswith("zoo_")} == {n: said(h) for n, h in HOOKS.items()}


def test_what_register_takes_is_described() -> None:
    """Guards the arguments of every call that a hook makes: their names, their defaults, and a line on each."""
    text = sections("writing-a-plugin.md")["The hooks"]
    calls = re.findall(r"^(register[.\w]*)(\(.*?\) -> \w+)$", text, re.MULTILINE | re.DOTALL)
    expected = [
        ("register", said(Registrar.__call__)),
        ("register", said(ModelRegistrar.__call__)),
        ("register.file", said(ModelRegistrar.file)),
        ("register.path", said(ModelRegistrar.path)),
    ]
    assert [(name, one_line(signature)) for name, signature in calls] == expected
    arguments = set(inspect.signature(Registrar.__call__).parameters) - {"self", "name"}
    assert set(re.findall(r"^- `(\w+)`", text, re.MULTILINE)) == arguments


def test_what_targets_are_called_with() -> None:
    """Guards the signatures that an author implements; and none of the protocols' methods is left out."""
    told = signatures(sections("writing-a-plugin.md")["What targets are called with"])
    assert len(told) > 15
    for path, signature in told.items():
        module, owner, method = path.rsplit(".", 2)
        assert signature == said(getattr(getattr(import_module(module), owner), method)), path
    protocols = {tuple(path.rsplit(".", 2)[:2]) for path in told}
    for module, owner in protocols:
        kind = getattr(import_module(module), owner)
        own = {n for n, v in vars(kind).items() if inspect.isfunction(v) and (n == "__call__" or not n.startswith("_"))}
        if is_protocol(kind):
            assert own <= {path.rpartition(".")[2] for path in told if f".{owner}." in path}, kind


def test_every_contract_is_described() -> None:
    """Guards the table of contracts: every kind, and attributes that the contract has."""
    rows = re.findall(
        r"^\| ([\w ]+) \| `(\w+)` \| (.*)\|$", sections("writing-a-plugin.md")["The contracts"], re.MULTILINE
    )
    contracts = {kind: (name, re.findall(r"`(\w+)", given)) for kind, name, given in rows}
    assert contracts.pop("a distribution")[0] == "PluginContract"
    assert {kind: name for kind, (name, _) in contracts.items()} == {k: c.__name__ for k, c in CONTRACTS.items()}
    for kind, (_, given) in contracts.items():
        assert all(hasattr(CONTRACTS[kind], attribute) for attribute in given), kind


def is_protocol(kind: Any) -> bool:
    return bool(getattr(kind, "_is_protocol", False))


def one_line(text: str) -> str:
    """A signature without its line breaks."""
    return re.sub(r"(?<=\() | (?=\))", "", " ".join(text.split()))


def signatures(text: str) -> dict[str, str]:
    """The signatures in the text blocks, by name."""
    found = re.findall(r"^(zoo[.\w]+)(\(.*?\) -> [^\n]+)$", text, re.MULTILINE | re.DOTALL)
    return {name: one_line(signature) for name, signature in found}


def said(function: Callable[..., object]) -> str:
    """The signature of a function as the guide writes it: annotations as in the code, no ``self``."""
    signature = inspect.signature(function)
    parts, marked = [], False
    for name, parameter in signature.parameters.items():
        if name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not marked:
            parts.append("*")
            marked = True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parts.append(f"{name}: {parameter.annotation}{default}")
    return f"({', '.join(parts)}) -> {signature.return_annotation}"


def test_a_hook_is_said_to_be_unused_exactly_if_it_is() -> None:
    """Guards against a kind that gets its first user while the guide still says that it has none."""
    text = sections("writing-a-plugin.md")["The hooks"]
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "zoo").rglob("*.py"))
    for kind, plural in KINDS.items():
        used = re.search(rf'(load|match|model)\(\s*"{kind}"', source) or kind in ("model", "sampler")
        assert used, f"zoo_register_{plural}"
    assert bool(re.search(r"hook\.zoo_(?!register)", source)) != ("not called yet" in text)


@pytest.mark.parametrize("guide", GUIDES)
def test_what_is_named_exists(guide: str) -> None:
    named = set(re.findall(r"`(zoo(?:\.\w+)+)[`(]", read(guide)))
    for path in named:
        module, _, attribute = path.rpartition(".")
        assert hasattr(import_module(module), attribute), path
    for path in re.findall(r"`((?:zoo|tests|plugins|docs)/[\w./-]+)`", read(guide)):
        assert (ROOT / path).exists(), path
    for link, anchor in re.findall(r"\]\(([\w.-]*)(?:#([\w-]+))?\)", read(guide)):
        assert not link or (ROOT / "docs" / link).is_file(), link
        headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in sections(link or guide)}
        assert not anchor or anchor in headings, anchor
    assert named or guide != "writing-a-plugin.md"


def test_the_api_version_is_the_one_in_the_code() -> None:
    text = sections("writing-a-plugin.md")["Versions"]
    assert f"`ZOO_API = {hooks.API_VERSION}`" in text
    assert f"speaks {hooks.API_VERSION}," in text


def test_all_that_a_spec_can_say_is_listed() -> None:
    text = sections("adding-a-model.md")["3. Another mechanism"]
    listed = set(re.findall(r"`(\w+)`", text))
    names = {field.name for cls in (ModelSpec, RopeSpec) for field in fields(cls)}
    choices = {
        choice
        for cls in (ModelSpec, RopeScaling)
        for hint in get_type_hints(cls).values()
        for choice in get_args(hint)
        if isinstance(choice, str)
    }
    assert names | choices <= listed


class Author:
    """Somebody who writes the example plugin, makes a mistake, and tries it on a tiny model."""

    def __init__(self, directory: Path) -> None:
        self.model, self.plugin, self.installed = directory / "model", directory / "plugin", directory / "installed"
        self.theirs = reference.save_tiny(self.model, "gptj", TINY)
        shutil.copytree(PLUGIN, self.plugin, ignore=shutil.ignore_patterns("__pycache__", "tests", ".*"))
        fake_install(self.plugin, self.installed)

    def edit(self, file: str, old: str, new: str) -> None:
        """Change one place in a file of the package."""
        path = self.plugin / "zoo_example_family" / file
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, old
        path.write_text(text.replace(old, new), encoding="utf-8")

    def configure(self, **keys: object) -> None:
        """Add to the model's config.json."""
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | keys), encoding="utf-8")

    def outcome(self) -> str:
        """What zoo says when the model is loaded and compared with the reference; nothing if all is well."""
        built = load_zoo(PluginSelection(only=frozenset({"zoo-example-family"})))
        if built.problems():
            return "\n".join(built.problems())
        try:
            ours = load_model(open_checkpoint(self.model, built.registry), SDPA(), dtype=torch.float32)
            ids = reference.tokens(2, 40)
            with torch.no_grad():
                assert_close(ours(ids), self.theirs(ids).logits, atol=1e-4, rtol=1e-4)
        except (ZooError, AssertionError) as error:
            return str(error)
        return ""


@pytest.fixture
def author(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Author]:
    author = Author(tmp_path)
    for path in (author.plugin, author.installed):
        monkeypatch.syspath_prepend(str(path))
    _forget()
    yield author
    _forget()


def _forget() -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "zoo_example_family"]:
        del sys.modules[module]


MISTAKES: dict[str, Callable[[Author], None]] = {
    "misspelt hook": lambda a: a.edit("__init__.py", "zoo_register_families", "zoo_register_familys"),
    "wrong matches": lambda a: a.edit("__init__.py", 'matches=["gptj"]', 'matches=["gpt-j"]'),
    "key left over": lambda a: a.configure(parallel=True),
    "value refused": lambda a: a.configure(rotary=False),
    "misspelt right column": lambda a: a.edit("gptj.py", "attn_norm.bias", "attn_nrom.bias"),
    "misspelt left column": lambda a: a.edit("gptj.py", "mlp.fc_in.bias ", "mlp.fcin.bias "),
    "parameter not in the spec": lambda a: a.edit("gptj.py", "head_bias=True,", ""),
    "wrong transform": lambda a: a.edit("gptj.py", "mlp.up.weight", "mlp.up.weight  transposed"),
    "wrong mathematics": lambda a: a.edit("gptj.py", "interleaved=True", "interleaved=False"),
}
"""One for each row of the table of messages, in its order."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_the_message_that_the_table_has_for_it(mistake: str, author: Author) -> None:
    messages = re.findall(r"^\| `(.+?)` \| .+ \|$", sections("adding-a-model.md")["What went wrong"], re.MULTILINE)
    assert len(messages) == len(MISTAKES)
    MISTAKES[mistake](author)
    expected = messages[list(MISTAKES).index(mistake)]
    pattern = re.escape(expected).replace(r"\.\.\.", r".+")
    assert re.search(pattern, author.outcome()), f"{expected}\nis not\n{author.outcome()}"


def test_without_a_mistake_there_is_no_message(author: Author) -> None:
    assert author.outcome() == ""
