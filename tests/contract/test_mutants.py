"""The contracts can fail: each of these mutants has one thing wrong, and the check that is meant for it says so."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.contract.mutation import TABLE, Mutant, assert_caught, failure_of
from tests.contract.test_builtin import Logits, by_transformers
from tests.plugin_lab import PluginLab, lab_on_path
from zoo.convert.base import Checkpoint
from zoo.plugins import load_zoo
from zoo.spec import ModelSpec
from zoo.testing import (
    CONTRACTS,
    AttentionContract,
    CommandContract,
    Contract,
    ConverterContract,
    DatasetContract,
    FamilyContract,
    LoggerContract,
    PluginContract,
    PrecisionContract,
    PromptContract,
    QuantizerContract,
    SamplerContract,
    SourceContract,
)
from zoo.testing.builtin import Temperature, TopK
from zoo.testing.models import shrunk
from zoo.testing.source import FILES


def _mutants(table: Mapping[str, tuple[str, str]], **settings: Any) -> list[Any]:
    """Rows of a table: name of the mutant, its target, the checks that must fail."""
    return [
        pytest.param(Mutant(name, target, tuple(checks.split()), settings), id=name.replace(" ", "-"))
        for name, (target, checks) in table.items()
    ]


ATTENTION = {
    "leaky mask": ("LeakyMask", "test_the_future_does_not_leak test_results"),
    "top-left causal alignment": ("TopLeft", "test_queries_are_the_last_of_the_keys test_decoding_with_a_cache"),
    "window one too wide": ("WiderWindow", "test_every_mask"),
    "window one too narrow": ("NarrowerWindow", "test_every_mask"),
    "softcap ignored": ("NoSoftcap", "test_softcap"),
    "GQA heads mixed": ("MixedHeads", "test_grouped_heads test_decoding_with_a_cache"),
    "scale ignored": ("OwnScale", "test_scale"),
    "mask dropped": ("MaskDropped", "test_results test_the_future_does_not_leak"),
    "documents ignored": ("DocumentsIgnored", "test_every_mask test_longer_than_a_block"),
    "padding ignored": ("PaddingIgnored", "test_every_mask test_nothing_visible_is_zero"),
    "prefix ignored": ("PrefixIgnored", "test_every_mask"),
    "queries scaled in place": ("WritesInPlace", "test_inputs_are_not_changed"),
    "views read as if whole": ("ReadsViewsWrongly", "test_inputs_are_not_changed"),
    "NaN where nothing is seen": ("NotANumber", "test_nothing_visible_is_zero"),
    "result always float32": ("AlwaysFloat32", "test_half_precision"),
    "bfloat16 inside": ("HalfInside", "test_results"),
    "keys without gradient": ("KeysDetached", "test_gradients"),
    "dropout ignored": ("DropoutIgnored", "test_dropout"),
    "dropout not rescaled": ("DropoutUnscaled", "test_dropout"),
    "claims a softcap that fails": ("ClaimsTooMuch", "test_softcap"),
    "refused dropout is left out": ("RefusesSilently", "test_dropout"),
    "reasons are None": ("ReasonIsNone", "test_supports_gives_reasons"),
    "cache written one late": ("CacheOneLate", "test_decoding_with_a_cache"),
}


@pytest.mark.parametrize("mutant", _mutants(ATTENTION))
def test_attention(mutant: Mutant, tmp_path: Path) -> None:
    assert_caught(AttentionContract, "attention", mutant, tmp_path)


def _llama(self: Contract) -> ModelSpec:
    return shrunk(self.registry().model("llama-2-7b").spec)


def _reference(self: FamilyContract, directory: Path) -> Logits:
    return by_transformers(directory)


FAMILY = {
    "two keys swapped": ("KEYS_SWAPPED", "test_the_reference_agrees"),
    "a transposed weight": ("TRANSPOSED", "test_the_reference_agrees"),
    "a line of the map missing": ("LINE_MISSING", "test_the_key_map_is_a_bijection test_a_directory_comes_back"),
    "unknown tensors ignored": ("EXTRA_IGNORED", "test_missing_and_unexpected_tensors_are_named"),
    "missing tensors ignored": ("MISSING_IGNORED", "test_missing_and_unexpected_tensors_are_named"),
    "unknown keys ignored": ("KEY_DROPPED", "test_an_unknown_key_is_refused"),
    "a field lost in the config": ("FIELD_LOST", "test_the_config_says_all_of_the_spec"),
    "model type not matched": ("TYPE_UNMATCHED", "test_it_is_found_by_its_model_type"),
    "a token sees later ones": ("LEAKY", "test_the_future_does_not_leak test_cached_equals_uncached"),
    "a parameter without effect": ("SILENT", "test_every_parameter_learns"),
}


@pytest.mark.parametrize("mutant", _mutants(FAMILY, make_spec=_llama, make_reference=_reference))
def test_family(mutant: Mutant, tmp_path: Path) -> None:
    assert_caught(FamilyContract, "family", mutant, tmp_path)


def _as_hugging_face(self: ConverterContract, directory: Path, source: Checkpoint) -> Path:
    from zoo.convert.export import export_model

    export_model(source, directory / "written")
    return directory / "written"


CONVERTER = {
    "two keys swapped on reading": ("KeysSwapped", "test_values_come_back_to_the_bit"),
    "a weight transposed on reading": ("Transposed", "test_values_come_back_to_the_bit"),
    "values rounded": ("Rounded", "test_values_come_back_to_the_bit"),
    "another dtype than the header says": ("HeaderLies", "test_shapes_are_told_by_the_header"),
    "names not compared": ("IgnoresNames", "test_a_missing_tensor_is_named test_an_unexpected_tensor_is_named"),
    "claims every path": ("ReadsAll", "test_it_knows_its_files"),
    "claims no path": ("ReadsNone", "test_it_knows_its_files"),
    "a cut file filled with zeros": ("Mends", "test_a_truncated_file_is_refused"),
    "another tokenizer": ("OtherTokenizer", "test_the_tokenizer_comes_along"),
    "the rotary base halved": ("SpecDrifts", "test_the_model_is_the_same"),
}


@pytest.mark.parametrize("mutant", _mutants(CONVERTER, make_file=_as_hugging_face))
def test_converter(mutant: Mutant, tmp_path: Path) -> None:
    assert_caught(ConverterContract, "converter", mutant, tmp_path)


QUANTIZER = {
    "scale wrong": ("WrongScale", "test_the_error"),
    "one scale for all rows": ("OneScale", "test_rows_do_not_depend_on_each_other test_the_error"),
    "outliers clipped": ("Clipped", "test_the_error"),
    "NaN for zeros": ("NotANumber", "test_the_error"),
    "saves nothing": ("SavesNothing", "test_what_is_stored"),
    "bias dropped": ("BiasDropped", "test_the_bias_stays"),
    "kernel of another weight": ("OtherKernel", "test_products"),
    "scale left out of the state": ("NotStored", "test_it_is_stored_and_read"),
    "no gradient for the input": ("NoGradient", "test_gradients_pass_through"),
    "the base is trained": ("Trained", "test_gradients_pass_through"),
    "reasons are a bool": ("NoReasons", "test_supports_gives_reasons"),
}


@pytest.mark.parametrize("mutant", _mutants(QUANTIZER))
def test_quantizer(mutant: Mutant, tmp_path: Path) -> None:
    assert_caught(QuantizerContract, "quantizer", mutant, tmp_path)


PRECISION = {
    "another name": ("OTHER_NAME", "test_it_says_what_it_is"),
    "integer weights": ("INTEGERS", "test_it_says_what_it_is"),
    "double weights": ("DOUBLE", "test_it_says_what_it_is"),
    "neither trains nor runs": ("USELESS", "test_it_is_of_use"),
    "a reason that is a string": ("STRING", "test_it_says_what_it_is"),
    "no device at all": ("NOWHERE", "test_it_is_of_use"),
}


@pytest.mark.parametrize("mutant", _mutants(PRECISION))
def test_precision(mutant: Mutant, tmp_path: Path) -> None:
    assert_caught(PrecisionContract, "precision", mutant, tmp_path)


PROMPT = {
    "double BOS": ("DOUBLE_BOS", "test_one_bos"),
    "label mask ends early": ("MASK_EARLY", "test_a_reply_ends"),
    "label mask begins late": ("MASK_LATE", "test_what_is_learnt_is_the_reply"),
    "the question is learnt": ("QUESTION_LEARNT", "test_what_is_learnt_is_the_reply test_it_asks_as_it_has_taught"),
    "nothing ends a reply": ("NO_END", "test_a_reply_ends"),
    "another end than it stops at": ("OTHER_END", "test_a_reply_ends"),
    "asks otherwise than it taught": ("ASKS_OTHERWISE", "test_it_asks_as_it_has_taught"),
    "the question is altered": ("CUTS", "test_the_question_is_told_as_it_is"),
    "earlier turns are forgotten": ("FORGETS", "test_a_conversation"),
    "another name": ("OTHER_NAME", "test_it_is_a_style"),
}


@pytest.mark.parametrize("mutant", _mutants(PROMPT))
def test_prompt(mutant: Mutant, tmp_path: Path) -> None:
    assert_caught(PromptContract, "prompt", mutant, tmp_path)


SAMPLER = {
    "greedy is not greedy": ("Inverted", "test_greedy_is_greedy"),
    "seed ignored": ("OwnSeed", "test_it_is_a_function test_the_seed_is_respected test_greedy_is_greedy"),
    "draws from torch's seed": ("TorchsSeed", "test_it_is_a_function"),
    "logits changed in place": ("InPlace", "test_inputs_are_not_changed"),
    "excluded tokens come back": ("Revives", "test_masked_tokens_stay_masked"),
    "remembers earlier calls": ("Remembers", "test_it_is_a_function"),
    "no token left": ("Empties", "test_the_interface"),
    "a part of the vocabulary": ("Short", "test_the_interface"),
}


@pytest.mark.parametrize("mutant", _mutants(SAMPLER))
def test_sampler(mutant: Mutant, tmp_path: Path) -> None:
    assert_caught(SamplerContract, "sampler", mutant, tmp_path)


@pytest.mark.parametrize(
    "mutant",
    [
        Mutant("keeps one too many", "OneMore", ("test_it_is_as_expected",), contract=TopK),
        Mutant("multiplies by the temperature", "Multiplies", ("test_it_is_as_expected",), contract=Temperature),
    ],
    ids=["one-more", "multiplies"],
)
def test_sampler_against_its_definition(mutant: Mutant, tmp_path: Path) -> None:
    assert_caught(SamplerContract, "sampler", mutant, tmp_path)


def _read_back(self: LoggerContract, run: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = [json.loads(line) for line in (run / "mutant.jsonl").read_text().splitlines()]
    return [(row.pop("step"), row) for row in rows]


LOGGER = {
    "kills the run": ("Kills", "test_an_exception_does_not_end_the_run"),
    "takes finite numbers alone": ("TakesNumbersOnly", "test_a_run_is_logged"),
    "prints": ("Prints", "test_standard_output_is_for_results"),
    "changes the values": ("Changes", "test_values_are_not_changed"),
    "draws random numbers": ("Draws", "test_the_run_stays_reproducible"),
    "writes beside the run": ("Elsewhere", "test_it_stays_in_the_run"),
    "drops every second step": ("Drops", "test_what_was_logged_is_there"),
    "loses the last line": ("LosesTheLast", "test_what_was_logged_is_there"),
}


@pytest.mark.parametrize("mutant", _mutants(LOGGER, logged=_read_back))
def test_logger(mutant: Mutant, tmp_path: Path) -> None:
    assert_caught(LoggerContract, "logger", mutant, tmp_path)


def _directory(self: SourceContract, files: Mapping[str, bytes], directory: Path) -> str:
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return str(directory)


SOURCE = {
    "the last byte is lost": ("cuts", "test_it_brings_the_bytes"),
    "another digest is promised": ("promises", "test_it_brings_the_bytes"),
    "a path escapes": ("escapes", "test_it_stays_in_its_directory"),
    "nothing is something": ("empty", "test_what_is_not_there test_a_malformed_address"),
    "goes on from the beginning": ("doubles", "test_it_goes_on_after_a_kill"),
    "half a file is taken for whole": ("trusts", "test_it_goes_on_after_a_kill"),
}


@pytest.mark.parametrize("mutant", _mutants(SOURCE, make_address=_directory))
def test_source(mutant: Mutant, tmp_path: Path) -> None:
    assert set(FILES) == {"config.json", "model.safetensors"}
    assert_caught(SourceContract, "source", mutant, tmp_path)


def _rows(self: DatasetContract, directory: Path) -> Path:
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}.", "note": ""} for n in range(20)]
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


DATASET = {
    "no licence": ("NO_LICENSE", "test_it_says_what_it_is"),
    "no digest": ("NO_DIGEST", "test_it_says_where_it_is"),
    "a scheme that nobody reads": ("NOBODY_READS_IT", "test_it_says_where_it_is"),
    "a column that is not there": ("OTHER_COLUMN", "test_every_row_is_read"),
    "one column for two": ("ONE_COLUMN_TWICE", "test_it_says_what_it_is"),
}


@pytest.mark.parametrize("mutant", _mutants(DATASET, make_rows=_rows))
def test_dataset(mutant: Mutant, tmp_path: Path) -> None:
    assert_caught(DatasetContract, "dataset", mutant, tmp_path)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[PluginLab]:
    with lab_on_path(tmp_path / "lab") as lab:
        yield lab


COMMAND = """
{before}
import click
from zoo.cli.app import ZooCommand

