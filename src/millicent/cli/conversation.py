"""`chat` and `run`: answers in the terminal, each with what it cost."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import click

from millicent.cli.options import url_option
from millicent.cli.serving import dtype_option, quantize_option
from millicent.core.errors import ConfigError, MillicentError, ModelNotFound, Unavailable

if TYPE_CHECKING:
    from millicent.cli.client import Answered, Client

_temperature = click.option("--temperature", type=click.FloatRange(0, 2), help="0 always takes the likeliest token.")
_max_tokens = click.option("--max-tokens", type=click.IntRange(min=1), help="End the answer after so many tokens.")
_seed = click.option("--seed", type=int, help="The same seed draws the same tokens.")


@click.command()
@click.option("--model", help="Which model answers; by default the server's first.")
@click.option("--system", help="What the model is told before the conversation.")
@_temperature
@_max_tokens
@_seed
@url_option
def chat(
    model: str | None, system: str | None, temperature: float | None, max_tokens: int | None, seed: int | None, url: str
) -> None:
    """Talk to a running server; each answer shows what it cost. /bye ends it."""
    from millicent.cli.client import Answered, Client

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history and an editable line

    client = Client(url)
    model = model or _first_model(client)
    click.echo(f"{model} at {client.url}. /bye ends the conversation.", err=True)
    turns: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    while (prompt := _read_prompt()) is not None:
        if not prompt.strip():
            continue
        turns.append({"role": "user", "content": prompt})
        answered = Answered()
        body = _body(model, turns, temperature, max_tokens, seed)
        try:
            text = _print_answer(client.chat(body, answered))
        except MillicentError as error:
            turns.pop()
            click.echo(f"error: {error.message}", err=True)
            continue
        turns.append({"role": "assistant", "content": text})
        click.echo(_summary(answered), err=True)


@click.command()
@click.argument("model")
@click.argument("prompt")
@_temperature
@_max_tokens
@_seed
@url_option
@dtype_option
@quantize_option
@click.option("--json", "json_", is_flag=True, help="Print the answer, its usage and its receipt's id as JSON.")
def run(
    model: str,
    prompt: str,
    temperature: float | None,
    max_tokens: int | None,
    seed: int | None,
    url: str,
    dtype: str | None,
    quantize: str | None,
    json_: bool,
) -> None:
    """Answer PROMPT once with MODEL; the cost goes to stderr. A PROMPT of - is read from stdin.

    The server at --url answers if it is there and serves MODEL; else one is started for this answer only.
    """
    from millicent.cli.client import Answered
    from millicent.cli.show import as_json

    turns = [{"role": "user", "content": sys.stdin.read() if prompt == "-" else prompt}]
    answered = Answered()
    chosen = (("--dtype", dtype), ("--quantize", quantize))
    precision = [word for option, value in chosen if value is not None for word in (option, value)]
    with _server_for(model, url, precision) as (client, name):
        answer = client.chat(_body(name, turns, temperature, max_tokens, seed), answered)
        if json_:
            text = "".join(answer)
            as_json({"model": name, "text": text, "receipt": answered.receipt, "usage": answered.usage})
            return
        for piece in answer:
            _print(piece)
        print(flush=True)
        click.echo(_summary(answered), err=True)


@contextlib.contextmanager
def _server_for(model: str, url: str, precision: list[str]) -> Iterator[tuple[Client, str]]:
    """A client, and the name under which its server knows the model, which may have been given by a path.

    `precision` are options for a server that is started; one that runs already has its own.
    """
    from millicent.cli.client import Client, private_server

    client = Client(url)
    try:
        serves = model in client.models()
    except Unavailable:
        serves = False
    if serves and precision:
        raise ConfigError(f"{precision[0]} is for a server that starts, and {client.url} serves {model}: leave it out.")
    if serves:
        yield client, model
        return
    with private_server(model, precision) as private:
        yield private, _first_model(private)


def _first_model(client: Client) -> str:
    models = client.models()
    if not models:
        raise ModelNotFound(f"the server at {client.url} serves no model: start it with `millicent serve MODEL`.")
    return models[0]


def _body(
    model: str, turns: list[dict[str, str]], temperature: float | None, max_tokens: int | None, seed: int | None
) -> dict[str, Any]:
    settings = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    given = {name: value for name, value in settings.items() if value is not None}
    return {"model": model, "messages": turns, **given}


def _read_prompt() -> str | None:
    """What was typed; None when the conversation is over."""
    try:
        prompt = input(">>> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    return None if prompt.strip() == "/bye" else prompt


def _print(piece: str) -> None:
    """What a model writes moves no cursor of a terminal; a file or a pipe gets it as it came."""
    from millicent.cli.show import still

    print(still(piece) if sys.stdout.isatty() else piece, end="", flush=True)


def _print_answer(pieces: Generator[str, None, None]) -> str:
    """Print as it comes. Ctrl-C ends this answer, not the conversation: the server stops and settles its receipt."""
    text = ""
    try:
        for piece in pieces:
            text += piece
            _print(piece)
    except KeyboardInterrupt:
        pieces.close()
        click.echo("\n(stopped)", err=True, nl=False)
    print(flush=True)
    return text


def _summary(answered: Answered) -> str:
    """One line: tokens, cost, how the cost is known, and where the receipt is."""
    from millicent.cli.show import amount, count
    from millicent.core.money import Money

    usage = answered.usage
    if not usage:
        return f"[receipt {answered.receipt}]"
    cost = usage.get("cost")
    known = (usage.get("cost_details") or {}).get("provenance", "unknown")
    spent = amount(None if cost is None else Money.from_usd(cost))
    tokens = f"{count(usage.get('prompt_tokens'))} tokens in, {count(usage.get('completion_tokens'))} out"
    return f"[{tokens}; {spent} ({known}); receipt {answered.receipt}]"
