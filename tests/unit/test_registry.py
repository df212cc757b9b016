"""Names: what finds a component or a model, what is refused, and what an entry inherits."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.errors import InputError, UnknownNameError
from zoo.hooks import hookimpl
from zoo.plugins import Item, _collect
from zoo.registrar import ModelRegistrar, Registrar
from zoo.registry import BUILT_IN, KINDS, Component, ModelEntry, Origin, Registry

ACME, BETA, OURS = (Origin(distribution=name, version="1.0") for name in ("acme", "beta", BUILT_IN))
TINY: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 8,
    "n_heads": 2,
    "vocab_size": 11,
    "max_seq_len": 16,
    "norm": "rms",
    "norm_eps": 1e-5,
}


def component(name: str, origin: Origin, *, kind: str = "attention", matches: tuple[str, ...] = ()) -> Component:
    return Component(kind=kind, name=name, target="json:dumps", help="", matches=matches, origin=origin)


def entry(name: str, origin: Origin = ACME, *, extends: str | None = None, family: str = "", **spec: Any) -> ModelEntry:
    return ModelEntry(name=name, origin=origin, extends=extends, family=family, spec_values=spec)


def registry_of(*items: Item) -> Registry:
    registry = Registry()
    registry.add(component("gpt2", OURS, kind="family"), *items)
    return registry


# Finding


def test_find_by_bare_and_full_name() -> None:
    """Guards against a reference that is listed and does not work."""
    registry = registry_of(component("fast", ACME), component("slow", BETA), component("fast", OURS))
    assert registry.find("attention", "fast").origin == OURS
    assert registry.find("attention", "acme/fast").origin == ACME
    assert registry.find("attention", "slow").origin == BETA
    assert registry.find("attention", "beta/slow").origin == BETA
    listed = {ref: item.origin for ref, item in registry.items("attention")}
    assert listed == {"fast": OURS, "acme/fast": ACME, "slow": BETA}
    assert all(registry.find("attention", ref).origin == origin for ref, origin in listed.items())


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("fats", "no attention is named 'fats'. Did you mean 'fast'? See: python -m zoo list attention."),
        ("beta/fast", "no attention is named 'beta/fast'. Did you mean 'fast'? See: python -m zoo list attention."),
        ("q", "no attention is named 'q'. Known: fast, slow. See: python -m zoo list attention."),
        ("", "no attention is named ''. Known: fast, slow. See: python -m zoo list attention."),
    ],
)
def test_unknown_names_offer_the_nearest(ref: str, message: str) -> None:
    """Guards against 'not found' with nothing to go on."""
    registry = registry_of(component("fast", ACME), component("slow", BETA))
    with pytest.raises(UnknownNameError) as error:
        registry.find("attention", ref)
    assert str(error.value) == message


def test_unknown_names_mention_plugins_that_did_not_load() -> None:
    """Guards against 'no such name' for what a broken plugin would have registered."""
    registry = registry_of()
    registry.broken_plugins = ["acme"]
    with pytest.raises(UnknownNameError, match=r"\(Plugins that failed to load: acme\.\)"):
        registry.find("attention", "fast")


def test_bases_are_found_and_never_suggested() -> None:
    """Guards against advertising entries that are no models."""
    registry = registry_of(entry("_base", family="gpt2", **TINY), entry("based", extends="_base"))
    assert registry.model("_base").family == "gpt2"
    assert [ref for ref, _ in registry.models()] == ["based"]
    with pytest.raises(UnknownNameError) as error:
        registry.model("bases")
    assert error.value.nearest == ["based"]


def test_an_ambiguous_name_names_both_and_how_to_write_them() -> None:
    """Guards against a choice between two distributions that depends on anything but the user."""
    registry = registry_of(component("fast", BETA), component("fast", ACME))
    with pytest.raises(InputError) as error:
        registry.find("attention", "fast")
    assert str(error.value) == "attention 'fast' is provided by acme 1.0 and beta 1.0. Write acme/fast or beta/fast."
    assert [ref for ref, _ in registry.items("attention")] == ["acme/fast", "beta/fast"]


def test_one_name_twice_by_one_distribution_adds_nothing() -> None:
    """Guards against the second replacing the first, and against half of a plugin."""
    registry = registry_of(component("fast", ACME))
    with pytest.raises(InputError, match=r"attention 'fast' is registered twice by acme 1\.0\."):
        registry.add(component("other", ACME), component("fast", ACME))
    with pytest.raises(InputError, match="'third' is registered twice"):
        registry.add(component("third", ACME), component("third", ACME))
    assert [ref for ref, _ in registry.items("attention")] == ["fast"]


def test_match() -> None:
    """Guards against a plugin that takes over a model type or a URL scheme of zoo's, and a silent choice of two."""
    family = "family"
    registry = registry_of(
        component("a", ACME, kind=family, matches=("llama", "mistral")),
        component("l", OURS, kind=family, matches=("llama",)),
        component("b", BETA, kind=family, matches=("falcon",)),
        component("f", ACME, kind=family, matches=("falcon",)),
    )
    matched = {name: registry.match(family, name) for name in ("llama", "mistral", "nobody")}
    assert {name: found and found.name for name, found in matched.items()} == {
        "llama": "l",
        "mistral": "a",
        "nobody": None,
    }
    with pytest.raises(InputError) as error:
        registry.match(family, "falcon")
    assert str(error.value) == (
        "'falcon' is claimed by the families 'b' of beta 1.0 and 'f' of acme 1.0. Switch one off: -p no:NAME."
    )