@click.command({cls})
@click.option("--json", "as_json", is_flag=True)
def command(as_json: bool) -> None:
    \"\"\"Say something.\"\"\"
    {body}
"""
REGISTER = """ZOO_API = 1
@hookimpl
def zoo_register_commands(register):
    register('mutant', 'mutants.kernel:command', help='h')
"""
COMMANDS = {
    "help imports torch": ({"before": "import torch"}, "test_help_is_quick"),
    "no standard options": ({"cls": ""}, "test_it_has_the_standard_options"),
    "fails": ({"body": "raise SystemExit(3)"}, "test_it_works"),
    "JSON with a greeting": ({"body": "click.echo('hello'); click.echo('{}')"}, "test_it_works"),
    "its own exit code for usage": (
        {"before": "import sys\nif '--an-option-that-no-command-has' in sys.argv: sys.exit(1)"},
        "test_a_wrong_option_is_the_users_fault",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name: str, lab: PluginLab, tmp_path: Path) -> None:
    changes, check = COMMANDS[name]
    good = {"before": "", "cls": "cls=ZooCommand", "body": "click.echo('{}')"}
    lab.install("mutants", REGISTER, files={"mutants/kernel.py": COMMAND.format(**(good | changes))})
    registry = load_zoo().registry
    attributes = {
        "component": "mutant",
        "arguments": (),
        "registry": lambda self: registry,
        "environment": lambda self: {"PYTHONPATH": f"{lab.root}:{Path(__file__).parents[2]}"},
    }
    contract = type("Mutated", (CommandContract,), attributes)()
    said = failure_of(contract, check, tmp_path / "here")
    assert said is not None, f"{check} does not catch it"
    TABLE.append(("command", name, check, said))


PLUGINS = {
    "registers nothing": ("ZOO_API = 1\n", "test_registration"),
    "raises": ("raise ValueError('no')\n", "test_registration"),
    "does not say its version": ("", "test_it_says_its_version_of_the_hooks"),
    "changes the path": (
        "import sys\nZOO_API = 1\nsys.path.append('/mutant')\n",
        "test_importing_it_changes_nothing",
    ),
    "sleeps": ("ZOO_API = 1\nimport time; time.sleep(0.4)\n", "test_it_is_quick"),
    "needs something and gives no remedy": ("ZOO_API = 1\nREQUIRES = ['not-there']\n", "test_a_remedy_is_given"),
    "options import numpy": ("ZOO_API = 1\nOPTIONS = 'mutants.options:Options'\n", "test_options_import_no_torch"),
}
HOOK = """
REQUIRES, OPTIONS = globals().get("REQUIRES", ()), globals().get("OPTIONS")
@hookimpl
def zoo_register_loggers(register):
    register("mutant", "mutants.kernel:Kernel", help="h", requires=REQUIRES, options=OPTIONS)
