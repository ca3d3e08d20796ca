"""The demo: what it trains, with and without its second data set, and what it says at the end."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.launch.scripts import call_from, needs_venv

pytestmark = [pytest.mark.slow("runs a script of launch/"), needs_venv]

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


@pytest.mark.timeout(300)
def test_both_parts_end_with_three_lines_of_their_runs(tmp_path: Path) -> None:
    _write_images(tmp_path / "images")
    images = str(tmp_path / "images")
    done = call_from(tmp_path, "demo", *SHORT, NPROC="1", FASHION_MNIST=images)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert not any("left out" in line for line in lines)
    for title, run in (("the digits", "digits"), ("Fashion-MNIST", "fashion-mnist-short")):
        assert (tmp_path / "runs" / run / "result.json").exists()
        at = lines.index(f"What came out of {title}:")
        starts = ["  accuracy: ", "  network: ", "  traffic: "]
        assert [line[: len(start)] for line, start in zip(lines[at + 1 :], starts)] == starts
    accuracy = lines[lines.index("What came out of the digits:") + 1]
    assert "for the dense network, as long" in accuracy


def test_without_the_images_one_line_says_how_to_install_them(tmp_path: Path) -> None:
    done = call_from(tmp_path, "demo", "--epochs=none", FASHION_MNIST="/nowhere")
    first, *_ = done.stdout.splitlines()
    assert first.endswith(
        "no Fashion-MNIST in /nowhere; on Debian: apt-get install dataset-fashion-mnist"
    )
    assert done.returncode != 0 and "part 2, photographs" not in done.stdout
