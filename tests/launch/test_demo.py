"""The demo: what it trains, with and without its second data set, and what it says at the end."""

from __future__ import annotations

import gzip
import runpy
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.launch import scripts
from tests.launch.scripts import ROOT, needs_venv
from tests.programs import call

pytestmark = pytest.mark.slow("trains, and runs a script of launch/")

SHORT = ("--epochs=2", "--search.every=2ba", "--truncation.removal.duration=4ba")


def _write_images(folder: Path) -> None:
    """Clothes of ten kinds, which differ in where they are bright."""
    folder.mkdir()
    for split, size in (("train", 512), ("t10k", 60)):
        classes = np.arange(size, dtype=np.uint8) % 10
        images = np.zeros((size, 28, 28), dtype=np.uint8)
        images[np.arange(size), 2 * classes, :] = 255
        for name, array in (("images-idx3", images), ("labels-idx1", classes)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            content = gzip.compress(header + array.tobytes())
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(content)


def test_the_second_part_trains_and_ends_with_three_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, run = tmp_path / "images", tmp_path / "run"
    _write_images(images)
    words = ["train", ROOT / "configs" / "fashion_mnist_short.yaml", "--data.root", images]
    (ended,) = call(["-m", "worm_dist", *words, "--out", run, *SHORT], tmp_path)
    assert ended.exitcode == 0, ended.err
    assert "ticket drawn at epoch" in ended.out
    outcome = runpy.run_path(str(ROOT / "launch" / "demo_outcome.py"))
    outcome["main"](str(run))
    lines = capsys.readouterr().out.splitlines()
    starts = ["  accuracy: ", "  network: ", "  traffic: "]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


@needs_venv
def test_without_the_images_one_line_says_how_to_install_them() -> None:
    done = scripts.call("demo", "--epochs=none", FASHION_MNIST="/nowhere")
    # Before it there may be a line on what is installed.
    said = "no Fashion-MNIST in /nowhere; on Debian: apt-get install dataset-fashion-mnist"
    assert [line.endswith(said) for line in done.stdout.splitlines()].count(True) == 1
    assert done.returncode != 0 and "part 2, photographs" not in done.stdout
