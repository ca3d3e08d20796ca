"""Observations of whole runs: what they do, event by event, compared with another run's.

Nothing that only repeats a setting is observed, such as the settings in ``run.json``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from worm_dist.__main__ import main
from worm_dist.distributed.timeouts import Timeouts, timeout_of
from worm_dist.errors import CheckpointError
from worm_dist.training import consistency, kernels, run, trainer
from worm_dist.training.data import Data
from worm_dist.training.reporting import journal, result, tensorboard
from worm_dist.training.run_config import DataConfig
from worm_dist.truncation import removal

__all__ = [
    "WITHOUT_SPACE",
    "Different",
    "events_of",
    "exit_code_of",
    "residual",
    "small",
    "turning",
    "wide",
    "write_images",
]

WITHOUT_SPACE = "without space"
"""Of a run's values: checkpoints cannot be written."""


class Different(BaseException):
    """The run differs from the other one: it need not go on."""


class _Events:
    """The events of a run, so far.

    Args:
        expected: those of the run to compare with; None if there is none.
    """

    def __init__(self, expected: list[Any] | None) -> None:
        self.all: list[Any] = []
        self._expected = expected

    def add(self, *event: Any) -> None:
        """Raises ``Different`` at the first event that is not the expected one."""
        self.all.append(event)
        if self._expected is not None and self._expected[: len(self.all)] != self.all:
            raise Different


def events_of(
    values: Mapping[str, Any], folder: Path, expected: list[Any] | None = None
) -> list[Any]:
    """Train with these settings in an empty folder, on one rank.

    Args:
        values: the settings file, nested.
        folder: becomes the current folder.
        expected: events of another run; at the first that differs, this one is given up.

    Raises:
        Different: there is such an event.
    """
    events = _Events(expected)
    os.chdir(folder)
    values = dict(values)
    fails = values.pop(WITHOUT_SPACE, False)
    Path("settings.yaml").write_text(yaml.safe_dump(values))
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        for patch in _patches(events, fails):
            stack.enter_context(patch)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(said))
        exit_code = main(["train", "settings.yaml"])
    events.add(exit_code, said.getvalue() if exit_code else "")
    events.add(_files())
    return events.all


def exit_code_of(events: list[Any]) -> int:
    """That of a run that was not given up."""
    code, _ = events[-2]
    assert isinstance(code, int)
    return code


def _files() -> dict[str, str]:
    """Of each file the digest, where it holds no settings and no times."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix == ".safetensors"
        else ""
        for path in sorted(Path("runs").rglob("*"))
        if "tfevents" not in path.name
    }


def _patches(events: _Events, fails: bool) -> Iterator[Any]:
    def after(owner: Any, name: str, note: Callable[..., None]) -> Any:
        """Call ``note`` with the arguments and the result of each call."""
        call = getattr(owner, name)

        @functools.wraps(call)
        def noted(*arguments: Any, **keywords: Any) -> Any:
            value = call(*arguments, **keywords)
            note(value, *arguments, **keywords)
            return value

        return mock.patch.object(owner, name, noted)

    yield after(run, "choose_kernels", lambda _, config, device: events.add(_kernels(config)))
    yield after(trainer.Trainer, "__init__", lambda _, made, *rest: events.add(_parts(made)))
    yield after(trainer.Trainer, "_train_step", lambda _, made, *rest: events.add(_digest(made)))
    yield after(
        dist,
        "all_reduce",
        lambda _, tensor, *rest, **more: events.add(tensor.numel(), tensor.dtype),
    )
    # So short a run has one decision on a pause only.
    yield mock.patch.object(removal, "_STEPS_BETWEEN_DECISIONS", 1)
    # These do not depend on the settings, and take as long as everything else.
    yield mock.patch.object(tensorboard.TensorBoardLog, "figures", return_value=None)
    versions, code = result.versions(), consistency._code_digest(Path(run.__file__).parents[1])
    yield mock.patch.object(result, "versions", return_value=versions)
    yield mock.patch.object(consistency, "versions", return_value=versions)
    yield mock.patch.object(consistency, "_code_digest", return_value=code)
    yield after(
        journal.Journal, "_write", lambda _, made, **line: events.add(json.dumps(line, default=str))
    )
    yield after(Timeouts, "__init__", lambda _, made, *limits: events.add("limits", *limits))
    if fails:
        error = CheckpointError("no space")
        yield mock.patch("worm_dist.checkpoint.manager.CheckpointManager.save", side_effect=error)


def _kernels(config: Any) -> tuple[Any, ...]:
    """torch's flags, as this run would set them on a GPU."""
    cudnn: Any = torch.backends.cudnn
    before = (cudnn.benchmark, cudnn.allow_tf32)
    kernels.choose_kernels(config, torch.device("cuda"))
    flags = (cudnn.benchmark, cudnn.conv.fp32_precision)
    cudnn.benchmark, cudnn.allow_tf32 = before
    torch.backends.cuda.matmul.allow_tf32 = False
    return flags


