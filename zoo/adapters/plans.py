"""The options of the built-in adapters, and what each would do to a model: arithmetic over sites, without torch.

Shape letters: D_in, D_out of a site, R rank, L equal parts of its outputs, V vocabulary, D model width, N heads,
P prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Literal, TypeVar, get_args

from zoo.errors import InputError, UnknownNameError
from zoo.plan.sites import ALL_LINEAR, AdapterPlan, Addition, Kind, Site, choose_sites, last_layers

Shapes = dict[str, tuple[int, ...]]
Init = Literal["default", "gaussian", "pissa"]
T = TypeVar("T")


@dataclass(frozen=True)
class LoRAOptions:
    """Options of LoRA; the names are those of its paper and of PEFT.

    Attributes:
        r: rank.
        alpha: the update is scaled by alpha / r, or by alpha / sqrt(r) with ``rslora``.
        targets: roles, names, ends of names or globs; ``all-linear``. By default attn.q and attn.v, or all linears
            where a model has no such roles.
        layers: the layers it is limited to, counted from 0.
        dropout: probability for each input of A, in training.
        bias: biases that train along: of no site, of ``all``, or of those with LoRA.
        dora: learn the norm of every output apart (DoRA).
        rank_pattern, alpha_pattern: other values for the sites whose name ends in a match of the key.
        modules_to_save: names, ends of names or roles of sites that are trained in full beside it.
        init: A is uniform (Kaiming), or ``gaussian`` with deviation 1 / r, and B is zero; or ``pissa``: A and B are the
            principal part of the weight, which is taken off it again (linears only).
        parts: for linears whose name ends in a match of the key, the rank of each of the equal parts of their outputs,
            0 for a part without an update: ``{"c_attn": (8, 0, 8)}`` adapts q and v of a fused projection.
        share: groups of linears that have one A in each layer, and so the same inputs and rank:
            ``(("attn.q", "attn.k", "attn.v"),)`` is what LoRA of a projection that fuses them computes.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv", "embedding")
    r: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    init: Init = "default"
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    share: tuple[tuple[str, ...], ...] = ()

    def rank(self, site: Site) -> int:
        """Rank at a site; where its outputs are divided, that of all parts together."""
        return sum(self.part_ranks(site)) or int(by_pattern(self.rank_pattern, site.name, self.r))

    def part_ranks(self, site: Site) -> tuple[int, ...]:
        """Rank of each of the L equal parts of a site's outputs; empty where they are not divided."""
        return tuple(by_pattern(self.parts, site.name, ()))

    def scaling(self, site: Site, rank: int | None = None) -> float:
        """Factor on B A at a site, for its rank or that of one of its parts."""
        rank = self.rank(site) if rank is None else rank
        return by_pattern(self.alpha_pattern, site.name, self.alpha) / (rank**0.5 if self.rslora else rank)

    def part_scalings(self, site: Site) -> tuple[float, ...]:
        """Factor on B A of each part of a site's outputs; 0 where there is no update."""
        return tuple(self.scaling(site, rank) if rank else 0.0 for rank in self.part_ranks(site))

    def plan(self, sites: Sequence[Site]) -> AdapterPlan:
        """A and B at each target.

        Raises:
            InputError: a rank is no positive number or larger than the site, a number is out of range, a target or a
                key of ``parts`` names no site, ``dora``, ``pissa`` or ``parts`` can not be had at one, or sites can not
                share an A.
        """
        if self.init not in get_args(Init):
            raise UnknownNameError("init of LoRA", str(self.init), get_args(Init))
        if not 0 <= self.dropout < 1:
            raise InputError(f"a dropout of {self.dropout} is out of range: it is at least 0 and below 1.")
        targets = self.targets if self.targets is not None else default_targets(sites)
        chosen = choose_sites(sites, targets, self.kinds)
        chosen = [site for site in chosen if self.layers is None or site.layer in self.layers]
        if not chosen:
            raise InputError(f"none of the targets {', '.join(targets)} lies in the layers {self.layers}.")
        self._check_keys_of_parts(chosen)
        whole = choose_sites(sites, self.modules_to_save, ("linear", "conv", "embedding", "norm"))
        unfrozen = {name: shape for site in whole for name, shape in site.parameters.items()}
        with_bias = {"none": [], "all": sites, "lora_only": chosen}[self.bias]
        unfrozen |= _biases(with_bias)
        together = self._sharing(chosen)
        return AdapterPlan(tuple(self._addition(site, together.get(site.name, [site])) for site in chosen), unfrozen)

    def _sharing(self, chosen: Sequence[Site]) -> dict[str, list[Site]]:
        """By the name of a site those that share its A, itself among them, in the order of their group."""
        together: dict[str, list[Site]] = {}
        for group in self.share:
            if isinstance(group, str):
                raise InputError(f"share is a list of groups, not {group!r}.", fix='Such as [["attn.q", "attn.v"]].')
            sites = list(dict.fromkeys(s for target in group for s in choose_sites(chosen, [target], ("linear",))))
            layers = [[site for site in sites if site.layer == layer] for layer in {site.layer: None for site in sites}]
            if all(len(layer) == 1 for layer in layers) or any(site.name in together for site in sites):
                raise InputError(f"{', '.join(group)} share no A: a group has several targets, and each is in one.")
            together |= {site.name: layer for layer in layers for site in layer}
        for sites in together.values():
            if len({(site.shape[1], self.rank(site)) for site in sites}) > 1:
                names = ", ".join(site.name for site in sites)
                raise InputError(f"{names} can not share an A: they differ in their inputs or ranks.")
        return together

    def _addition(self, site: Site, together: Sequence[Site]) -> Addition:
        """Of a site that shares its A with those in ``together``; the first of them has it."""
        shapes = self._shapes(site, together)
        if site == together[0]:
            return Addition(site, shapes)
        return Addition(site, {k: s for k, s in shapes.items() if k != "lora_A"}, {"lora_A": together[0].name})

    def _check_keys_of_parts(self, chosen: Sequence[Site]) -> None:
        for key, ranks in self.parts.items():
            if not isinstance(ranks, tuple | list) or not ranks:
                raise InputError(
                    f"parts of {key!r} are {ranks!r}, and should be a rank for each.", fix="Such as (8, 0, 8)."
                )
            if not any(by_pattern({key: True}, site.name, False) for site in chosen):
                roles = ", ".join(dict.fromkeys(site.role for site in chosen))
                raise InputError(f"parts has the key {key!r}, which names none of the targets: {roles}.")

    def _shapes(self, site: Site, together: Sequence[Site]) -> Shapes:
        special = {
            "dora": self.dora and len(together) == 1,
            "pissa": self.init == "pissa",
            "parts": bool(self.part_ranks(site)),
            "a shared A": len(together) > 1,
        }
        methods = [name for name, is_wanted in special.items() if is_wanted]
        if methods and site.kind != "linear":
            raise InputError(
                f"{methods[0]} takes linears, and {site.name} is of the kind {site.kind}.", fix="Leave it out."
            )
        if len(methods) > 1:
            raise InputError(f"{site.name} can not have both {methods[0]} and {methods[1]}.", fix="Leave one out.")
        if self.init == "pissa" and self.scaling(site) <= 0:
            raise InputError(f"pissa needs an alpha above 0, and {site.name} is scaled by {self.scaling(site)}.")
        return self._part_shapes(site) if self.part_ranks(site) else self._plain_shapes(site, together)

    def _part_shapes(self, site: Site) -> Shapes:
        ranks, (d_out, d_in) = self.part_ranks(site), site.shape
        if d_out % len(ranks):
            raise InputError(f"the {d_out} outputs of {site.name} can not be divided into {len(ranks)} equal parts.")
        width = d_out // len(ranks)
        if min(ranks) < 0 or not any(ranks):
            raise InputError(f"ranks of {ranks} at {site.name} are out of range: none is below 0, and one is above.")
        if max(ranks) > min(width, d_in):
            raise InputError(
                f"a rank of {max(ranks)} is too large for a part of {site.name}, which has {d_in} inputs and {width} "
                "outputs.",
                fix=f"Take {min(width, d_in)} or less.",
            )
        return {"lora_A": (sum(ranks), d_in), "lora_B": (width, sum(ranks))}

    def _plain_shapes(self, site: Site, together: Sequence[Site]) -> Shapes:
        rank, (d_out, d_in) = self.rank(site), (site.shape[0], prod(site.shape[1:]))
        if rank < 1:
            raise InputError(f"a rank of {rank} is out of range: it is at least 1.")
        most = min(sum(one.shape[0] for one in together), d_in)
        if rank > most:
            what = f"{site.name}, which has {d_in} inputs and {d_out} outputs"
            raise InputError(f"a rank of {rank} is too large for {what}.", fix=f"Take r={most} or less.")
        magnitude: Shapes = {"lora_magnitude": (d_out,)} if self.dora else {}
        if site.kind == "embedding":
            return {"lora_A": (rank, d_out), "lora_B": (d_in, rank)}
        if site.kind == "conv":
            kernel = site.shape[1:]
            return {"lora_A": (rank, *kernel), "lora_B": (d_out, rank, *(1 for _ in kernel[1:]))}
        return {"lora_A": (rank, d_in), "lora_B": (d_out, rank), **magnitude}


