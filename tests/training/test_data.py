from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from worm_dist.errors import ConfigError
from worm_dist.training import data
from worm_dist.training.data import Data
from worm_dist.training.data.dataset import Samples
from worm_dist.training.data.normalization import Normalization
from worm_dist.training.run_config import DATA_SETS, DataConfig

CPU = torch.device("cpu")


def _load(name: Any, root: Path, **settings: Any) -> Data:
    return data.load_data(DataConfig(name=name, root=str(root), **settings))


def _sizes(loaded: Data) -> tuple[int, int]:
    return len(loaded.train), len(loaded.test)


def _targets(samples: Samples) -> list[int]:
    return [samples[index][1] for index in range(len(samples))]


def _image(loaded: Data) -> torch.Tensor:
    """The first training image, checked for shape and type."""
    image, target = loaded.train[0]
    in_bytes = loaded.normalization is not None
    assert image.shape == loaded.sample_shape
    assert image.dtype == (torch.uint8 if in_bytes else torch.float32)
    assert 0 <= int(target) < loaded.num_classes
    return image  # type: ignore[no-any-return]


def test_every_data_set_that_settings_may_name_has_its_loader() -> None:
    assert sorted(data.LOADERS) == sorted(DATA_SETS)


# --- digits -----------------------------------------------------------------------------------


def test_digits_are_split_alike_every_time() -> None:
    first, second = data.load_data(DataConfig()), data.load_data(DataConfig())
    assert first.description == (
        "scikit-learn digits: 1437 train / 360 test, fixed stratified split (seed 0)"
    )
    assert _sizes(first) == (1437, 360)
    assert (first.num_classes, first.sample_shape) == (10, (1, 8, 8))
    assert all(
        torch.equal(one, other)
        for one, other in zip(first.test.tensors, second.test.tensors, strict=True)  # type: ignore[attr-defined]
    )


def test_digits_have_training_statistics_zero_and_one_and_every_class_in_both() -> None:
    loaded = data.load_data(DataConfig())
    images, classes = loaded.train.tensors  # type: ignore[attr-defined]
    assert images.dtype == torch.float32 and classes.dtype == torch.int64
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std().item() == pytest.approx(1, abs=1e-5)
    shares = torch.bincount(classes) / 1437 - torch.bincount(loaded.test.tensors[1]) / 360  # type: ignore[attr-defined]
    assert shares.abs().max() < 0.005


# --- Fashion-MNIST ----------------------------------------------------------------------------


def _write_fashion_mnist(place: Path, zipped: bool, sizes: tuple[int, int] = (6, 3)) -> None:
    place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, size in zip(("train", "t10k"), sizes, strict=True):
        images = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        classes = (np.arange(size) % 10).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", classes)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            content = header + array.tobytes()
            path = place / f"{split}-{name}-ubyte"
            if zipped:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("layout", ["FashionMNIST/raw", "."])
