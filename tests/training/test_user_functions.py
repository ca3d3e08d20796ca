"""Models and data of the user, named in the settings as ``package.module:function``."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import worm_dist
from tests.programs import call, variables_of_ranks
from worm_dist import ConfigError
from worm_dist.__main__ import main
from worm_dist.models import build_model
from worm_dist.planning.target import target_of, target_of_config
from worm_dist.training.data import load_data
from worm_dist.training.run_config import DataConfig

# A class is a pattern: stripes along one side of the image, along the other, or both.
MINE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


def network(num_classes, in_channels, width=16):
    def block(inputs):
        return nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()

    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)
    return nn.Sequential(*block(in_channels), *block(width), *pooled)


def data(config):
    classes = torch.arange(576) % 3
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    patterns = torch.stack([rows % 2, columns % 2, (rows + columns) % 2]).float()[:, None]
    images = patterns[classes] + 0.1 * torch.randn(
        576, 1, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    return TensorDataset(images[:512], classes[:512]), TensorDataset(images[512:], classes[512:])
"""
SETTINGS = """
name: mine
epochs: 3
data: {name: "mine:data", batch_size: 32}
model: {name: "mine:network", arguments: {width: 12}}
optimizer: {lr: 0.05}
search: {settled: 1.0, elbow: {min_masks: 2}}
truncation: {removal: {schedule: one_shot}}
"""
_numbers = count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user, new for each test, in the current folder."""
    name = f"mine_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.slow("trains in processes of their own")
def test_a_run_of_the_users_own_is_trained_resumed_planned_and_loaded(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "run.yaml").write_text(SETTINGS)
    words = ["-m", "worm_dist", "train", "run.yaml"]
    first, second = call(words, tmp_path, variables_of_ranks(2))
    assert (first.exitcode, second.exitcode) == (0, 0), first.err + second.err
    assert json.loads((tmp_path / "runs/mine/result.json").read_text())["status"] == "ticket"
    (resumed,) = call([*words, "--epochs", 4, "--resume", "runs/mine"], tmp_path)
    assert resumed.exitcode == 0, resumed.err
    result = json.loads((tmp_path / "runs/mine/result.json").read_text())
    assert (result["status"], result["data"]) == ("ticket", "mine:data: 512 train / 64 test")
    (tmp_path / "load.py").write_text(
        "import worm_dist\n"
        "network = worm_dist.load_ticket('runs/mine/ticket', build='mine:network')\n"
        "print(sum(p.numel() for p in network.parameters()))\n"
        "try:\n"
        "    worm_dist.load_ticket('runs/mine/ticket')\n"
        "except worm_dist.CheckpointError as error:\n"
        "    print(error)\n"
    )
    (loaded,) = call(["load.py"], tmp_path)
    assert loaded.exitcode == 0, loaded.err
    size, refusal = loaded.out.splitlines()
    assert int(size) == result["parameters"]["ticket"] < result["parameters"]["dense"]
    assert "call load_ticket(path, build='mine:network')" in refusal
    (planned,) = call(["-m", "worm_dist", "plan", "run.yaml"], tmp_path)
    assert planned.exitcode == 0, planned.err
    assert "Input 1x8x8, 3 classes." in planned.out


def test_what_the_settings_say_reaches_the_users_functions(module: str) -> None:
    network = build_model(f"{module}:network", 3, 1, {"width": 4})
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    data = load_data(DataConfig(name=f"{module}:data"))
    assert (data.num_classes, data.sample_shape, len(data.test)) == (3, (1, 8, 8), 64)
    path = Path("run.yaml")
    path.write_text(f"data.name: {module}:data\nmodel.name: {module}:network\n")
    target = target_of_config(path, None, None)
    assert (target.sample_shape, target.num_classes) == ((1, 8, 8), 3)
    with pytest.raises(ConfigError, match=r"is a function of yours; give --input and --classes"):
        target_of(f"{module}:network", None, None)


@pytest.mark.parametrize(
    ("key", "name", "added", "message"),
    [
        ("model", "no_such_module:network", "", "there is no module 'no_such_module', neither in"),
        ("model", "M:netwrok", "", r"has no 'netwrok'; did you mean mine_\d+:network\?"),
        ("model", "M:__name__", "", "is of type str; name a function"),
        ("model", "M:1x", "", "does not name a function; write package.module:function"),
        ("model", "M:data", "", r"cannot be called with \(num_classes=..., in_channels=...\)"),
        ("data", "M:network", "", r"cannot be called with \(DataConfig\): missing"),
        ("data", "digit", "", "did you mean digits.*package.module:function"),
        ("data", "M:data", "1 / 0", r"importing it raised ZeroDivisionError.*mine_\d+.py, line \d"),
        ("data", "M:data", "import nothing_there", "importing it raised ModuleNotFoundError"),
        ("data", "M:data", "raise SystemExit", "ends the program when it is imported"),
        ("data", "M:data", "def (", "importing it raised SyntaxError"),
    ],
)
@pytest.mark.fault(13, "functions of the user that cannot be called")
def test_a_function_that_cannot_be_called_is_one_line_of_the_check(
    module: str,
    key: str,
    name: str,
    added: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before any process group is made."""
    Path(f"{module}.py").write_text(f"{MINE}\n{added}\n")
    Path("run.yaml").touch()
    replaced = f"--{key}.name={name.replace('M:', module + ':')}"
    assert main(["train", "run.yaml", "--check", replaced]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    with pytest.raises(ConfigError, match=rf"error: {key}\.name: .*{message}"):
        raise ConfigError(line)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 5", "returned a value of type int; let it return the network"),
        ("return {}['x']", r"raised KeyError: 'x' \(.*mine_\d+.py, line \d+\)$"),
        ("return nn.Linear(-1, 1)", r"raised \w+: .* \(.*mine_\d+.py, line \d+\)$"),
    ],
)
@pytest.mark.fault(13, "a model function that fails")
def test_a_model_function_that_fails_is_named_with_its_place(
    module: str, body: str, message: str
) -> None:
    with Path(f"{module}.py").open("a") as file:
        file.write(f"\n\ndef wrong(num_classes, in_channels):\n    {body}\n")
    with pytest.raises(ConfigError, match=rf"^model\.name: {module}:wrong {message}"):
        build_model(f"{module}:wrong", 3, 1)
    with pytest.raises(ConfigError, match=r"^model\.arguments: remove num_classes"):
        build_model(f"{module}:network", 3, 1, {"num_classes": 3})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 5", "returned a value of type int; let it return the training and"),
        ("return [1], 2", "the test split of M:wrong is of type int; it needs a length"),
        ("return [], []", "the training split of M:wrong is empty"),
        ("return [5], [5]", r"is of type int; it must be an \(image, class\) pair"),
        ("return data(config)[0], [(torch.zeros(1, 8, 8), 0)]", "neither classes nor targets"),
        ("return Data([(torch.zeros(8, 8), 0)], [], 2, (8, 8), '')", r"Tensor of shape \[8, 8\]"),
        ("return Data([('x', 0)], [], 2, (1, 8, 8), '')", "the image is of type str; it must be"),
        ("return Data([(ZEROS, 0.5)], [], 2, (1, 8, 8), '')", "the class is '0.5'; it must be"),
        ("return Data([(ZEROS, 0)], [], 2, (3, 8, 8), '')", r"\[1, 8, 8\], but sample_shape is"),
        ("return Data([(ZEROS.byte(), 0)], [], 2, (1, 8, 8), '')", "of torch.uint8; it must be"),
        ("raise SystemExit('no data')", r"raised SystemExit: no data \(.*mine_\d+.py, line \d+\)"),
        ("return open('nowhere')", r"raised FileNotFoundError: .* \(.*mine_\d+.py, line \d+\)"),
    ],
)
@pytest.mark.fault(13, "a data function that fails")
def test_a_data_function_that_fails_is_named(module: str, body: str, message: str) -> None:
    with Path(f"{module}.py").open("a") as file:
        file.write("\n\nfrom worm_dist.training.data import Data\nZEROS = torch.zeros(1, 8, 8)\n")
        file.write(f"\n\ndef wrong(config):\n    {body}\n")
    with pytest.raises(ConfigError, match=rf"^data\.name: .*{message.replace('M:', module + ':')}"):
        load_data(DataConfig(name=f"{module}:wrong"))


