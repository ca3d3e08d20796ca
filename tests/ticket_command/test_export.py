from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.nets import random_images
from tests.ticket_command.tickets import drawn
from worm_dist import CheckpointError, load_ticket
from worm_dist.__main__ import main
from worm_dist.models import build_model
from worm_dist.ticket_command.export import _compare

ROOT = Path(__file__).parents[2]


def _outputs(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(images)
    return logits


@pytest.mark.slow("torch.export, five seconds")
def test_a_program_computes_what_the_network_does(
    ticket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.pt2"
    path.write_text("an older file")
    assert main(["ticket", "export", str(ticket), "--torch-export", str(path)]) == 0
    assert "414 parameters" in capsys.readouterr().out
    program, network = torch.export.load(path).module(), load_ticket(ticket).eval()
    for size in (1, 7):
        images = random_images(size, seed=size)
        torch.testing.assert_close(program(images), _outputs(network, images))
    assert [each.name for each in tmp_path.iterdir()] == ["small.pt2"]


@pytest.mark.slow("torch.onnx, ten seconds")
def test_onnx_computes_what_the_network_does(ticket: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "small.onnx"
    assert main(["ticket", "export", str(ticket), "--onnx", str(path)]) == 0
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    network = load_ticket(ticket).eval()
    for size in (1, 7):
        images = random_images(size, seed=size)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(found), _outputs(network, images), rtol=1e-4, atol=1e-4
        )
    assert [each.name for each in tmp_path.iterdir()] == ["small.onnx"]


def test_a_missing_package_names_the_extra(
    ticket: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)  # which then cannot be imported
    assert main(["ticket", "export", str(ticket), "--onnx", "x.onnx"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "onnx and onnxruntime and onnxscript are not installed" in line
    assert 'pip install "worm_dist[onnx]"' in line


def test_outputs_that_differ_are_refused(ticket: Path, tmp_path: Path) -> None:
    network = load_ticket(ticket).eval()

    def compare(factor: float) -> float:
        return _compare(tmp_path, network, lambda x: factor * _outputs(network, x), (3, 8, 8))

    assert compare(1.0) == 0
    with pytest.raises(CheckpointError, match=r"not written: for a batch of 1 .* 0\.0002 of the"):
        compare(1.0002)
    with pytest.raises(CheckpointError, match="differ from those of the network by nan"):
        compare(float("nan"))


def test_a_failed_export_leaves_the_file_that_was_there(
    ticket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.pt2"
    path.write_text("an older file")
    words = ["--torch-export", str(path), "--input", "1x8x8"]
    assert main(["ticket", "export", str(ticket), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be exported for images of this shape" in line
    assert path.read_text() == "an older file" and len(list(tmp_path.iterdir())) == 1


_BLOCKED = (
    "import runpy, sys; sys.modules['worm_dist'] = None; sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.mark.slow("torch.export, and a process that imports torch")
def test_the_example_needs_no_worm_dist(tmp_path: Path) -> None:
    """Which cannot be imported in its process."""
    model: dict[str, Any] = {"name": "vgg_small", "num_classes": 10, "in_channels": 1}
    drawn(build_model(**model), shape=(1, 8, 8)).save_ticket(tmp_path, model)
    program = tmp_path / "small.pt2"
    assert main(["ticket", "export", str(tmp_path), "--torch-export", str(program)]) == 0
    example = ROOT / "examples" / "ticket_without_worm_dist.py"
    words = [example, program, tmp_path / "ticket.safetensors", "--widths", 16, 16, 32, 32, 64, 64]
    done = subprocess.run(
        [sys.executable, "-c", _BLOCKED, *map(str, words)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    classes = _outputs(load_ticket(tmp_path).eval(), images).argmax(dim=1).tolist()
    first, second = done.stdout.splitlines()
    assert first == f"classes {classes}"
    assert float(second.removeprefix("largest difference ")) < 1e-5
