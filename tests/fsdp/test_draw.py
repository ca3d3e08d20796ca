"""A draw of a sharded network: undone if it fails anywhere; what users have set stays."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import worm_dist
from tests.failing import BROKEN, broken
from tests.fsdp.masked import masked
from tests.fsdp.row import ROWS
from tests.fsdp.trainee import Trainee, full
from tests.nets import Residual, random_images
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.resuming import differences
from tests.settings import at_once
from worm_dist import CheckpointError, ConfigError, DrawError, WormConfig

_CONFIG = WormConfig(
    search={"every": "1ba", "l1": 0.01},
    truncation={"frozen_weights": "hold", **at_once(2)},
    ticket={"recalibrate_batches": 2},
)
_DROPPED = (0, 3, 9)
_PLACES = (
    "after the rehearsal",
    "before the wrapper is released",
    "after the network was cut",
    "after the new wrapper",
)


def _state(trainee: Trainee) -> dict[str, Any]:
    modules = trainee.network.named_modules()
    return {
        "weights": trainee.weights,
        "moments": trainee.moments,
        "gradients": [
            None if p.grad is None else p.grad.to_local().clone()  # type: ignore[attr-defined]
            for p in trainee.network.parameters()
        ],
        "buffers": {name: buffer.clone() for name, buffer in trainee.network.named_buffers()},
        "modules": {
            name: (
                type(module).__name__,
                module.training,
                [getattr(h, "__qualname__", type(h)) for h in module._forward_pre_hooks.values()],
                len(module._forward_hooks),
                len(module._state_dict_pre_hooks),
                len(module._load_state_dict_post_hooks),
            )
            for name, module in modules
        },
        "owners": [id(p) for group in trainee.optimizer.param_groups for p in group["params"]],
        "phase": trainee.engine.phase.value,
    }


def _undone() -> list[str]:
    """What is wrong after a draw has failed at each place in turn, and then succeeds."""
    row = ROWS["SGD"]
    alone, failing = Trainee(row, _CONFIG), Trainee(row, _CONFIG)
    wrong: list[str] = []
    for trainee in (alone, failing):
        trainee.step(0)
        trainee.engine.truncate(mask_dropping(trainee.engine.groups, *_DROPPED))
        trainee.step(1)
    for place in _PLACES:
        before = _state(failing)
        try:
            with broken(place, 1):
                failing.engine.draw(mask_dropping(failing.engine.groups, *_DROPPED))
        except DrawError as error:
            if BROKEN not in str(error) or "rank 1: " not in str(error):
                wrong.append(f"{place}: {error}")
        else:
            wrong.append(f"{place}: drawn")
        wrong += differences(before, _state(failing), place)
    for trainee in (alone, failing):
        trainee.step(2)
        trainee.engine.draw(mask_dropping(trainee.engine.groups, *_DROPPED))
        trainee.step(3)
    for one, other in ((alone.weights, failing.weights), (alone.moments, failing.moments)):
        wrong += differences(one, other, "in the end")
    return wrong


def test_a_draw_that_fails_anywhere_leaves_everything_as_it_was(ranks: Ranks) -> None:
    for wrong in ranks(2, _undone):
        assert not wrong, "\n".join(wrong[:20])


def _arguments() -> tuple[dict[str, Any], dict[str, Any]]:
    """How torch has sharded a network before and after a draw, and who comes first in a pass."""
    network: Any = Residual()
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
    fully_shard([network.conv1, network.bn1], reshard_after_forward=True, mp_policy=policy)
    fully_shard(network.head, reshard_after_forward=False)
    fully_shard(network)
    network.set_modules_to_forward_prefetch([network.head])
    network.set_requires_gradient_sync(False)
    network.head.set_gradient_divide_factor(3.0)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    engine = worm_dist.attach(network, optimizer, _CONFIG, example_inputs=random_images(1))

    def described() -> dict[str, Any]:
        states = {
            name: module._get_fsdp_state()
            for name, module in network.named_modules()
            if isinstance(module, FSDPModule)
        }
        names = {id(state): name for name, state in states.items()}
        return {
            name: [
                names[id(state)],
                len(state._modules),
                state._auto_reshard_after_forward,
                [names[id(other)] for other in state._states_to_forward_prefetch],
                *(
                    (
                        [p._module_info.param_name for p in group.fsdp_params],
                        group.post_forward_mesh_info is None,
                        str(group.mp_policy),
                        group.reduce_grads,
                        group.gradient_divide_factor,
                    )
                    for group in state._fsdp_param_groups
                ),
                [getattr(h, "__name__", type(h).__name__) for h in _hooks(network, name)],
            ]
            for name, state in states.items()
        }

    before = described()
    engine.draw(mask_dropping(engine.groups, *_DROPPED[:2]))
    return before, described()


def _hooks(network: nn.Module, name: str) -> list[Any]:
    return [*network.get_submodule(name)._forward_pre_hooks.values()]


def _saved_where_a_file_is(folder: str) -> tuple[str, bool]:
    """What is said of a folder that cannot be made; and whether the next one can be."""
    trainee = Trainee(ROWS["SGD"], _CONFIG)
    trainee.step(0)
    trainee.engine.draw(mask_dropping(trainee.engine.groups, *_DROPPED))
    (blocked := Path(folder, "ticket")).touch()
    said = ""
    try:
        trainee.engine.save_ticket(blocked)
    except CheckpointError as error:
        said = str(error)
    trainee.engine.save_ticket(Path(folder, "elsewhere"))
    return said, Path(folder, "elsewhere", "ticket.json").exists()


def test_a_ticket_that_cannot_be_written_fails_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    """Rank zero alone writes, and raised alone: the other ranks went on, and waited for it in their
    next collective."""
    for said, is_saved in ranks(2, _saved_where_a_file_is, str(tmp_path)):
        assert said == f"save_ticket: rank 0: {tmp_path / 'ticket'}: cannot be written: File exists"
        assert is_saved


def _saved_with_a_wrong_model(folder: str) -> str:
    """What this rank says; rank one names no model."""
    trainee = Trainee(ROWS["SGD"], _CONFIG)
    trainee.step(0)
    trainee.engine.draw(mask_dropping(trainee.engine.groups, *_DROPPED))
    try:
        trainee.engine.save_ticket(folder, {} if dist.get_rank() == 1 else None)
    except ConfigError as error:
        return str(error)
    return "nothing"


def test_a_wrong_model_on_one_rank_is_refused_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    """That rank alone raised, and the other one waited for it."""
    call = 2, _saved_with_a_wrong_model, str(tmp_path / "ticket")
    for outcome in ranks.outcomes(*call, group_timeout=600, idle_limit=20):
        assert outcome.exitcode == 0, str(outcome)
        assert outcome.value.startswith("rank 1: save_ticket: model: name: Field required")
    assert not (tmp_path / "ticket").exists()


def test_a_draw_shards_again_in_the_same_way(ranks: Ranks) -> None:
    for before, after in ranks(2, _arguments):
        # Inputs are no longer recorded once the ticket is drawn.
        before[""][-1].remove("RecordedInputs")
        assert after == before


def _with_gradients_of_some() -> list[Tensor]:
    """Weights after steps in which a layer is not used, beside those of a masked dense run."""

    class Optional(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(8, 10)

    found = []
    for is_masked in (False, True):
        torch.manual_seed(0)
        network = Optional()
        fully_shard(network)
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        with masked() if is_masked else nullcontext():
            engine = worm_dist.attach(network, optimizer, _CONFIG, example_inputs=random_images(1))
        network.bn0.weight.requires_grad_(False)
        engine.truncate(mask_dropping(engine.groups, *_DROPPED[:2]))
        for number in range(3):
            loss = network(random_images(4, seed=number)).square().mean() + engine.penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            network.bn0.weight.requires_grad_(number > 0)
        found.append(torch.cat([full(p).flatten() for p in network.parameters()]))
    return found


def test_parameters_without_a_gradient_are_left_out(ranks: Ranks) -> None:
    for packed, dense in ranks(2, _with_gradients_of_some):
        assert torch.equal(packed, dense)


def _penalised() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a penalty alone, of the shards and under DDP, with three channels frozen."""
    found = []
    row = ROWS["SGD"]
    for is_sharded in (True, False):
        trainee = Trainee(row, _CONFIG, is_sharded)
        trainee.step(0)
        norms = [m for m in trainee.network.modules() if isinstance(m, nn.BatchNorm2d)]
        norms[0].requires_grad_(False)  # rests while channels freeze, and trains again
        trainee.engine.truncate(mask_dropping(trainee.engine.groups, *_DROPPED))
        norms[0].requires_grad_(True)
        trainee.optimizer.zero_grad()
        loss = trainee.engine.model(random_images(2)).sum() * 0 + trainee.engine.penalty()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trainee.network.parameters(), 1.0)
        whole = [full(p.grad).flatten() for p in trainee.network.parameters() if p.grad is not None]
        found += [torch.cat(whole), full(norm)]
    one, norm, other, other_norm = found
    return one, other, norm, other_norm


def test_the_penalty_leaves_frozen_scales_out(ranks: Ranks) -> None:
    for one, other, norm, other_norm in ranks(2, _penalised):
        assert bool(one.any()) and torch.equal(one, other)
        torch.testing.assert_close(norm, other_norm)