def test_a_ticket_is_loaded_by_the_function_that_it_records_alone(
    module: str, tmp_path: Path
) -> None:
    model = {"name": f"{module}:network", "num_classes": 3, "in_channels": 1}
    network = build_model(**model)  # type: ignore[arg-type]
    engine = worm_dist.attach(
        network,
        torch.optim.SGD(network.parameters(), lr=0.1),
        example_inputs=torch.zeros(1, 1, 8, 8),
    )
    (group, *_) = engine.groups
    keep = {each.name: torch.ones(each.num_channels, dtype=torch.bool) for each in engine.groups}
    keep[group.name][::2] = False
    engine.draw(worm_dist.Mask(keep))
    engine.save_ticket(tmp_path / "ticket", model)
    loaded = worm_dist.load_ticket(tmp_path / "ticket", build=f"{module}:network")
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded.eval()(images), engine.model.eval()(images))
    with pytest.raises(ConfigError, match=r"records the model 'mine_\d+:network'"):
        worm_dist.load_ticket(tmp_path / "ticket", build="os:system")


def test_splits_with_classes_or_targets_say_how_many_classes_there_are(module: str) -> None:
    with Path(f"{module}.py").open("a") as file:
        file.write(
            "\n\nclass Split(list):\n    classes = ['a', 'b', 'c', 'd', 'e']\n"
            "\n\ndef listed(config):\n"
            "    pair = (torch.zeros(1, 8, 8), 0)\n    return Split([pair]), Split([pair])\n"
        )
    assert load_data(DataConfig(name=f"{module}:listed")).num_classes == 5
    assert isinstance(load_data(DataConfig(name=f"{module}:data")).train, TensorDataset)


def test_models_of_timm_have_names_too(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    model = {"name": "timm/resnet10t", "num_classes": 7, "in_channels": 1}
    network = build_model(**model)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    engine = worm_dist.attach(network, optimizer, example_inputs=torch.zeros(1, 1, 32, 32))
    keep = {each.name: torch.ones(each.num_channels, dtype=torch.bool) for each in engine.groups}
    next(iter(keep.values()))[:8] = False
    engine.draw(worm_dist.Mask(keep))
    engine.save_ticket(tmp_path / "ticket", model)
    loaded: nn.Module = worm_dist.load_ticket(tmp_path / "ticket").eval()
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded(images), engine.model.eval()(images))
    assert target_of("timm/resnet10t", None, None).sample_shape == (3, 224, 224)
    for name, arguments, message in (
        ("timm/resnet10", {}, r"did you mean timm/resnet"),
        ("timm/hf-hub:a/b", {}, r"there is no 'timm/hf-hub:a/b'"),
        ("timm/resnet10t", {"pretrained": True}, r"remove pretrained"),
        ("timm/resnet10t", {"checkpoint_path": "x.pth"}, r"remove checkpoint_path"),
        ("timm/resnet10t", {"depth": 3}, r"does not take .*depth"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_model(name, 7, 1, arguments)
