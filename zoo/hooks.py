"""The hooks a plugin may implement. ``from zoo.hooks import hookimpl`` is all that a plugin needs to import.

A register hook is called once, when the registry is built. It names things and where to find them; it should import
nothing heavy. Order never matters. An observer hook runs only for plugins that a recipe names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from zoo.registrar import ModelRegistrar, Registrar

API_VERSION = 1
"""A plugin module may set ``ZOO_API = 1``; one built for another version is refused."""

ENTRY_POINT_GROUP = "zoo.plugins"

hookspec = pluggy.HookspecMarker("zoo")
hookimpl = pluggy.HookimplMarker("zoo")


@hookspec
def zoo_register_models(register: ModelRegistrar) -> None:
    """Model entries: ``register("name", family=..., spec={...})`` or ``register.file("package", "registry.yaml")``."""


@hookspec
def zoo_register_families(register: Registrar) -> None:
    """Families: how a spec maps to Hugging Face configs and weight names. Target: a `zoo.families.base.Family`."""


@hookspec
def zoo_register_attention(register: Registrar) -> None:
    """Attention backends. Target: a class with the interface of `zoo.attention.base.AttentionBackend`."""


@hookspec
def zoo_register_adapters(register: Registrar) -> None:
    """Parameter-efficient methods, such as LoRA. Target: a subclass of `zoo.adapters.base.Adapter`."""


@hookspec
def zoo_register_precisions(register: Registrar) -> None:
    """Precisions. Target: a `zoo.precision.base.Precision`."""


@hookspec
def zoo_register_quantizers(register: Registrar) -> None:
    """Weight quantizers."""


@hookspec
def zoo_register_converters(register: Registrar) -> None:
    """File formats. Target: a class with the interface of `zoo.convert.base.Converter`."""


@hookspec
def zoo_register_sources(register: Registrar) -> None:
    """Where weights come from, by URL scheme. Target: a function with the signature of `zoo.sources.base.Fetch`."""


@hookspec
def zoo_register_datasets(register: Registrar) -> None:
    """Named data sets. Target: a `zoo.data.named.NamedDataset`."""


@hookspec
def zoo_register_prompts(register: Registrar) -> None:
    """Prompt styles. Target: a `zoo.text.prompts.PromptStyle`."""


@hookspec
def zoo_register_samplers(register: Registrar) -> None:
    """Steps from logits to the next token. Target: a class with the interface of `zoo.generate.sampling.Sampler`."""


@hookspec
def zoo_register_loggers(register: Registrar) -> None:
    """Where training metrics go."""


@hookspec
def zoo_register_commands(register: Registrar) -> None:
    """Subcommands of ``python -m zoo``. Target: a `click.Command`."""


@hookspec
def zoo_model_built(model: Any) -> None:
    """Observe a model after its weights are loaded and its adapters are in place."""


@hookspec
def zoo_step_ended(step: int, metrics: dict[str, float]) -> None:
    """Observe the end of an optimizer step."""


@hookspec
def zoo_checkpoint_saved(step: int, path: str) -> None:
    """Observe a committed checkpoint."""


@hookspec
def zoo_run_finished(path: str) -> None:
    """Observe the end of a run."""
