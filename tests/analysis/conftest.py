from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.checkpoint.crashes import in_a_fork
from worm_dist.__main__ import main

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
SETTINGS = [
    "--epochs=4",
    "--data.batch_size=128",
    "--model.arguments={widths: [8, M, 16]}",
    "--search.every=4ba",
    "--search.settled=0.2",
    "--search.elbow.latest=null",
    "--search.l1=0.01",
    "--truncation.removal.duration=8ba",
]
"""Eleven steps an epoch."""


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of real runs on the digits, by preset.  ``worm-paper`` computes masks after its
    elbow too."""
    folder = tmp_path_factory.mktemp("runs")
    for preset in ("worm", "worm-paper", "dense"):
        words = ["train", str(CONFIG), "--preset", preset, "--out", str(folder / preset)]
        assert in_a_fork(functools.partial(_train, [*words, *SETTINGS])) == 0
    return {path.name: path for path in folder.iterdir()}


def _train(words: list[str]) -> None:
    assert main(words) == 0
