"""``zoo chat MODEL``: talk with a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from zoo.cli.app import App, ZooCommand, note, pass_app
from zoo.cli.model_options import load_from_options, loading_options, make_samplers, print_stats, sampling_options
from zoo.cli.torch_process import import_torch
from zoo.errors import InputError

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /save FILE writes it, /exit leaves."


@click.command(cls=ZooCommand)
@click.argument("model")
@click.option("--prompt", help="Ask this one question, print the answer and leave.")
@click.option("--system", help="System message.")
@click.option("--chat-template", type=click.Path(path_type=Path), help="Jinja file to use as the model's template.")
@click.option("--max-new-tokens", type=int, help="Per answer. [default: what the context has room for]")
@sampling_options
@loading_options
@pass_app
def command(
    app: App,
    /,
    model: str,
    prompt: str | None,
    system: str | None,
    chat_template: Path | None,
    max_new_tokens: int | None,
    stop: tuple[str, ...],
    stats: bool,
    **options: Any,
) -> None:
    """Talk with a model. Ctrl-C stops an answer; Ctrl-D or /exit leaves."""
    import_torch()
    from zoo.generate.sampling import SamplingOptions
    from zoo.text.prompts import PromptStyle

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    given = {name: options.pop(name) for name in names}
    given["extra"] = make_samplers(app, options.pop("samplers")) or None
    SamplingOptions(**{name: value for name, value in given.items() if value is not None})
    template = _read_template(chat_template)
    lm = load_from_options(app, model, **options)
    if chat_template is not None:
        lm.use_style(PromptStyle(chat_template.stem, template))
    chat = Terminal(lm, system, max_new_tokens, lm.sampling(**given), stop, stats)
    chat.conversation.check()
    if prompt is not None:
        chat.answer(prompt)
    else:
        chat.run()


def _read_template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can not read the chat template {path}: {error}.") from None


class Terminal:
    """A conversation with a person at a terminal (or a pipe)."""

    def __init__(
        self, lm: Any, system: str | None, max_new_tokens: int | None, sampling: Any, stop: tuple[str, ...], stats: bool
    ) -> None:
        self.conversation = lm.conversation(system=system)
        self.max_new_tokens, self.sampling, self.stop, self.stats = max_new_tokens, sampling, stop, stats

    def run(self) -> None:
        """Read questions until the end of the input."""
        self._prepare_line_editing()
        note(HELP)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
                if line.strip() in ("/exit", "/quit"):
                    return
                self.handle(line)
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                click.echo("\n(Ctrl-D or /exit leaves)", err=True)
            except InputError as error:
                note(str(error))

    def handle(self, line: str) -> None:
        """Obey a command or answer a question."""
        word, _, rest = line.strip().partition(" ")
        if not word:
            return
        if not word.startswith("/"):
            self.answer(line)
        elif word == "/reset":
            self.conversation.reset()
            note("the conversation is empty")
        elif word == "/system":
            self.conversation.system = rest or None
            note(f"system message: {rest or 'none'}")
        elif word == "/save" and rest:
            self.conversation.save(Path(rest))
            note(f"saved {len(self.conversation.messages)} messages to {rest}")
        else:
            note(HELP)

    def answer(self, question: str) -> None:
        """Stream the answer; Ctrl-C stops it and keeps what was said."""
        reply = self.conversation.send(
            question, max_new_tokens=self.max_new_tokens, sampling=self.sampling, stop=self.stop
        )
        try:
            for piece in reply:
                click.echo(piece, nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:
            click.echo(" [stopped]", nl=False)
        click.echo()
        if self.stats:
            print_stats(reply.stats)

    def _prepare_line_editing(self) -> None:
        if sys.stdin.isatty():
            import readline  # noqa: F401 - gives input() history and editing
