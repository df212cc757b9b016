"""``zoo prepare DATA``: check, count and split data for training; running text becomes token files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli.app import App, ZooCommand, json_option, note, pass_app, print_json
from zoo.errors import InputError

if TYPE_CHECKING:
    from zoo.data.corpus import CorpusReport
    from zoo.data.encode import EncodingReport
    from zoo.data.load import DataSource, LoadedData
    from zoo.data.prepare import PreparedSamples
    from zoo.text.samples import Encoded
    from zoo.text.tokenizer import Tokenizer

_ONLY_SAMPLES = {
    "prompt_style": "--prompt-style",
    "max_seq_len": "--max-seq-len",
    "train_on_prompt": "--train-on-prompt",
}
_SHOWN_CHARACTERS = 2000


@click.command(cls=ZooCommand)
@click.argument("data")
@click.option("--model", metavar="MODEL", help="Count tokens as this model sees them; its tokenizer and chat template.")
@click.option("--tokenizer", metavar="DIR", help="A directory with a tokenizer, byte, or char.")
@click.option("--train-bpe", type=int, metavar="SIZE", help="Train a byte-level BPE of so many tokens on the text.")
@click.option("--prompt-style", metavar="NAME", help="See: zoo list prompts. [default: the model's chat template]")
@click.option("--train-on-prompt", is_flag=True, help="Learn prompts too, not only what the assistant says.")
@click.option("--max-seq-len", type=int, help="Longest sample, in tokens. [default: the model's context]")
@click.option(
    "--val-fraction", type=float, help="Held out. [default: 0.05 of samples by hash, the last 0.1 of a corpus]"
)
@click.option("--seed", type=int, help="Of the split by hash. [default: 0]")
@click.option("--column", multiple=True, metavar="NAME=YOURS", help="Read your column as NAME: prompt=question.")
@click.option("--text", "as_text", is_flag=True, help="Running text: make token files, as of *.txt.")
@click.option("--out", type=click.Path(path_type=Path), help="[default: data/NAME]")
@click.option("--token", envvar="HF_TOKEN", help="Access token for gated data. [env: HF_TOKEN]")
@click.option("--offline", is_flag=True, envvar="HF_HUB_OFFLINE", help="Never download. [env: HF_HUB_OFFLINE]")
@json_option
@pass_app
def command(app: App, /, data: str, **given: Any) -> None:
    """Check, count and split data for training.

    DATA is a name (zoo list datasets), a file or directory (JSON, JSONL, CSV, TSV, Parquet, text), hf:org/name or
    https://... Examples become train.jsonl and val.jsonl, running text becomes train.bin and val.bin.
    """
    from zoo.data.load import datasets_directory, resolve_data
    from zoo.sources.base import FetchOptions

    if sum(given[name] is not None for name in ("model", "tokenizer", "train_bpe")) > 1:
        raise InputError("give one of --model, --tokenizer and --train-bpe.")
    columns = _columns(given["column"])
    fetch = FetchOptions(token=given["token"], offline=given["offline"])
    source = resolve_data(data, app.registry, options=fetch, report=note)
    out: Path = given["out"] or datasets_directory() / source.name
    _check_split(source, given)
    if source.is_corpus or given["as_text"]:
        _corpus(app, source, out, columns, given, fetch)
    else:
        _samples(app, source, out, columns, given, fetch)


def _check_split(source: DataSource, given: dict[str, Any]) -> None:
    """Refuse options of a split that is not made."""
    if source.validation is not None and (given["val_fraction"] is not None or given["seed"] is not None):
        raise InputError(
            f"{source.name} has a validation set of its own, so --val-fraction and --seed have no meaning.",
            fix="Leave them out; or give the file of the training set alone.",
        )
    if given["seed"] is not None and (source.is_corpus or given["as_text"]):
        raise InputError("the end of a text is held out, so --seed has no meaning.", fix="Leave it out.")
    if given["column"] and source.is_corpus and source.files:
        raise InputError("a text has no columns, so --column has no meaning.", fix="Leave it out.")


def _columns(given: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for name, _, theirs in pairs:
        if not name or not theirs:
            raise InputError(f"--column is NAME=YOURS, such as prompt=question, not {name + theirs!r}.")
    return {name: theirs for name, _, theirs in pairs}


def _samples(
    app: App, source: DataSource, out: Path, columns: dict[str, str], given: dict[str, Any], fetch: Any
) -> None:
    from zoo.data.load import load_samples
    from zoo.data.prepare import prepare_samples, read_tokenizer
    from zoo.text.prompts import choose_prompt_style

    if given["train_bpe"] is not None or given["tokenizer"] == "char":
        raise InputError("a tokenizer is made from running text.", fix="Add --text, or name a model or a tokenizer.")
    fraction = 0.05 if given["val_fraction"] is None else given["val_fraction"]
    seed = given["seed"] or 0
    loaded = load_samples(source, val_fraction=fraction, seed=seed, columns=columns)
    tokenizer, limit = _of_model(app, given["model"], fetch) if given["model"] else (None, None)
    if given["tokenizer"]:
        tokenizer = read_tokenizer(given["tokenizer"])
    style = None
    if tokenizer is not None:
        is_plain = loaded.format in ("completion", "text")
        style = choose_prompt_style(given["prompt_style"], tokenizer, app.registry, plain=is_plain)
    elif unused := [flag for name, flag in _ONLY_SAMPLES.items() if given[name]]:
        raise InputError(f"{', '.join(unused)} needs a tokenizer to count with.", fix="Add --model or --tokenizer.")
    limit = given["max_seq_len"] or limit
    prepared = prepare_samples(
        source,
        loaded,
        out,
        tokenizer=tokenizer,
        style=style,
        max_seq_len=limit,
        train_on_prompt=given["train_on_prompt"],
        facts={"source": source.name, "seed": seed, "split": loaded.split, "license": source.license},
    )
    facts = {"style": style.name if style else None, "max_seq_len": limit}
    if given["as_json"]:
        print_json(_samples_facts(prepared, out, facts, tokenizer))
    else:
        _show_samples(prepared, out, facts, tokenizer)


def _corpus(
    app: App, source: DataSource, out: Path, columns: dict[str, str], given: dict[str, Any], fetch: Any
) -> None:
    from dataclasses import replace

    from zoo.data.prepare import corpus_tokenizer, prepare_corpus

    if unused := [flag for name, flag in _ONLY_SAMPLES.items() if given[name]]:
        raise InputError(f"{', '.join(unused)} has no meaning for running text.", fix="Leave it out.")
    source = replace(source, columns={**source.columns, **columns})
    if given["model"]:
        tokenizer, _ = _of_model(app, given["model"], fetch)
    else:
        tokenizer = corpus_tokenizer(given["tokenizer"], source, vocab_size=given["train_bpe"])
    fraction = 0.1 if given["val_fraction"] is None else given["val_fraction"]
    facts = {"source": source.name, "license": source.license, "tokenizer": tokenizer.fingerprint}
    report = prepare_corpus(source, tokenizer, out, val_fraction=fraction, facts=facts)
    if given["as_json"]:
        print_json({"path": str(out), "kind": "tokens", **report.to_dict()})
    else:
        _show_corpus(report, out)


def _of_model(app: App, model: str, fetch: Any) -> tuple[Tokenizer, int]:
    """The tokenizer and the context of a model."""
    from zoo.cli.torch_process import import_torch

    import_torch()
    from zoo.api import checkpoints_directory
    from zoo.convert.load import open_checkpoint
    from zoo.sources.resolve import resolve_model

    found = resolve_model(model, app.registry, checkpoints=checkpoints_directory(), options=fetch, report=note)
    checkpoint = open_checkpoint(found.path, app.registry)
    return checkpoint.load_tokenizer(), checkpoint.spec.max_seq_len


def _samples_facts(
    prepared: PreparedSamples, out: Path, facts: dict[str, Any], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    from zoo.data.audit import bos_eos_audit, masked_text

    loaded, first = prepared.loaded, prepared.first
    found: dict[str, Any] = {
        "path": str(out),
        "kind": "samples",
        "format": loaded.format,
        "train": len(loaded.train),
        "validation": len(loaded.validation),
        "split": loaded.split,
        "ignored_columns": list(loaded.ignored),
        "without_reply": loaded.n_without_reply,
        "duplicates": loaded.n_duplicates,
        "prompt_style": facts["style"],
        "max_seq_len": facts["max_seq_len"],
    }
    if prepared.encoding is not None and first is not None and tokenizer is not None:
        found["encoding"] = prepared.encoding.to_dict()
        found["first_sample"] = [{"text": text, "learnt": learnt} for text, learnt in masked_text(first, tokenizer)]
        found["problems"] = bos_eos_audit(first, tokenizer).problems(tokenizer)
    return found


def _show_samples(prepared: PreparedSamples, out: Path, facts: dict[str, Any], tokenizer: Tokenizer | None) -> None:
    from zoo.data.audit import bos_eos_audit

    _show_loaded(prepared.loaded)
    if prepared.encoding is not None and prepared.first is not None and tokenizer is not None:
        _show_encoding(prepared.encoding, facts)
        click.echo("the first sample (learnt: green, or in [[ ]]):")
        click.echo(_painted(prepared.first, tokenizer))
        for problem in bos_eos_audit(prepared.first, tokenizer).problems(tokenizer):
            note(problem)
    click.echo(f"{out}: train.jsonl" + (", val.jsonl" if prepared.loaded.validation else ""))


def _show_loaded(loaded: LoadedData) -> None:
    total = len(loaded.train) + len(loaded.validation)
    click.echo(f"{total:,} samples of the format {loaded.format}")
    click.echo(f"split: {len(loaded.train):,} to train on, {len(loaded.validation):,} to validate ({loaded.split})")
    if loaded.ignored:
        click.echo(f"columns that are not used: {', '.join(loaded.ignored)}")
    if loaded.n_duplicates:
        click.echo(f"{loaded.n_duplicates:,} occur more than once; copies are on the same side of the split")
    if loaded.n_without_reply:
        click.echo(f"{loaded.n_without_reply:,} left out: the assistant says nothing in them")


def _show_encoding(report: EncodingReport, facts: dict[str, Any]) -> None:
    limit = f"at most {facts['max_seq_len']:,} each" if facts["max_seq_len"] else "of any length"
    click.echo(
        f"{report.n_tokens:,} tokens in the style {facts['style']}, {limit}; "
        f"{report.n_supervised:,} of them are learnt ({report.n_supervised / report.n_tokens:.0%})"
    )
    click.echo(
        f"truncated: {report.n_truncated:,} samples lose {report.n_cut:,} tokens; the longest has {report.longest:,}"
    )
    if report.n_masked:
        click.echo(f"{report.n_masked:,} left out: nothing that is learnt fits")
    if report.n_pieces > report.n_kept:
        click.echo(f"texts longer than that were cut into pieces: {report.n_pieces:,} in all")
    if report.n_straddling:
        note(f"{report.n_straddling:,} replies begin inside a token: does the prompt end in a space?")


def _painted(first: Encoded, tokenizer: Tokenizer) -> str:
    """The sample, what is learnt in green; without a terminal, in brackets."""
    from zoo.data.audit import masked_text

    in_colour = sys.stdout.isatty()
    painted, room = "", _SHOWN_CHARACTERS
    for text, learnt in masked_text(first, tokenizer):
        shown = text[:room] + ("..." if len(text) > room else "")
        room -= len(shown)
        painted += (click.style(shown, fg="green") if in_colour else f"[[{shown}]]") if learnt else shown
        if room <= 0:
            break
    return painted


def _show_corpus(report: CorpusReport, out: Path) -> None:
    n_tokens = report.n_train + report.n_validation
    per_token = f"{report.n_characters / n_tokens:.2f} characters each"
    click.echo(
        f"{report.n_documents:,} documents, {report.n_characters:,} characters, {n_tokens:,} tokens ({per_token})"
    )
    between = "EOS after each document" if report.eos else "nothing between documents: the tokenizer has no EOS"
    click.echo(f"{report.vocab_size:,} tokens in the vocabulary, stored as {report.dtype}; {between}")
    validation = f", val.bin ({report.n_validation:,})" if report.n_validation else ""
    click.echo(f"{out}: train.bin ({report.n_train:,}){validation}, tokenizer.json")