# Inheritance


def test_a_chain_merges_and_null_deletes() -> None:
    """Guards against an entry that loses what its base says, or can not take it back."""
    rope = {"base": 10_000.0, "interleaved": True}
    registry = registry_of(
        ModelEntry(
            name="_a", family="gpt2", license="mit", help="a", sources=("hf:a/a",), spec_values=TINY, origin=ACME
        ),
        entry("_b", extends="_a", rope=rope, attn_scale=0.5),
        ModelEntry(
            name="c",
            extends="_b",
            help="c",
            sources=("hf:c/c",),
            spec_values={"rope": {"base": 500.0, "interleaved": None}, "attn_scale": None, "n_layers": 3},
            origin=ACME,
        ),
    )
    c = registry.model("c")
    assert (c.family, c.license, c.help, c.sources, c.extends) == ("gpt2", "mit", "c", ("hf:c/c",), None)
    assert c.spec_values == {**TINY, "n_layers": 3, "rope": {"base": 500.0}}
    assert c.spec.rope is not None
    assert not c.spec.rope.interleaved
    assert registry.model("_b").sources == ()
    assert registry.model("_b").spec_values["rope"] == rope, "the base must not change"


def test_a_base_that_comes_later() -> None:
    """Guards against inheritance that works only in the order of the file, or of the plugins."""
    registry = registry_of(entry("child", BETA, extends="parent", n_layers=5), entry("parent", family="gpt2", **TINY))
    assert registry.model("child").spec.n_layers == 5
    assert registry.model("child").family == "gpt2"


def test_a_name_in_an_entry_means_the_one_of_its_own_distribution() -> None:
    """Guards against a plugin whose models change, or become ambiguous, when another plugin is installed."""
    registry = registry_of(
        entry("_base", ACME, family="own", **TINY),
        entry("one", ACME, extends="_base"),
        entry("_base", BETA, family="own", **TINY | {"n_layers": 7}),
        entry("two", BETA, extends="_base"),
        component("own", ACME, kind="family"),
        component("own", BETA, kind="family"),
    )
    models = dict(registry.models())
    assert (models["one"].spec.n_layers, models["two"].spec.n_layers) == (2, 7)
    assert (models["one"].family, models["two"].family) == ("acme/own", "beta/own")
    assert registry.find("family", models["two"].family).origin == BETA


def test_an_entry_may_build_upon_another_distributions_of_its_own_name() -> None:
    """Guards against ``extends`` of the same name being taken for a circle."""
    registry = registry_of(entry("gpt2", OURS, family="gpt2", **TINY), entry("gpt2", ACME, extends="gpt2", n_layers=9))
    assert registry.model("acme/gpt2").spec.n_layers == 9
    assert registry.model("gpt2").spec.n_layers == 2


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ({"a": "a"}, "model 'a' (acme 1.0) inherits in a circle: a -> a."),
        ({"a": "b", "b": "a"}, "model 'a' (acme 1.0) inherits in a circle: a -> b -> a."),
        ({"a": "b", "b": "c", "c": "b"}, "model 'a' (acme 1.0) inherits in a circle: a -> b -> c -> b."),
        ({"a": "acme/a"}, "model 'a' (acme 1.0) inherits in a circle: a -> a."),
        ({"a": "z"}, "model 'a' (acme 1.0) extends 'z': no model is named 'z'."),
    ],
)
def test_circles_and_lost_bases(links: Mapping[str, str], message: str) -> None:
    """Guards against an endless loop, and an error that does not say whose entry is at fault."""
    registry = registry_of(*(entry(name, extends=base) for name, base in links.items()))
    with pytest.raises(InputError) as error:
        registry.model("a")
    assert str(error.value).startswith(message)
    assert not isinstance(error.value, UnknownNameError), "the model is known; its base is not"
    assert list(registry.models()) == []
    (item,) = [item for ref, item in registry.items("model") if ref == "a"]
    assert (registry.fault(item) or "").startswith(message)


