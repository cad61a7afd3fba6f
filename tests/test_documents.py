"""What the documents show is run: Python blocks, commands with their options, links."""

import re
from pathlib import Path

import click
import pytest
import typer

from foveal.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
IDS = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]

PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$? ?(foveal [^\n#]+)", re.MULTILINE)
CONSOLE = re.compile(r"^```(?:sh|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)[^)]*\)")


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_examples_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of one document share their names, as a reader types them one after another."""
    names: dict[str, object] = {}
    for block in PYTHON.findall(path.read_text(encoding="utf-8")):
        exec(compile(block, path.name, "exec"), names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_commands_exist_with_their_options(path: Path) -> None:
    root = typer.main.get_command(app)
    for block in CONSOLE.findall(path.read_text(encoding="utf-8")):
        for line in COMMAND.findall(block):
            for single in line.split(" | foveal "):
                _check(root, single.split()[1:])


def _check(command: click.Command, words: list[str]) -> None:
    """Follow the subcommands, then look every option up."""
    while isinstance(subcommands := getattr(command, "commands", None), dict) and words:
        assert words[0] in subcommands, f"no command {words[0]}"
        command, words = subcommands[words[0]], words[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in known, f"{command.name} has no {word}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
