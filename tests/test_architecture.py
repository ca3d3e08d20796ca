"""The floors, journeys and words of docs/architecture.md are those of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "worm_dist"
TEXT = (ROOT / "docs" / "architecture.md").read_text()
MOST_LINES = 600
LONGER: dict[str, int] = {}
"""Files that are longer all the same, and how long they may be: to be shortened, never extended."""


def _section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def _rows(title: str, header: str) -> list[list[str]]:
    """The cells of the table in a section whose header begins like this."""
    lines = _section(title).split(f"| {header} |", 1)[1].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


FLOORS = {package.strip("`"): int(floor) for floor, package, _ in _rows("Floors", "floor")}
GLOSSARY = _rows("Glossary", "word")


def _package(path: str) -> str:
    """The package that a file of worm_dist is in; a file beside the packages is its own."""
    return path.split("/", 1)[0]


@cache
def _files() -> dict[str, ast.Module]:
    """Every file of worm_dist, by its path in it."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@cache
def _homes() -> dict[str, str]:
    """Where the names are from that worm_dist itself hands out."""
    for node in _files()["__init__.py"].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            homes = ast.literal_eval(node.value)
            assert isinstance(homes, dict)
            return {name: home.lstrip(".") for name, home in homes.items()}
    raise AssertionError("worm_dist/__init__.py has no _HOMES")


def _imported(path: str, node: ast.AST) -> Iterator[str]:
    """The dotted names in worm_dist that a node imports, without ``worm_dist.`` in front."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        folder = ["worm_dist", *path.split("/")[:-1]]
        above = folder[: len(folder) - node.level + 1] if node.level else []
        source = ".".join([*above, *([node.module] if node.module else [])])
        names = [f"{source}.{alias.name}" for alias in node.names]
    else:
        return
    for name in names:
        if name.split(".")[0] == "worm_dist":
            yield name.removeprefix("worm_dist").lstrip(".")


def _target(name: str) -> str:
    """The file that a dotted name is imported from, as a path in worm_dist."""
    if "." not in name:
        name = _homes().get(name, name)
    parts = name.split(".") if name else []
    for length in range(len(parts), -1, -1):
        stem = "/".join(parts[:length])
        for path in (f"{stem}.py", f"{stem}/__init__.py".lstrip("/")):
            if path in _files():
                return path
    raise AssertionError(name)


@cache
def _imports() -> frozenset[tuple[str, str]]:
    """Every import from one package to another, as the paths of both files.  Those of functions and
    of type checkers count too."""
    return frozenset(
        (path, target)
        for path, tree in _files().items()
        if path != "__init__.py"  # imports what it is asked for
        for node in ast.walk(tree)
        for name in _imported(path, node)
        if (target := _target(name)) != "__init__.py" and _package(target) != _package(path)
    )


def test_every_package_stands_on_a_floor() -> None:
    there = {_package(path) for path in _files()} - {"__init__.py"}
    assert sorted(FLOORS) == sorted(there)


def test_the_picture_shows_the_same_floors() -> None:
    (picture,) = re.findall(r"```text\n(.*?)```", _section("Floors"), flags=re.DOTALL)
    shown = re.findall(r"(\d+)  (.+)", picture)
    packages = {name: int(floor) for floor, names in shown for name in names.split(" · ")}
    assert packages == FLOORS


def test_imports_point_downwards() -> None:
    """So no package imports itself by way of others."""
    upwards = [
        f"{path} imports {target}"
        for path, target in sorted(_imports())
        if FLOORS[_package(target)] >= FLOORS[_package(path)]
    ]
    assert not upwards, "\n".join(upwards)


def test_imports_are_seen() -> None:
    """The reading of imports itself: relative, absolute, and by a name that worm_dist hands out."""

    def targets(path: str, line: str) -> list[str]:
        return [_target(name) for name in _imported(path, ast.parse(line).body[0])]

    assert targets("engine/draw.py", "from ..groups.mask import Mask") == ["groups/mask.py"]
    assert targets("engine/draw.py", "from .context import X") == ["engine/context.py"]
    assert targets("engine/draw.py", "from ..groups import mask") == ["groups/mask.py"]
    assert targets("engine/__init__.py", "from .draw import draw") == ["engine/draw.py"]
    assert targets("bench/ledger/row.py", "from ... import attach") == ["engine/attach.py"]
    assert targets("training/run.py", "from .. import __version__") == ["__init__.py"]
    assert targets("config.py", "import worm_dist.groups.mask") == ["groups/mask.py"]
    assert targets("config.py", "import worm_dist") == ["__init__.py"]
    assert targets("config.py", "import torch") == []


def _private_of_engines(tree: ast.Module) -> Iterator[str]:
    """Private attributes of what is called an engine, as they are read or written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            owner = ast.unparse(node.value)
            if owner.rpartition(".")[2] == "engine":
                yield f"{owner}.{node.attr}"


def test_private_parts_of_engines_are_read_in_their_own_package_alone() -> None:
    """The others ask ``engine/attachment.py``.  In ``backends`` it is DeepSpeed's engines that are
    called so."""
    seen = [*_private_of_engines(ast.parse("self.engine._training.comm, engine.model"))]
    assert seen == ["self.engine._training"]
    found = [
        f"{path}: {name}"
        for path, tree in _files().items()
        if _package(path) not in ("engine", "backends")
        for name in _private_of_engines(tree)
    ]
    assert not found, "\n".join(found)


def test_no_file_is_too_long_to_read() -> None:
    lengths = {path: len((PACKAGE / path).read_text().splitlines()) for path in _files()}
    longer = {path: length for path, length in lengths.items() if length > MOST_LINES}
    assert sorted(longer) == sorted(LONGER)
    assert all(length <= LONGER[path] for path, length in longer.items())


@pytest.mark.parametrize(("words", "where"), [(row[0], row[2].strip("`")) for row in GLOSSARY])
def test_words_of_the_glossary_are_in_the_code(words: str, where: str) -> None:
    home = PACKAGE / where
    assert home.exists(), where
    code = "\n".join(path.read_text() for path in ([home] if home.is_file() else home.glob("*.py")))
    for word in words.split(", "):
        # In a name too: "the_mask", "Mask" and "masks" are the word "mask".
        assert re.search(rf"(?:\b|_){word.replace(' ', '[ _]?')}", code, re.IGNORECASE), word


def test_paths_on_the_page_are_there() -> None:
    for path in re.findall(r"`([\w/]+(?:/|\.py))`", TEXT):
        assert (PACKAGE / path).exists() or (ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("journey", "most"), [("From a gradient", 8), ("From a scale", 9), ("Saving the state", 15)]
)
def test_no_journey_passes_through_many_files(journey: str, most: int) -> None:
    steps = _section("Three journeys, file by file").split(f"### {journey}")[1].split("###")[0]
    assert 8 <= len(set(re.findall(r"^\d+\. `([^`]+)`", steps, flags=re.M))) <= most


def test_names_on_the_way_are_in_their_files() -> None:
    """A line of a journey names a file, and then what is in it."""
    steps = re.findall(
        r"^\d+\. (.*?)(?=^\d+\. |\n\n)", _section("Three journeys, file by file"), flags=re.M | re.S
    )
    assert len(steps) > 30
    missing = [
        f"{path}: {name}"
        for path, *names in (re.findall(r"`([^`]+)`", step) for step in steps)
        for name in names
        if re.fullmatch(r"\w+", name)
        and not re.search(rf"\b{name}\b", (PACKAGE / path).read_text())
    ]
    assert missing == []
