"""The public names from a plain script outside the package, on two ranks."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import worm_dist
from tests.programs import call, variables_of_ranks

# Everything below is what a user would write; it imports nothing but worm_dist itself.
SCRIPT = """
import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import worm_dist as worm


def dense_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Flatten(), nn.Linear(12 * 16, 10),
    )


def train(engine, steps):
    for _ in range(steps):
        x, y = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
        loss = nn.functional.cross_entropy(engine.model(x), y) + engine.penalty()
        loss.backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()


dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
net = dense_network()
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
engine = worm.attach(
    model,
    optimizer,
    worm.WormConfig(truncation={"removal": {"duration": "4ba"}}),
    example_inputs=torch.randn(1, 1, 8, 8),
)
said = {"groups": [(group.name, group.num_channels) for group in engine.groups]}

# A decision from elsewhere: keep the channels whose filters are large.
mask = worm.Mask({
    group.name: (norms := net.get_submodule(group.name).weight.detach().flatten(1).norm(dim=1))
    > norms.median()
    for group in engine.groups
})
train(engine, 3)
try:
    engine.draw()
except worm.ConfigError as error:
    said["refused"] = str(error)
engine.truncate(mask)
train(engine, 6)
said["phase"] = engine.phase
said["saved"] = 1 - engine.traffic.sent_bytes / engine.traffic.dense_bytes
said["faded"] = float(net[1].weight.detach()[~mask["0"]].abs().max())
engine.draw()  # what has left
train(engine, 3)
said["widths"] = [net[0].out_channels, net[3].out_channels, net[7].in_features]
folder = sys.argv[1]
if dist.get_rank() == 0:
    engine.save_ticket(folder)
dist.barrier()
small = worm.load_ticket(folder, build=dense_network)
x = torch.randn(5, 1, 8, 8)
net.eval(), small.eval()
said["equal"] = torch.equal(net(x), small(x))
net.train()
engine.detach()
train(engine, 2)
said["hooks"] = [len(net._forward_pre_hooks), len(optimizer._optimizer_step_post_hooks)]
print(json.dumps(said)) if dist.get_rank() == 0 else None
dist.destroy_process_group()
"""


@pytest.mark.slow("trains a whole run")
def test_a_decision_from_elsewhere_is_truncated_drawn_saved_and_loaded(tmp_path: Path) -> None:
    script = tmp_path / "elsewhere.py"
    script.write_text(SCRIPT)
    first, second = call([script, tmp_path / "ticket"], tmp_path, variables_of_ranks(2))
    assert (first.exitcode, second.exitcode) == (0, 0), first.err + second.err
    said = json.loads(first.out.strip().splitlines()[-1])
    assert said["groups"] == [["0", 8], ["3", 12]]
    assert said["phase"] == "truncate"
    # Weights, bias, scale and shift of 8 and 12 filters, and the head; 4 and 6 filters are left.
    dense = (8 * 9 + 3 * 8) + (12 * 8 * 9 + 3 * 12) + (12 * 16 * 10 + 10)
    ticket = (4 * 9 + 3 * 4) + (6 * 4 * 9 + 3 * 6) + (6 * 16 * 10 + 10)
    assert said["saved"] == pytest.approx(1 - ticket / dense)
    assert said["faded"] == 0.0
    assert "no check has found the ticket yet" in said["refused"]
    assert said["widths"] == [4, 6, 96]
    assert said["equal"]
    assert said["hooks"] == [0, 0]


HELP = """
import contextlib, io, sys
import worm_dist
assert not {"numpy", "pydantic", "yaml"} & sys.modules.keys()
from worm_dist.__main__ import main
for command in "train", "init", "plan", "doctor", "ticket", "replay", "report", "bench":
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main([command, "--help"])
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_the_command_line_and_its_mistakes_need_no_torch() -> None:
    """They took six seconds, of which torch and what it brings along were all but a third of
    one; scripts in launch/ check the settings before they start any rank."""
    done = subprocess.run([sys.executable, "-c", HELP], check=True, capture_output=True, text=True)
    slow = {"jinja2", "kneed", "matplotlib", "numpy", "rich", "sklearn", "tensorboard", "torch"}
    loaded = {*done.stdout.split()}
    assert "pydantic" in loaded  # what is looked for would be seen
    assert not slow & loaded


def test_names_of_a_star_import_and_of_pickles_are_those_of_the_package() -> None:
    names: dict[str, object] = {}
    exec("from worm_dist import *", names)
    for name in worm_dist.__all__:
        assert names[name] is getattr(worm_dist, name)
        assert pickle.loads(pickle.dumps(names[name])) is names[name]


def test_names_are_found_and_no_others() -> None:
    assert {getattr(worm_dist, name).__name__ for name in worm_dist.__all__} == {*worm_dist.__all__}
    assert {*worm_dist.__all__} <= {*dir(worm_dist)}
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        worm_dist.atach  # noqa: B018
