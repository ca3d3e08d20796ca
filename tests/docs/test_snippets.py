"""Code on the pages runs: Python as the reader would run it, commands as far as their arguments."""

from __future__ import annotations

import importlib.util
import os
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from tests.docs.pages import PAGES, ROOT, blocks
from tests.programs import call, variables_of_ranks
from worm_dist.__main__ import _parse
from worm_dist.training.config_file import read_run_config
from worm_dist.training.settings_template import settings_template


@dataclass(frozen=True)
class Script:
    """Blocks of a page that run one after another, in one program.

    Attributes:
        page: the page, by its path in the repository.
        given: the file in ``given`` with what the page presumes; none if it presumes nothing.
        ranks: number of ranks; 0 for a program without a launcher.
        block: the only block that runs; None for all of them, in their order.
        package: an optional dependency.
    """

    page: str
    given: str | None = None
    ranks: int = 0
    block: int | None = None
    package: str | None = None

    @property
    def blocks(self) -> list[str]:
        every = blocks(self.page, "python")
        return every if self.block is None else [every[self.block]]

    @property
    def text(self) -> str:
        given = Path(__file__).parent / "given" / f"{self.given}.py"
        return "\n".join([*([given.read_text()] if self.given else []), *self.blocks])

    def __str__(self) -> str:
        return f"{self.page}:{self.given}"


_SCRIPTS = [
    Script("README.md", "loop", ranks=2),
    Script("docs/own-loop.md", "loop", ranks=2),
    Script("docs/own-model.md"),
    Script("docs/settings.md"),
    Script("docs/quick-start.md", "ticket"),
    Script("docs/tickets.md", "ticket"),
]
_SLOW_SCRIPTS = [
    Script("docs/deepspeed.md", "deepspeed", ranks=2, package="deepspeed"),
    Script("docs/fsdp.md", "fsdp", ranks=2),
    Script("docs/trainers.md", "lightning", block=0, package="lightning"),
    Script("docs/trainers.md", "huggingface", block=1, package="transformers"),
    Script("docs/trainers.md", "accelerate", block=2, package="accelerate"),
]


@pytest.mark.parametrize("script", _SCRIPTS, ids=str)
def test_python_runs(script: Script, tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text(script.text)
    for ended in call(["page.py"], tmp_path, variables_of_ranks(script.ranks) or [{}]):
        assert ended.exitcode == 0, ended.err


@pytest.mark.slow("imports other trainers")
@pytest.mark.parametrize("script", _SLOW_SCRIPTS, ids=str)
def test_python_of_other_trainers_runs(script: Script, tmp_path: Path) -> None:
    if script.package is not None and importlib.util.find_spec(script.package) is None:
        pytest.skip(f"{script.package} is not installed")
    test_python_runs(script, tmp_path)


def test_no_python_is_forgotten() -> None:
    run = Counter(block for script in _SCRIPTS + _SLOW_SCRIPTS for block in script.blocks)
    assert run == Counter(block for page in PAGES for block in blocks(page, "python"))


def _commands(page: str) -> list[list[str]]:
    shown = [block.replace("\\\n", " ").splitlines() for block in blocks(page, "sh")]
    consoles = [block.splitlines() for block in blocks(page, "console")]
    prompts = [[line[2:] for line in lines if line.startswith("$ ")] for lines in consoles]
    lines = [line for lines in shown + prompts for line in lines]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


_TRAINS = {"demo", "torchrun", "deepspeed", "mpirun", "twohosts", "slurm.sbatch"}
"""Scripts in launch/ that hand their arguments on to ``train``."""
_OTHERS = {"deepspeed", "mpirun", "pip", "python", ".venv/bin/tensorboard", "source", "pre-commit"}
"""Programs that the pages call besides those of this project; torchrun's arguments are parsed."""


@pytest.mark.parametrize("page", [page for page in PAGES if _commands(page)])
def test_commands_are_ones_that_exist(page: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(settings_template("worm"))
    for words in _commands(page):
        if ">" in words:
            words = words[: words.index(">")]
        _require_arguments(_own_arguments(words), tmp_path)


def _own_arguments(words: list[str]) -> list[str]:
    """The arguments of ``python -m worm_dist`` in a command; none if it does not call it."""
    while "=" in words[0]:  # a variable of the environment
        words = words[1:]
    program, *arguments = words
    if program == "sbatch":
        program, *arguments = [word for word in arguments if not word.startswith("--")]
    if program.startswith(("launch/", "docker/")):
        assert os.access(ROOT / program, os.X_OK), words
        name = program.partition("/")[2]
        if name in _TRAINS:
            names_config = bool(arguments) and not arguments[0].startswith("--")
            return ["train", *([] if names_config else ["configs/digits.yaml"]), *arguments]
        return []
    if program == "torchrun":
        launched = get_args_parser().parse_args(arguments)
        assert launched.module and launched.training_script == "worm_dist", words
        return list(launched.training_script_args)
    assert program in _OTHERS, words
    if program == "python" and arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file(), words
    return words[words.index("worm_dist") + 1 :] if "worm_dist" in words else []


def _require_arguments(arguments: list[str], folder: Path) -> None:
    if not arguments:
        return
    options, replaced = _parse(arguments)
    config = getattr(options, "config", None)
    if config is not None:
        where = folder if config == Path("run.yaml") else ROOT
        read_run_config(where / config, replaced)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_settings_are_valid(page: str, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "yaml")):
        (tmp_path / f"{number}.yaml").write_text(block)
        read_run_config(tmp_path / f"{number}.yaml", [])