"""


@pytest.mark.parametrize("name", PLUGINS)
def test_plugin(name: str, lab: PluginLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, check = PLUGINS[name]
    hook = "" if name == "registers nothing" else HOOK
    options = "import numpy\nfrom dataclasses import dataclass\n@dataclass\nclass Options:\n    a: int = 1\n"
    lab.install("mutants", source + hook, files={"mutants/options.py": options})
    monkeypatch.setenv("PYTHONPATH", f"{lab.root}:{Path(__file__).parents[2]}")
    contract = type("Mutated", (PluginContract,), {"component": "mutants"})()
    said = failure_of(contract, check, tmp_path / "here")
    assert said is not None, f"{check} does not catch it"
    TABLE.append(("plugin", name, check, said))


KINDS: dict[str, Sequence[Any]] = {
    "attention": list(ATTENTION),
    "family": list(FAMILY),
    "converter": list(CONVERTER),
    "quantizer": list(QUANTIZER),
    "precision": list(PRECISION),
    "prompt": list(PROMPT),
    "sampler": list(SAMPLER),
    "logger": list(LOGGER),
    "source": list(SOURCE),
    "dataset": list(DATASET),
    "command": list(COMMANDS),
}


def test_there_is_a_mutant_of_every_kind() -> None:
    """Adapters have theirs in test_adapter_mutants."""
    assert KINDS.keys() | {"adapter"} == CONTRACTS.keys()
    assert sum(map(len, KINDS.values())) >= 40