def test_a_very_long_chain() -> None:
    """Guards against recursion: a chain of bases must not exhaust the stack."""
    links = [entry(f"m{i}", extends=f"m{i + 1}") for i in range(3000)]
    registry = registry_of(*links, entry("m3000", family="gpt2", **TINY))
    assert registry.model("m0").spec.n_layers == 2


def test_a_built_in_that_can_not_be_used_raises() -> None:
    """Guards against a built-in entry that vanishes from the list, and from the tests that walk it, when it breaks."""
    registry = registry_of(entry("ours", OURS, family="gpt2"))
    with pytest.raises(InputError, match=r"model 'ours' \(zoo 1\.0\): spec lacks"):
        [(ref, model.spec) for ref, model in registry.models()]
    with pytest.raises(InputError, match="extends 'nothing'"):
        list(registry_of(entry("ours", OURS, extends="nothing")).models())


# Order never matters

NAMES = st.sampled_from(["x", "y", "z"])
PLUGINS = ("acme", "beta", "gamma")
REGISTRATIONS = st.lists(
    st.tuples(
        st.sampled_from(PLUGINS),
        st.sampled_from(["attention", "family", "model"]),
        NAMES,
        NAMES,  # what a model extends
    ),
    unique_by=lambda r: r[:3],
    max_size=12,
)


def module_of(calls: list[tuple[str, str, str]]) -> ModuleType:
    """A plugin that makes these calls in this order, its hooks defined in the order in which they occur."""
    module = ModuleType("plugin")

    def hook_for(kind: str) -> Any:
        def call(register: Any) -> None:
            for of_kind, name, base in calls:
                if of_kind == kind and isinstance(register, ModelRegistrar):
                    register(name, extends=base, spec={"n_layers": len(name + base)})
                elif of_kind == kind:
                    assert isinstance(register, Registrar)
                    register(name, "json:dumps", help="", matches=[base])

        call.__name__ = f"zoo_register_{KINDS[kind]}"
        return hookimpl(call)

    for kind in dict.fromkeys(kind for kind, *_ in calls):
        setattr(module, f"zoo_register_{KINDS[kind]}", hook_for(kind))
    return module


def snapshot(registry: Registry) -> dict[str, Any]:
    """Everything that a registry answers."""
    listed: dict[str, Any] = {kind: list(registry.items(kind)) for kind in KINDS}
    listed["usable"] = list(registry.models())
    for ref, item in registry.items("model"):
        listed[f"fault of {ref}"] = registry.fault(item)
    for kind in ("attention", "family"):
        for name in ("x", "y", "z"):
            for method in (registry.find, registry.match):
                try:
                    answer: Any = method(kind, name)
                except InputError as error:
                    answer = str(error)
                listed[f"{method.__name__} {kind} {name}"] = answer
    return listed


def build(registrations: list[tuple[str, str, str, str]]) -> Registry:
    registry = registry_of(entry("x", OURS, family="gpt2", **TINY))
    for plugin in dict.fromkeys(plugin for plugin, *_ in registrations):
        module = module_of([call for owner, *call in registrations if owner == plugin])  # type: ignore[misc]
        registry.add(*_collect(module, Origin(distribution=plugin, version="1.0")))
    return registry


@given(REGISTRATIONS.flatmap(lambda all_: st.tuples(st.just(all_), st.permutations(all_))))
def test_the_order_of_plugins_hooks_and_calls_does_not_matter(
    orders: tuple[list[tuple[str, str, str, str]], list[tuple[str, str, str, str]]],
) -> None:
    """Guards against a registry that depends on installation order, which differs between machines and ranks."""
    first, second = orders
    assert snapshot(build(first)) == snapshot(build(second))