def test_fashion_mnist_is_read_in_every_layout(tmp_path: Path, layout: str, zipped: bool) -> None:
    _write_fashion_mnist(tmp_path / layout, zipped)
    before = sorted(tmp_path.rglob("*"))
    loaded = _load("fashion-mnist", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert _sizes(loaded) == (6, 3)
    assert (loaded.num_classes, loaded.sample_shape) == (10, (1, 28, 28))
    assert _targets(loaded.train) == list(range(6))
    _image(loaded)


def test_fashion_mnist_agrees_with_torchvision(tmp_path: Path) -> None:
    _write_fashion_mnist(tmp_path / "FashionMNIST" / "raw", zipped=False)
    theirs = datasets.FashionMNIST(str(tmp_path), train=False)
    ours = _load("fashion-mnist", tmp_path)
    for index in range(len(theirs)):
        image, target = ours.test[index]
        assert torch.equal(image[0], theirs.data[index]) and target == int(theirs.targets[index])


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.fault(20, "damaged files")
def test_damaged_fashion_mnist_is_named(tmp_path: Path, zipped: bool) -> None:
    _write_fashion_mnist(tmp_path, zipped)
    path = tmp_path / ("t10k-images-idx3-ubyte" + (".gz" if zipped else ""))
    for damage in (_truncate, lambda path: path.write_bytes(b"\x1f\x8b<html>not found</html>")):
        damage(path)
        with pytest.raises(
            ConfigError, match=rf"^data\.root: cannot read {path}: .*get the file again$"
        ):
            _load("fashion-mnist", tmp_path)


def test_fashion_mnist_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    _write_fashion_mnist(tmp_path, zipped=False)
    other = tmp_path / "other"
    _write_fashion_mnist(other, zipped=False, sizes=(5, 3))
    (other / "train-labels-idx1-ubyte").rename(tmp_path / "train-labels-idx1-ubyte")
    with pytest.raises(ConfigError, match="do not belong together: 6 images, 5 classes"):
        _load("fashion-mnist", tmp_path)


def test_images_of_another_size_are_not_fashion_mnist(tmp_path: Path) -> None:
    _write_fashion_mnist(tmp_path, zipped=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", 6, 8, 8) + bytes(6 * 8 * 8))
    with pytest.raises(ConfigError, match=f"{path} holds images of 8x8"):
        _load("fashion-mnist", tmp_path)


# --- CIFAR ------------------------------------------------------------------------------------

CIFARS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def _write_cifar(root: Path, kind: type[Any], patch: pytest.MonkeyPatch, size: int = 4) -> None:
    """Tiny files in the authors' format; torchvision's list of MD5 is made to be theirs."""
    place = root / kind.base_folder
    place.mkdir(parents=True)
    fine = kind is datasets.CIFAR100
    rng = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> str:
        (place / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((place / name).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        patch.setattr(
            kind,
            attribute,
            [
                [name, write(name, _cifar_batch(rng, size, "fine_labels" if fine else "labels"))]
                for name, _ in getattr(kind, attribute)
            ],
        )
    names = [f"class {number}" for number in range(100 if fine else 10)]
    md5 = write(kind.meta["filename"], {kind.meta["key"]: names})
    patch.setattr(kind, "meta", {**kind.meta, "md5": md5})


def _cifar_batch(rng: np.random.Generator, size: int, labels: str) -> dict[str, Any]:
    return {
        "data": rng.integers(0, 256, (size, 3072), dtype=np.uint8),
        labels: list(range(size)),
    }


@pytest.mark.parametrize("name", CIFARS)
def test_cifar_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _write_cifar(tmp_path, CIFARS[name], monkeypatch)
    loaded = _load(name, tmp_path)
    assert _sizes(loaded) == ({"cifar10": 20, "cifar100": 4}[name], 4)
    assert loaded.num_classes == {"cifar10": 10, "cifar100": 100}[name]
    assert loaded.sample_shape == (3, 32, 32)
    assert _targets(loaded.test) == [0, 1, 2, 3]
    _image(loaded)


@pytest.mark.parametrize("name", CIFARS)
@pytest.mark.fault(20, "damaged files")
def test_damaged_cifar_is_refused_before_it_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _write_cifar(tmp_path, CIFARS[name], monkeypatch)
    path = tmp_path / CIFARS[name].base_folder / CIFARS[name].train_list[0][0]
    _truncate(path)
    monkeypatch.setattr(pickle, "load", None)
    with pytest.raises(ConfigError, match=rf"^data\.root: {path} is damaged: .*unpack cifar-10"):
        _load(name, tmp_path)


def test_missing_file_of_cifar_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    place = tmp_path / "cifar-10-batches-py"
    (place / "data_batch_3").unlink()
    with pytest.raises(ConfigError, match=f"looked for data_batch_3 in {place}; unpack cifar-10"):
        _load("cifar10", tmp_path)


# --- images in folders ------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three training and two test images of each of two classes."""
    rng = np.random.default_rng(0)
    for split, size in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for number in range(size):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return tmp_path


def test_image_folder_is_read(images: Path) -> None:
    loaded = _load("image-folder", images, image_size=16)
    assert _sizes(loaded) == (6, 4)
    assert (loaded.num_classes, loaded.sample_shape) == (2, (3, 16, 16))
    assert _targets(loaded.test) == [0, 0, 1, 1]
    _image(loaded)
    assert loaded.test[0][0].shape == (3, 16, 16)


def test_missing_split_folder_is_named(images: Path) -> None:
    (images / "val").rename(images / "test")
    with pytest.raises(
        ConfigError, match=rf"^data\.root: cannot use {images / 'val'}: .*one folder"
    ):
        _load("image-folder", images)


@pytest.mark.parametrize("emptied", ["train", "train/dog"])
@pytest.mark.fault(20, "folders without images")
def test_folder_without_images_is_named(images: Path, emptied: str) -> None:
    (images / emptied).rename(images / "away")
    (images / emptied).mkdir()
    with pytest.raises(ConfigError, match=rf"^data\.root: cannot use {images / 'train'}: "):
        _load("image-folder", images)


@pytest.mark.parametrize(("split", "other"), [("train", "val"), ("val", "train")])
def test_splits_of_different_classes_are_refused(images: Path, split: str, other: str) -> None:
    place = images / split / "emu"
    place.mkdir()
    Image.new("RGB", (20, 20)).save(place / "0.png")
    with pytest.raises(
        ConfigError, match=f"1 classes of {images / split} are not in {images / other}, .* emu; "
    ):
        _load("image-folder", images)


@pytest.mark.parametrize(
    ("damage", "num_workers"),
    # After an error torch waits for five seconds until a loader process is gone.
    [(_truncate, 0), (lambda path: path.write_bytes(b"no image"), 0), (_truncate, 1)],
)
def test_damaged_image_is_named_without_a_traceback(
    images: Path, damage: Any, num_workers: int
) -> None:
    path = images / "val" / "dog" / "1.png"
    damage(path)
    config = DataConfig(
        name="image-folder", root=str(images), image_size=16, num_workers=num_workers
    )
    loader = data.test_loader(data.load_data(config), config, 0, 1, CPU)
    with pytest.raises(ConfigError) as caught:
        list(loader)
    assert str(caught.value).startswith(f"data.root: cannot read the image {path}: ")
    assert str(caught.value).endswith("; replace or remove it")
    assert "Traceback" not in str(caught.value)


# --- all data sets on files -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "image-folder"])
@pytest.mark.fault(20, "missing folders")
def test_missing_data_say_where_they_were_looked_for(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.root: .*{tmp_path / 'nowhere'}"):
        _load(name, tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "image-folder"])
def test_root_that_cannot_be_looked_into_is_a_mistake_of_the_user(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.root: "):
        _load(name, Path("x" * 5000))


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "image-folder"])
def test_root_of_a_user_who_is_not_there_is_told(name: Any) -> None:
    with pytest.raises(ConfigError, match="there is no such user"):
        data.load_data(DataConfig(name=name, root="~nobody.of.that.name/x"))


def test_relative_root_is_reported_as_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=str(tmp_path / "here" / "cifar-10-batches-py")):
        _load("cifar10", Path("here"))


@pytest.fixture(params=["fashion-mnist", "cifar10", "image-folder"])
def written(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The settings of a data set with augmentation."""
    if request.param == "fashion-mnist":
        _write_fashion_mnist(tmp_path, zipped=True)
    elif request.param == "cifar10":
        _write_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    else:
        request.getfixturevalue("images")
    return {"name": request.param, "root": tmp_path, "image_size": 16}


def _draws(loaded: Data) -> set[bytes]:
    return {_image(loaded).numpy().tobytes() for _ in range(20)}


def test_augmentation_moves_training_images_and_can_be_turned_off(written: dict[str, Any]) -> None:
    assert len(_draws(_load(**written))) > 1
    still = _load(**written, augment=False)
    assert len(_draws(still)) == 1
    assert torch.equal(still.test[0][0], _load(**written).test[0][0])


# --- loaders ----------------------------------------------------------------------------------


def test_accuracy_may_be_measured_on_the_training_split_without_augmentation(
    written: dict[str, Any],
) -> None:
    usual, plain = _load(**written), _load(**written, augment=False)
    loaded = _load(**written, test_split="train")
    assert _sizes(loaded) == (len(usual.train), len(usual.train))
    assert loaded.description == f"{usual.description}; accuracy is measured on the training split"
    for _ in range(3):
        assert torch.equal(loaded.test[0][0], plain.train[0][0])
    assert _targets(loaded.test) == _targets(plain.train)
    assert len(_draws(loaded)) > 1  # the training itself is augmented


def test_images_are_normalised_by_the_given_mean_and_deviation(written: dict[str, Any]) -> None:
    loaded = _load(**written, mean=0.5, std=0.25)
    channels = loaded.sample_shape[0]
    assert loaded.normalization == Normalization((0.5,) * channels, (0.25,) * channels)


def test_digits_are_normalised_by_the_given_mean_and_deviation() -> None:
    images, _ = data.load_data(DataConfig(mean=0.5, std=0.5)).train.tensors  # type: ignore[attr-defined]
    assert (images.min(), images.max()) == (-1, 1)


@pytest.mark.parametrize("given", [{"mean": 0.5}, {"std": 0.5}])
def test_mean_and_deviation_go_together(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="mean and std go together; give both or neither"):
        DataConfig(**given)


def _epoch(loaded: Data, config: DataConfig, epoch: int, **where: Any) -> list[torch.Tensor]:
    """The batches of images of one epoch, from a fresh loader."""
    place = {"rank": 0, "world_size": 1, "seed": 0, **where}
    loader = data.train_loader(loaded, config, device=CPU, **place)
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [batch for batch, _ in loader]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_each_epoch_evenly_and_without_overlap(world_size: int) -> None:
    config = DataConfig(batch_size=60)
    loaded = data.load_data(config)
    ranks = [
        _epoch(loaded, config, 0, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {1437 // 60}
    assert {len(batch) for batches in ranks for batch in batches} == {60 // world_size}
    whole = torch.cat([batch for batches in ranks for batch in batches])
    assert len({image.numpy().tobytes() for image in whole}) == len(whole)


def test_epochs_and_seeds_shuffle_differently() -> None:
    config = DataConfig()
    loaded = data.load_data(config)
    first = _epoch(loaded, config, 0)[0]
    assert torch.equal(first, _epoch(loaded, config, 0)[0])
    assert not torch.equal(first, _epoch(loaded, config, 1)[0])
    assert not torch.equal(first, _epoch(loaded, config, 0, seed=1)[0])


def test_augmentation_is_the_same_in_a_resumed_run_with_any_number_of_workers(
    written: dict[str, Any],
) -> None:
    """An epoch has the same images whether or not earlier ones were drawn by the same loader."""
    loaded = _load(**written)
    settings = {**written, "root": str(written["root"]), "batch_size": 2}
    here, workers = DataConfig(**settings), DataConfig(**settings, num_workers=2)
    fresh = _epoch(loaded, here, 1)
    loader = data.train_loader(loaded, workers, 0, 1, 0, CPU)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        lasting = [batch for batch, _ in loader]
    assert all(torch.equal(one, other) for one, other in zip(fresh, lasting, strict=True))
    assert not any(torch.equal(fresh[0], batch) for batch in _epoch(loaded, here, 2))


def test_loaders_leave_the_global_random_state_alone(written: dict[str, Any]) -> None:
    loaded = _load(**written)
    config = DataConfig(**{**written, "root": str(written["root"]), "batch_size": 2})
    before = torch.get_rng_state()
    _epoch(loaded, config, 0)
    list(data.test_loader(loaded, config, 0, 1, CPU))
    assert torch.equal(torch.get_rng_state(), before)


def test_shards_of_the_test_split_are_a_permutation_of_it() -> None:
    config = DataConfig(batch_size=63)
    loaded = data.load_data(config)
    loaders = [data.test_loader(loaded, config, rank, 3, CPU) for rank in range(3)]
    images = torch.cat([images for loader in loaders for images, _ in loader])
    expected: torch.Tensor = loaded.test.tensors[0]  # type: ignore[attr-defined]
    assert len(images) == len(expected)
    assert torch.equal(images[_row_order(images)], expected[_row_order(expected)])


def _row_order(images: torch.Tensor) -> list[int]:
    rows = [tuple(image.flatten().tolist()) for image in images]
    return sorted(range(len(rows)), key=lambda index: rows[index])


@pytest.mark.parametrize("world_size", [2, 7, 8])
def test_test_shards_differ_by_one_sample_at_most(tmp_path: Path, world_size: int) -> None:
    _write_fashion_mnist(tmp_path, zipped=False, sizes=(60, 5))
    config = DataConfig(name="fashion-mnist", root=str(tmp_path), batch_size=world_size)
    loaded = data.load_data(config)
    counts = [
        sum(len(targets) for _, targets in data.test_loader(loaded, config, rank, world_size, CPU))
        for rank in range(world_size)
    ]
    assert sum(counts) == 5 and max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("batch_size", "world_size", "advice"), [(65, 4, "use 64 or 68"), (3, 4, "use 4")]
)
@pytest.mark.fault(20, "a batch that the ranks cannot share")
def test_batch_that_cannot_be_shared_out_is_refused(
    batch_size: int, world_size: int, advice: str
) -> None:
    config = DataConfig(batch_size=batch_size)
    loaded = data.load_data(config)
    message = rf"^data\.batch_size: {batch_size} is not divisible by {world_size} ranks; {advice}$"
    with pytest.raises(ConfigError, match=message):
        data.train_loader(loaded, config, 0, world_size, 0, CPU)
    with pytest.raises(ConfigError, match=message):
        data.test_loader(loaded, config, 0, world_size, CPU)


@pytest.mark.fault(20, "an empty split, fewer samples than a batch")
def test_batch_larger_than_the_training_split_is_refused() -> None:
    config = DataConfig(batch_size=1438)
    with pytest.raises(ConfigError, match=r"^data\.batch_size: 1438 is more than the 1437 samples"):
        data.train_loader(data.load_data(config), config, 0, 1, 0, CPU)


def test_memory_is_pinned_for_cuda_only() -> None:
    config = DataConfig()
    loaded = data.load_data(config)
    for device in ("cpu", "cuda"):
        loader = data.train_loader(loaded, config, 0, 1, 0, torch.device(device))
        assert loader.pin_memory == (device == "cuda")