def _parts(made: trainer.Trainer) -> tuple[Any, ...]:
    parts: Any = made._parts
    assert dist.group.WORLD is not None
    return (
        _digest(made),
        [parameter.stride() for parameter in parts.network.parameters()],
        [
            {k: v for k, v in group.items() if k != "params"}
            for group in parts.engine.optimizer.param_groups
        ],
        parts.engine.model.bucket_bytes_cap,
        parts.train_loader.num_workers,
        len(parts.test_loader.dataset),
        timeout_of(dist.group.WORLD),
    )


def _digest(made: trainer.Trainer) -> str:
    """Of all weights and statistics."""
    found = hashlib.sha256()
    for tensor in made._parts.network.state_dict().values():
        found.update(tensor.detach().float().numpy().tobytes())
    return found.hexdigest()


# ---- what settings name --------------------------------------------------------------------------


def small(config: DataConfig) -> Data:
    """64 training and 16 test images ``[1, 8, 8]`` of 4 classes; columns tell them apart."""
    return _data(8)


def wide(config: DataConfig) -> Data:
    """The same, with a MiB in four batches of 16."""
    return _data(64)


def _data(side: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(80, 1, side, side, generator=generator)
    classes = torch.arange(80) % 4
    images += 2 * nn.functional.one_hot(classes, side)[:, None, :, None]
    return Data(
        train=TensorDataset(images[:64], classes[:64]),
        test=TensorDataset(images[64:], classes[64:]),
        num_classes=4,
        sample_shape=(1, side, side),
        description="columns",
    )


class _Turning(TensorDataset):
    """Samples that turn into their negatives while they are read."""

    num_read = 0

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.num_read += 1
        image, label = (tensor[index] for tensor in self.tensors)
        return (image if self.num_read <= 6 * 16 else -30 * image), label


def turning(config: DataConfig) -> Data:
    """Like ``small``, but from the seventh step on the images are other ones: the loss rises."""
    data = _data(8)
    assert isinstance(data.train, TensorDataset)
    return dataclasses.replace(data, train=_Turning(*data.train.tensors))


def write_images(folder: Path, seed: int) -> None:
    """32 training and 16 test images of 12 x 12 pixels and two classes, as ``image-folder``."""
    generator = torch.Generator().manual_seed(seed)
    for split, count in (("train", 16), ("val", 8)):
        for name in ("bright", "dark"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(128, (12, 12, 3), generator=generator, dtype=torch.uint8)
                pixels += 128 * (name == "bright")
                image = Image.fromarray(pixels.numpy())
                image.save(folder / split / name / f"{number}.png")


def residual(num_classes: int, in_channels: int, widths: Sequence[int | str]) -> nn.Module:
    """A network whose norms are coupled by a sum."""
    return _Residual(num_classes, in_channels, int(widths[0]))


class _Residual(nn.Module):
    def __init__(self, num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(in_channels, width, 3), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images)
        out: Tensor = self.head((hidden + self.second(hidden.relu())).relu().mean((2, 3)))
        return out
