"""How often the host waits for a device, and how many operations a step has."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

import worm_dist
from tests.nets import Residual, random_images
from tests.operations import num_operations
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.synchronisations import as_on_device, on_device, synchronisations
from worm_dist import Engine, Phase, WormConfig
from worm_dist.comm_hooks import packing
from worm_dist.comm_hooks.packing import Packing
from worm_dist.engine import usage_errors
from worm_dist.groups.freeze_plan import Block
from worm_dist.truncation import slices


def _engine(truncation: dict[str, Any]) -> Engine:
    torch.manual_seed(0)
    model = DistributedDataParallel(Residual())
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    config = WormConfig(search={"every": "4ba"}, truncation=truncation)
    images = random_images(1)
    return worm_dist.attach(model, optimizer, config, example_inputs=images, steps_per_epoch=4)


def _step(model: torch.nn.Module, optimizer: Optimizer, engine: Engine | None) -> None:
    loss = model(random_images(8)).square().mean()
    if engine is not None:
        engine.watch(loss)
        loss = loss + engine.penalty()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _waits() -> dict[str, list[int]]:
    """Waits in each step and check while searching, fading, and after all are gone."""
    engine = _engine({"removal": {"duration": "8ba", "fade_steps": 3}})
    as_on_device(engine.model.get_submodule("module"))
    # It refuses moments of another class than tensor's, such as quantized ones.
    vars(usage_errors)["require_cuttable"] = lambda *_: None
    found: dict[str, list[int]] = {"step": [], "check": [], "to remove": []}
    while engine.step < 40:
        with synchronisations() as waits:
            _step(engine.model, engine.optimizer, engine)
            found["step"].append(waits.total())
        with synchronisations() as waits:
            due, phase = engine.is_due, engine.phase
            engine.check()
        if due and phase is engine.phase is Phase.SEARCH:
            found["check"].append(waits.total())
        elif due:
            found["to remove"].append(waits.total())
    assert engine.phase is Phase.TRUNCATE
    return found


def test_a_step_does_not_wait_for_the_device_and_a_check_three_times(ranks: Ranks) -> None:
    """A check copies scores, digests and the verdict to the host.  A step waits only if it has
    probed columns: what the ranks agree on decides what the next step sends."""
    for found in ranks(2, _waits):
        assert found["check"] and set(found["check"]) == {3}
        # As removal begins the limit of the loss is set, and decided on.  Statistics are not
        # estimated then, but by later checks.
        assert max(found["to remove"]) == 6
        assert set(found["step"]) <= {0, 1} and sum(found["step"]) <= 4


def test_what_would_wait_is_noticed() -> None:
    """The instrument itself."""
    values = on_device(torch.arange(4.0))
    with synchronisations() as waits:
        assert not waits.total()
        assert (values * 2).sum().item() == 12
        assert bool(values.max() > 1)
        assert values[values > 1].shape == (2,)
        assert not isinstance(values.cpu(), type(values))
        assert torch.zeros(2).to(torch.device("cpu")).tolist() == [0, 0]
        assert waits == Counter(["item", "__bool__", "__getitem__", "cpu", "tolist"])


def test_packing_does_not_wait() -> None:
    flags = torch.tensor([True, False, True, False])
    live, frozen = flags.nonzero().flatten(), (~flags).nonzero().flatten()
    bucket = on_device(torch.randn(4 + 4 * 100))
    blocks = [
        Block(torch.Size(shape), {0: on_device(live)}, {0: on_device(frozen)})
        for shape in ((4,), (4, 100))
    ]
    gradients: list[Tensor] = [bucket[:4], bucket[4:].view(4, 100)]
    with synchronisations() as waits:
        layout = Packing(blocks, gradients, bucket)
        layout.pack(bucket)
        layout.unpack(bucket)
    assert not waits


def _operations() -> dict[str, int]:
    """Operations of a step beyond those of DistributedDataParallel, as an accelerator has them."""
    packing._SHORT_ROW, slices._MERGED_ON_CPU = 2**62, slices._MERGED
    plain = DistributedDataParallel(Residual())
    optimizer = SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        _step(plain, optimizer, None)
    of_ddp = num_operations(lambda: _step(plain, optimizer, None))
    found = {}

    def step() -> None:
        _step(engine.model, engine.optimizer, engine)

    engine = _engine({"frozen_weights": "hold"})
    for generation in range(5):
        engine.truncate(mask_dropping(engine.groups, *range(1 + generation % 2)))
        for _ in range(3):
            step()
        more = num_operations(step) - of_ddp
        found[f"held, generation {generation}"] = more
    engine = _engine({"removal": {"duration": "2ba", "fade_steps": 2}})
    engine.truncate(mask_dropping(engine.groups, 0))
    for _ in range(12):
        step()
    found["removed"] = num_operations(step) - of_ddp
    return found


def test_operations_do_not_grow_with_parameters_or_generations(ranks: Ranks) -> None:
    """Once every frozen slice was packed, unpacked and held by itself, up to nine operations a
    parameter, and a fade had two more for each scale for ever."""
    (found,) = ranks(1, _operations)
    held = {more for case, more in found.items() if case != "removed"}
    # Two for each of the network's scales belong to the penalty.
    assert (held, found["removed"]) == ({21}, 31)
