"""A key map is a bijection between what is stored and the model's parameters; one that is not says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from zoo.errors import FileFormatError, InputError, UnknownNameError, ZooError
from zoo.families.base import KeyMap
from zoo.families.llama import HF_KEYS as LLAMA_KEYS
from zoo.spec import ModelSpec, RopeSpec

SPEC = ModelSpec.from_dict(
    {"n_layers": 2, "d_model": 8, "n_heads": 2, "vocab_size": 11, "max_seq_len": 16, "norm": "rms", "norm_eps": 1e-5}
    | {"rope": {}}
)
LINES = [
    "wte                  embed.weight",
    "h.{i}.norm_1         blocks.{i}.attn_norm.weight",
    "h.{i}.qkv            blocks.{i}.attn.{q,k,v}.weight   rows",
    "h.{i}.out            blocks.{i}.attn.out.weight",
    "h.{i}.norm_2         blocks.{i}.mlp_norm.weight",
    "h.{i}.up             blocks.{i}.mlp.up.weight         transposed",
    "h.{i}.down           blocks.{i}.mlp.down.weight       transposed",
    "norm                 norm.weight",
    "head                 head.weight",
]


def key_map(*changes: tuple[str, str], ignore: tuple[str, ...] = ()) -> KeyMap:
    table = "\n".join(LINES)
    for old, new in changes:
        assert table.count(old) == 1
        table = table.replace(old, new)
    return KeyMap(table, ignore=ignore)


def test_every_parameter_has_one_rule() -> None:
    rules = key_map().rules(SPEC)
    assert [rule.stored for rule in rules][:4] == ["wte", "h.0.norm_1", "h.0.qkv", "h.0.out"]
    assert len({name for rule in rules for name in rule.ours}) == 1 + 2 * 8 + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((LINES[-1], ""), r"no line for head\.weight\."),
        (("mlp_norm", "mlp_nrom"), r"no line for blocks\.0\.mlp_norm\.weight, blocks\.1\.mlp_norm\.weight\."),
        ((LINES[-1], LINES[-1] + "\nhead2 norm.weight"), r"more than one line for norm\.weight\."),
        (("h.{i}.norm_2", "h.{i}.norm_1"), r"more than one line for the stored h\.0\.norm_1, h\.1\.norm_1\."),
        (("{q,k,v}", "{q,k,v,w}"), r"does not have: blocks\.0\.attn\.w\.weight, blocks\.1\.attn\.w\.weight\."),
    ],
)
def test_a_table_that_is_no_bijection_is_refused(change: tuple[str, str], message: str) -> None:
    """Guards against a parameter that is loaded as nothing and left out of what is exported."""
    with pytest.raises(ZooError, match=message):
        key_map(change, ignore=("head",)).rules(SPEC)


def test_one_tensor_for_all_heads() -> None:
    """Guards the order of heads in a stored tensor, and that there are fewer of them for keys."""
    spec = replace(SPEC, d_model=12, n_heads=4, n_kv_heads=2, d_head=3, qk_norm="heads", rope=RopeSpec(n_dims=2))
    lines = "".join(f"\nh.{{i}}.{x}_norm blocks.{{i}}.attn.{x}_norm.{{n}}.weight stacked" for x in "qk")
    rules = {rule.stored: rule for rule in key_map((LINES[-1], LINES[-1] + lines)).rules(spec)}
    assert [rules[f"h.1.{x}_norm"].stored_shape for x in "qk"] == [(4, 3), (2, 3)]
    rule = rules["h.1.k_norm"]
    assert rule.ours == ("blocks.1.attn.k_norm.0.weight", "blocks.1.attn.k_norm.1.weight")
    stored = torch.arange(6.0).view(2, 3)
    assert [part.tolist() for part in rule.split(stored)] == stored.tolist()
    assert torch.equal(rule.merge(rule.split(stored)), stored)


def test_names_of_what_a_table_knows() -> None:
    assert set(key_map().stored_names(SPEC)) == {rule.stored for rule in key_map().rules(SPEC)}
    assert key_map().stored_names(replace(SPEC, head_bias=True)) == key_map().stored_names(SPEC)


def test_a_parameter_that_the_spec_lacks_needs_no_line_and_one_that_it_has_does() -> None:
    key_map().rules(SPEC)
    with pytest.raises(ZooError, match=r"no line for head\.bias\."):
        key_map().rules(replace(SPEC, head_bias=True))
    plain = replace(SPEC, mlp="plain", rope=RopeSpec(n_dims=4))
    with pytest.raises(ZooError, match=r"no line for positions\.weight\."):
        key_map().rules(replace(plain, rope=None))
    assert len(LLAMA_KEYS.rules(replace(SPEC, mlp="gated", qkv_bias=True))) == 1 + 2 * 12 + 2


def test_a_malformed_line_and_an_unknown_transform_are_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"not 'h\.\{i\}\.norm_1'"):
        key_map((LINES[1], "h.{i}.norm_1"))
    with pytest.raises(UnknownNameError, match=r"no transform is named 'row'\. Did you mean 'rows'\?"):
        key_map(("   rows", " row"))


def test_a_file_that_has_other_names_is_told_both_ways() -> None:
    names = [rule.stored for rule in key_map().rules(SPEC)]
    assert set(key_map().locate(SPEC, names, "file")) == set(names)
    renamed = ["lm_head" if name == "head" else name for name in names]
    message = r"^file lacks 1 tensors of the model: head; it holds 1 tensors that the model lacks: lm_head\.$"
    with pytest.raises(FileFormatError, match=message):
        key_map().locate(SPEC, renamed, "file")
