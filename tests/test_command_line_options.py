"""Every option of the command line is read by the command that it belongs to."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from worm_dist.__main__ import main

PACKAGE = Path(__file__).parents[1] / "worm_dist"
FOLDERS = {
    "bench": "bench",
    "doctor": "doctor",
    "plan": "planning",
    "replay": "analysis",
    "report": "analysis",
    "ticket": "ticket_command",
}
"""Where the code of a command is; ``__main__`` is of all of them."""


def _options() -> Iterator[tuple[str, str]]:
    """Every command and the name under which argparse keeps one of its options."""
    found: list[argparse.ArgumentParser] = []

    def parse(parser: argparse.ArgumentParser, *_: object) -> object:
        found.append(parser)
        raise SystemExit(0)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse),
        pytest.raises(SystemExit),
    ):
        main([])
    (commands,) = _commands(found[0])
    for name, parser in commands.choices.items():
        yield from ((name, dest) for dest in _dests(parser))


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse._SubParsersAction[Any]]:
    return (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))


def _dests(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if action.dest not in ("help", argparse.SUPPRESS):
            yield action.dest
    for below in _commands(parser):
        for each in below.choices.values():
            yield from _dests(each)


def _read(command: str) -> set[str]:
    """What the code of a command reads of ``options``: by its name, or by that in a list from
    which ``getattr`` takes it."""
    files = [PACKAGE / "__main__.py"]
    if command in FOLDERS:
        files += (PACKAGE / FOLDERS[command]).rglob("*command*.py")
    names: set[str] = set()
    for path in files:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "options":
                names.add(node.attr)
            elif isinstance(node, (ast.Dict, ast.Tuple)) and "getattr(options, " in text:
                elements = node.keys if isinstance(node, ast.Dict) else node.elts
                names |= {str(each.value) for each in elements if isinstance(each, ast.Constant)}
    return names


OPTIONS = sorted({*_options()})


def test_options_are_found() -> None:
    assert {("train", "resume"), ("bench", "quick"), ("ticket", "onnx")} <= {*OPTIONS}
    assert len(OPTIONS) > 50


@pytest.mark.parametrize(("command", "name"), OPTIONS)
def test_an_option_is_read(command: str, name: str) -> None:
    assert name in _read(command)