def default_targets(sites: Sequence[Site]) -> tuple[str, ...]:
    """Queries and values where roles are known, else every linear."""
    roles = {site.role for site in sites}
    return ("attn.q", "attn.v") if {"attn.q", "attn.v"} <= roles else (ALL_LINEAR,)


def by_pattern(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first key, a regular expression, that the name ends in from the start of a component (PEFT)."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _biases(sites: Sequence[Site]) -> Shapes:
    return {name: shape for site in sites for name, shape in site.parameters.items() if name.endswith(".bias")}


@dataclass(frozen=True)
class IA3Options:
    """Options of (IA)^3 (arXiv 2205.05638): learned factors.

    Attributes:
        targets: linears whose outputs are scaled.
        feedforward: linears whose inputs are scaled instead, also where ``targets`` names them too.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("linear",)
    targets: tuple[str, ...] = ("attn.k", "attn.v")
    feedforward: tuple[str, ...] = ("mlp.down",)

    def plan(self, sites: Sequence[Site]) -> AdapterPlan:
        """A factor for every output, or input, of the targets.

        Raises:
            UnknownNameError: a target names no linear.
        """
        inside = choose_sites(sites, self.feedforward, ("linear",))
        outside = [site for site in choose_sites(sites, self.targets, ("linear",)) if site not in inside]
        outputs = [Addition(site, {"ia3_output": site.shape[:1]}) for site in outside]
        return AdapterPlan((*outputs, *(Addition(site, {"ia3_input": site.shape[1:]}) for site in inside)))


@dataclass(frozen=True)
class LLaMAAdapterOptions:
    """Options of LLaMA-Adapter v1 (arXiv 2303.16199).

    Attributes:
        prompt_length: P, learned vectors per layer.
        layers: so many of the topmost layers have prompts; ``None``: all but the first two.
        gate: what bounds the gate: ``tanh`` as in the paper's code, ``linear`` as in LitGPT and PEFT.
        gate_per: a gate for each ``head``, or one for the ``layer``.
        place: where the result is added: to the heads' results, ``before_projection``, or as PEFT does on GPT-2 to
            the layer's, ``after_projection``, unprojected.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("attention",)
    prompt_length: int = 10
    layers: int | None = None
    gate: Literal["tanh", "linear"] = "tanh"
    gate_per: Literal["head", "layer"] = "head"
    place: Literal["before_projection", "after_projection"] = "before_projection"

    def plan(self, sites: Sequence[Site]) -> AdapterPlan:
        """Prompts (P, D) and gates at the topmost attention layers.

        Raises:
            InputError: the model has no attention sites, or a number is out of range.
        """
        return AdapterPlan(tuple(self._prompts(sites)))

    def _prompts(self, sites: Sequence[Site]) -> Iterator[Addition]:
        attention = [site for site in sites if site.kind == "attention"]
        if not attention:
            raise InputError(
                "LLaMA-Adapter needs attention layers that prompts can enter, and this model shows none.",
                fix="Give its attention module a method attention_site(): see zoo.adapters.base.AttentionSite.",
            )
        n_layers = max(1, len(attention) - 2) if self.layers is None else self.layers
        if not 1 <= n_layers <= len(attention) or self.prompt_length < 1:
            raise InputError(
                f"prompts of {self.prompt_length} vectors in {n_layers} layers are out of range: at least 1, and at "
                f"most the model's {len(attention)} layers."
            )
        for site in last_layers(attention, n_layers):
            width, n_heads = site.shape
            gates = n_heads if self.gate_per == "head" else 1
            yield Addition(site, {"prompt": (self.prompt_length, width), "gate": (gates,)})


@dataclass(frozen=True)
class LLaMAAdapterV2Options(LLaMAAdapterOptions):
    """Options of LLaMA-Adapter v2 (arXiv 2304.15010): v1, and a scale and a bias on linears, and trained norms.

    Attributes:
        targets: linears with a scale and a bias.
        scale_on: ``output``: s (W x + b), the paper's formula; ``input``: W (s x) + b, its released code.
        norms: which norms are trained: all, none, or those that roles, names, ends of names or globs name.
        prompts: whether there are prompts.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "norm", "attention")
    targets: tuple[str, ...] = (ALL_LINEAR,)
    scale_on: Literal["output", "input"] = "output"
    norms: bool | tuple[str, ...] = True
    prompts: bool = True

    def plan(self, sites: Sequence[Site]) -> AdapterPlan:
        """Scales, biases, prompts and norms.

        Raises:
            UnknownNameError: a target names no linear, or a name in ``norms`` no norm.
            InputError: as `LLaMAAdapterOptions.plan`, or ``norms`` is neither a bool nor names.
        """
        linears = choose_sites(sites, self.targets, ("linear",))
        side = 0 if self.scale_on == "output" else 1
        affine = [Addition(s, {"v2_scale": (s.shape[side],), "v2_bias": s.shape[:1]}) for s in linears]
        prompts = list(self._prompts(sites)) if self.prompts else []
        return AdapterPlan(tuple(affine + prompts), _norms(self._trained_norms(sites)))

    def _trained_norms(self, sites: Sequence[Site]) -> Sequence[Site]:
        if isinstance(self.norms, bool):
            return sites if self.norms else ()
        if not isinstance(self.norms, tuple | list):
            raise InputError(f"norms are True, False or a list of names, not {self.norms!r}.")
        return choose_sites(sites, self.norms, ("norm",))


def _norms(sites: Sequence[Site]) -> Shapes:
    return {name: shape for site in sites if site.kind == "norm" for name, shape in site.parameters.items()}


@dataclass(frozen=True)
class FullOptions:
    """Options of full finetuning: everything trains."""

    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv", "embedding", "norm")

    def plan(self, sites: Sequence[Site]) -> AdapterPlan:
        """All parameters of all sites."""
        return AdapterPlan((), {name: shape for site in sites for name, shape in site.parameters.items()})


@dataclass(frozen=True)
class BitFitOptions:
    """Options of BitFit (arXiv 2106.10199): the biases train."""

    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv", "norm")

    def plan(self, sites: Sequence[Site]) -> AdapterPlan:
        """All biases.

        Raises:
            InputError: the model has none.
        """
        biases = _biases(sites)
        if not biases:
            raise InputError("bitfit trains biases, and this model has none.", fix="Take lora, or norm.")
        return AdapterPlan((), biases)


@dataclass(frozen=True)
class NormOptions:
    """Options of norm tuning (arXiv 2312.11420): the norms train."""

    kinds: ClassVar[tuple[Kind, ...]] = ("norm",)

    def plan(self, sites: Sequence[Site]) -> AdapterPlan:
        """All parameters of all norms.

        Raises:
            InputError: the model has none.
        """
        norms = _norms(sites)
        if not norms:
            raise InputError("norm trains the parameters of norms, and this model has none.", fix="Take lora.")
        return AdapterPlan((), norms)
