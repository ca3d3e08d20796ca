"""The ticket of a trained network: its own scores decide what a forecast drops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from worm_dist import WormConfig, WormError
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.manifest import CheckpointInfo
from worm_dist.models import build_model
from worm_dist.planning.forecast import Forecast, forecast
from worm_dist.planning.forecast_json import as_dict
from worm_dist.planning.table import show
from worm_dist.planning.target import Target

SHAPE = (1, 8, 8)
BUDGET = {"threshold": "global", "budget": {"flops": 0.25}}


def _trained(seed: int) -> nn.Module:
    """The scales of the first layer are lower than all others."""
    torch.manual_seed(seed)
    network = build_model("vgg_small", 10, SHAPE[0])
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1)
    nn.init.uniform_(norms[0].weight, 0.1, 0.2)
    return network


def _forecast(weights: Path | None) -> Forecast:
    worm = WormConfig(search=BUDGET, ticket={"round_to": 1})
    return forecast(Target("vgg_small", SHAPE, 10, worm), None, None, None, weights)


def test_scores_decide_which_channels_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = _trained(0)
    torch.save(network.state_dict(), tmp_path / "dense.pt")
    found = _forecast(tmp_path / "dense.pt")
    # All that the floor does not protect, and of those left the highest.
    first, scales = found.mask["features.0"], dict(network.named_parameters())["features.1.weight"]
    assert int(first.sum()) == 4
    assert bool(first[scales.argsort()[-4:]].all())
    assert found.budget_reached is not None and 0.24 < found.budget_reached <= 0.25
    assert as_dict(found)["dropped"]["by"] == "scores"
    assert as_dict(found)["dropped"]["mask_digest"] == found.mask.digest
    assert int(_forecast(None).mask["features.0"].sum()) > 10
    show(found)
    text = " ".join(capsys.readouterr().out.split())
    assert "The scores are those of " in text and "scores say nothing" not in text


def test_all_three_kinds_of_files_are_read(tmp_path: Path) -> None:
    state = _trained(0).state_dict()
    torch.save(state, tmp_path / "dense.pt")
    save_file(state, tmp_path / "dense.safetensors")
    about = CheckpointInfo(step=7, world_size=1, phase="dense", value=None)
    checkpoint = CheckpointManager(tmp_path / "checkpoints").save(
        about, {"run": {"network": state}}
    )
    masks = {
        _forecast(path).mask.digest
        for path in (tmp_path / "dense.pt", tmp_path / "dense.safetensors", checkpoint)
    }
    assert len(masks) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "nothing.pt cannot be read: .*No such file"),
        (b"not a file of torch", "nothing.pt cannot be read"),
        (b"not one of these", "nothing.safetensors cannot be read"),
        ([1, 2], "nothing.pt holds no state dict"),
        ({"head.weight": torch.zeros(10, 64)}, "features.0.weight is missing, not .32, 1, 3, 3."),
    ],
)
def test_other_weights_are_refused(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / message.partition(" ")[0]
    path = path if path.suffix == ".safetensors" else tmp_path / "nothing.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(WormError, match=f"--weights: .*{message}"):
        _forecast(path)
