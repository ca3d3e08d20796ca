"""Export of a ticket's network to files that programs without worm_dist run.

A file is staged, loaded and run beside the network on random inputs; it takes its name only if the
outputs are equal within ``TOLERANCE``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..checkpoint.durable_io import sync_folder, writing
from ..errors import CheckpointError, ConfigError
from ..ticket.file import load_ticket
from ..ticket.metadata import METADATA, read_metadata
from ..training.evaluation import count_parameters

__all__ = ["TOLERANCE", "export_onnx", "export_torch"]

TOLERANCE = 1e-4
"""The largest accepted difference of an output, as a fraction of the largest output."""

_CAPTURED_BATCH, _COMPARED_BATCHES = 2, (1, 2, 5)
_INPUT, _OUTPUT = "images", "logits"

_Run = Callable[[Tensor], Tensor]


def export_torch(folder: Path, path: Path, input_shape: Sequence[int] | None) -> str:
    """Write the network as a program of ``torch.export``; ``torch.export.load`` reads it.

    Args:
        folder: the ticket's folder.
        path: the file to write or replace.
        input_shape: shape of one input; None for the one that the ticket records.

    Returns:
        One line on what was written, and how its outputs compare.

    Raises:
        CheckpointError: the ticket cannot be read, the file cannot be written, or its outputs
            differ from those of the network.
        ConfigError: the input is not known, or the network cannot be exported.
    """
    network, shape = _network_of(folder, input_shape)
    with _staged(path, ".pt2") as staged:
        torch.export.save(_captured(network, shape), staged)
        program = torch.export.load(staged).module()
        difference = _compare(path, network, lambda inputs: program(inputs), shape)
    return _said(path, network, shape, difference, "torch.export.load")


def export_onnx(folder: Path, path: Path, input_shape: Sequence[int] | None) -> str:
    """Write the network as ONNX; its input is called ``images``, its output ``logits``.

    Args, returns and errors are those of ``export_torch``.
    """
    import onnx
    import onnxruntime

    network, shape = _network_of(folder, input_shape)
    with _staged(path, ".onnx") as staged:
        program = _captured(network, shape)
        with _exporting(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns about its internals
            torch.onnx.export(
                program,
                f=staged,
                input_names=[_INPUT],
                output_names=[_OUTPUT],
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        onnx.checker.check_model(staged)
        session = onnxruntime.InferenceSession(staged, providers=["CPUExecutionProvider"])

        def run(inputs: Tensor) -> Tensor:
            (output,) = session.run([_OUTPUT], {_INPUT: inputs.numpy()})
            return torch.from_numpy(output)

        difference = _compare(path, network, run, shape)
    return _said(path, network, shape, difference, f"onnxruntime {onnxruntime.__version__}")


def _network_of(folder: Path, input_shape: Sequence[int] | None) -> tuple[nn.Module, Sequence[int]]:
    record = read_metadata(folder)
    shape = input_shape or record.input_shape
    if shape is None:
        raise ConfigError(
            f"{folder / METADATA}: it does not record the shape of the network's input; give "
            "--input, such as --input 3x224x224"
        )
    return load_ticket(folder).eval(), shape


def _captured(network: nn.Module, shape: Sequence[int]) -> ExportedProgram:
    sample = torch.randn(_CAPTURED_BATCH, *shape)
    with _exporting():
        return torch.export.export(
            network, (sample,), dynamic_shapes=({0: Dim("batch")},), strict=False
        )


@contextmanager
def _exporting() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch's exporters raise errors of many kinds
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"the network cannot be exported for images of this shape: {type(error).__name__}: "
            f"{first[:500]}"
        ) from error


@contextmanager
def _staged(path: Path, suffix: str) -> Iterator[Path]:
    """A file beside ``path`` that replaces it at the end, unless there is an error."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give the name of a file")
    staged = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
    with writing(path):
        staged.touch(exist_ok=False)  # before the network is exported, which takes seconds
    try:
        yield staged
        with writing(path):
            os.replace(staged, path)
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise
    sync_folder(path.parent)


def _compare(path: Path, network: nn.Module, run: _Run, shape: Sequence[int]) -> float:
    """The largest difference of an output, as a fraction of the largest output.

    Raises:
        CheckpointError: it is above ``TOLERANCE``, or outputs are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for size in _COMPARED_BATCHES:
        inputs = torch.randn(size, *shape, generator=generator)
        with torch.no_grad():
            expected = _single(network(inputs))
            found = run(inputs)
        if found.shape != expected.shape:
            raise CheckpointError(
                f"{path}: not written: for a batch of {size} its outputs are {list(found.shape)}, "
                f"those of the network {list(expected.shape)}"
            )
        scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
        difference = float((found - expected).abs().max() / scale)
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"{path}: not written: for a batch of {size} its outputs differ from those of the "
                f"network by {difference:.2g} of the largest; the tolerance is {TOLERANCE:g}"
            )
        largest = max(largest, difference)
    return largest


def _single(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ConfigError(
            f"the network returns a {type(output).__name__}; only networks that return one tensor "
            "are exported"
        )
    return output


def _said(
    path: Path, network: nn.Module, shape: Sequence[int], difference: float, reader: str
) -> str:
    return (
        f"{path}: {count_parameters(network):,} parameters, {path.stat().st_size:,} bytes, input "
        f"{_INPUT}[batch, {', '.join(map(str, shape))}]; outputs equal the network's within "
        f"{difference:.1g} of the largest (tolerance {TOLERANCE:g}; {reader}, random batches of "
        f"{', '.join(map(str, _COMPARED_BATCHES))})"
    )
