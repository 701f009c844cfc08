"""Documentation that is checked: reference pages are current, links lead somewhere, and the README's examples run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from millicent.cli import run
from millicent.cli.commands import millicent
from millicent.config import WRITTEN_IN, Config
from millicent.core import errors
from reference_pages import DOCS, commands, error_classes, pages
from source_tree import ROOT, name_of, tracked

README = ROOT / "README.md"
# How an example in the README says that it isn't run by this test: the line before its fence.
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+) -->")


@pytest.mark.parametrize("name", sorted(pages()))
def test_reference_pages_are_as_the_code_makes_them(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == pages()[name], f"docs/{name} is old: run `make docs`"


def test_every_command_and_option_has_help() -> None:
    missing = [context.command_path for context in commands() if not context.command.help]
    missing += [
        f"{context.command_path} {param.opts[0]}"
        for context in commands()
        for param in context.command.params
        if param.param_type_name == "option" and not getattr(param, "help", None)
    ]
    assert not missing


def test_every_section_of_the_configuration_is_explained() -> None:
    page = pages()["configuration.md"]
    for section in Config.__struct_fields__:
        heading = (
            rf"`\[{WRITTEN_IN[section]}\.NAME\]` \({section}\)"
            if section in WRITTEN_IN
            else rf"`\[{section}(\.NAME)?\]`"
        )
        assert re.search(rf"## {heading}\n\n[^|\n]", page), f"[{section}]: its class needs a docstring"


def test_every_error_stands_in_the_tree() -> None:
    tree = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert sorted(tree) == sorted(each.__name__ for each in error_classes() if each is not errors.MillicentError)


def links() -> Iterator[tuple[Path, str]]:
    for page in tracked(".md"):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            yield page, target


def test_links_lead_somewhere() -> None:
    broken = []
    for page, target in links():
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        if not path.exists():
            broken.append(f"{name_of(page)}: {target}: no such file")
        elif anchor and anchor not in anchors(path):
            broken.append(f"{name_of(page)}: {target}: no such heading")
    assert not broken, "\n".join(broken)


def anchors(page: Path) -> set[str]:
    """Headings as GitHub makes links of them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def examples() -> list[tuple[str, str | None]]:
    """Shell examples in the README, each with the reason why it isn't run here, if there is one."""
    found = []
    for before, code in re.findall(r"([^\n]*)\n```sh\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL):
        marked = NOT_RUN.fullmatch(before.strip())
        found.append((code, marked["reason"] if marked else None))
    return found


def test_the_readmes_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that need no server, in order, in an empty home."""
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MILLICENT_CACHE", str(tmp_path / "cache"))
    ran = 0
    for code, not_run in examples():
        for line in code.splitlines() if not_run is None else ():
            program, *arguments = shlex.split(line, comments=True) or [""]
            assert program == "millicent", f"only millicent's own commands are run here; mark this one: {line}"
            assert run(arguments) == 0, f"{line}: {capsys.readouterr().err}"
            ran += 1
    assert ran, "the README shows no command that can be tried without a server"


def complaint(line: str) -> str | None:
    """Which word of a command line, after its first, is no command or option."""
    command: click.Command = millicent
    for word in line.split():
        if isinstance(command, click.Group):
            if word not in command.commands:
                return word
            command = command.commands[word]
        elif word.startswith("--") and word.partition("=")[0] not in {each for p in command.params for each in p.opts}:
            return word
    return None


def test_commands_that_are_named_anywhere_exist_with_their_options() -> None:
    """In messages, pages and documents, between backticks; and each line of the README's examples."""
    named = [
        (path, line)
        for path in tracked(".py", ".html", ".md")
        if ROOT / "tests" not in path.parents
        for line in re.findall(r"`millicent ([a-z][^`<{]*)`", path.read_text("utf-8"))
        if line not in {"plan --json", "plan COMMAND --json"}  # of all of them
    ]
    assert len(named) > 100
    named += [
        (README, line) for code, _ in examples() for line in re.findall(r"^millicent ([a-z].*)", code, re.MULTILINE)
    ]
    assert [f"{path}: {line}" for path, line in named if complaint(line)] == []


def test_the_changelog_has_a_place_for_what_comes_next() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
