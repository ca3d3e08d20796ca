"""Data that cannot be trained on: one line on all ranks, at the start or at the sample."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from tests.faults.driver import Driver, Run, busy, small_data
from tests.faults.trainers import small_trainer
from tests.ranks import Ranks
from worm_dist import ConfigError
from worm_dist.training.data import Data


def _spoiled(part: str, index: int, image: float | None, target: int | None) -> Data:
    """A split with one sample of another class or with another pixel."""
    data = small_data(rank=0)
    images, classes = (t.clone() for t in getattr(data, part).tensors)
    if image is not None:
        images[index, 0, 3, 3] = image
    if target is not None:
        classes[index] = target
    changed: dict[str, Any] = {part: TensorDataset(images, classes)}
    return dataclasses.replace(data, **changed)


def _refused(samples: Data, num_workers: int) -> str:
    with pytest.raises(ConfigError) as caught:
        small_trainer(samples, data={"batch_size": 16, "num_workers": num_workers}).run()
    return str(caught.value)


@pytest.mark.fault(20, "an empty split, fewer samples than a batch")
@pytest.mark.parametrize(
    ("num_train", "num_test", "says"),
    [
        (0, 16, "data.batch_size: 16 is more than the 0 samples of the training split"),
        (15, 16, "data.batch_size: 16 is more than the 15 samples of the training split"),
        (128, 0, "data: the test split is empty"),
    ],
)
def test_too_few_samples_are_refused_at_the_start(
    ranks: Ranks, num_train: int, num_test: int, says: str
) -> None:
    for told in ranks(2, _refused, small_data(0, num_train, num_test), 0):
        assert told.startswith(says)


@pytest.mark.fault(20, "a class that does not exist, pixels that are no numbers")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("part", "image", "target", "says"),
    [
        (
            "train",
            None,
            10,
            "sample 7 of the training split has class 10, but the valid classes are 0 to 9",
        ),
        (
            "train",
            None,
            -1,
            "sample 7 of the training split has class -1, but the valid classes are 0 to 9",
        ),
        ("train", torch.nan, None, "sample 7 of the training split has pixels that are not finite"),
        ("test", -torch.inf, None, "sample 7 of the test split has pixels that are not finite"),
    ],
)
def test_a_sample_that_cannot_be_learned_from_is_named(
    ranks: Ranks,
    part: str,
    image: float | None,
    target: int | None,
    says: str,
    num_workers: int,
) -> None:
    """cross_entropy says that a target is out of bounds, and on a GPU the process aborts."""
    (told,) = ranks(1, _refused, _spoiled(part, 7, image, target), num_workers)
    assert told.startswith(f"data.root: {says}") and "\n" not in told


def _fewer_on_rank_one(rank: int) -> Data:
    return small_data(rank, num_train=128 - 16 * rank)


def _one_more_on_rank_one(rank: int) -> Data:
    return small_data(rank, num_train=128 + rank)


@pytest.mark.fault(20, "uneven shards: a rank with a batch less, or other samples")
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (_fewer_on_rank_one, "the number of batches is 8 on rank 0, 7 on rank 1"),
        (_one_more_on_rank_one, "the number of training samples is 128 on rank 0, 129 on rank 1"),
    ],
)
def test_ranks_that_see_other_data_are_refused_and_do_not_hang(
    driver: Driver, data: object, says: str
) -> None:
    """The rank with more batches waited for the others at the end of the epoch, until a timeout."""
    ends = driver(2, Run(data=data))  # type: ignore[arg-type]
    assert [(end.exitcode, len(end.errors)) for end in ends] == [(2, 1), (2, 0)]
    assert "data: the ranks do not see the same data: " in ends[0].said and says in ends[0].said


def _images(root: Path) -> None:
    """Twelve to train on and four to test on, of two classes."""
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                shade = 20 * number + 10 * (name == "dog")
                Image.new("L", (12, 12), shade).save(root / split / name / f"{number}.png")


FOLDER = {"data.name": "image-folder", "data.image_size": 8, "data.batch_size": 4}


@pytest.mark.fault(20, "a damaged image, path and index")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_ends_all_ranks_with_its_path(driver: Driver, num_workers: int) -> None:
    root = driver.out.parent / "images"
    _images(root)
    path = root / "train" / "dog" / "2.png"
    path.write_bytes(path.read_bytes()[:50])
    settings = {**FOLDER, "data.root": root, "data.num_workers": num_workers}
    ends = driver(2, Run(settings=settings, data=None))
    assert [end.exitcode for end in ends] == [2, 2]
    for end in ends:
        (line,) = end.errors
        assert f"cannot read the image {path}: " in line
        assert f"(sample 8 of {root / 'train'})" in line
        assert "Traceback" not in end.said


@pytest.mark.fault(20, "a folder that is missing on one host")
def test_a_folder_that_is_missing_on_one_rank_ends_all(driver: Driver) -> None:
    root = driver.out.parent / "images"
    _images(root)
    elsewhere = {"data.root": root.parent / "nowhere"}
    run = Run(settings={**FOLDER, "data.root": root}, per_rank={1: elsewhere}, data=None)
    ends = driver(2, run)
    assert [end.exitcode for end in ends] == [2, 2]
    (line,) = [error for end in ends for error in end.errors]
    assert "rank 1: data.root: cannot use" in line and str(root.parent / "nowhere") in line
    assert "failed at" not in line, "it is every rank's own error"
    assert max(end.seconds for end in ends) < busy(10), "nobody waited for a timeout"


def test_a_good_trainer_is_not_refused(ranks: Ranks) -> None:
    """Or the tests above would say nothing."""
    assert ranks(1, _trained) == [16]


def _trained() -> int:
    trainer = small_trainer()
    trainer.run()
    return trainer.engine.step
