"""What fully_shard can do that has not been verified is refused by name, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import ProcessGroupAllocAllGather
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Replicate
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, random_images
from tests.ranks import Ranks
from worm_dist import WormConfig, WormError

_OFFLOAD = CPUOffloadPolicy(pin_memory=False)
_FP16 = MixedPrecisionPolicy(torch.float16)


def _sharded(**arguments: Any) -> nn.Module:
    network = Plain()
    fully_shard(network, **arguments)
    return network


def _ignoring() -> nn.Module:
    network: Any = Plain()
    fully_shard(network, ignored_params={network.head.weight})
    return network  # type: ignore[no-any-return]


def _hooked() -> nn.Module:
    network: Any = _sharded()
    network.set_all_reduce_hook(lambda _: None)
    return network  # type: ignore[no-any-return]


def _custom() -> nn.Module:
    network: Any = _sharded()
    group = network._get_fsdp_state()._fsdp_param_groups[0]
    network.set_custom_all_gather(ProcessGroupAllocAllGather(group._all_gather_process_group))
    return network  # type: ignore[no-any-return]


def _of_another_torch(owner: str, name: str) -> nn.Module:
    """A network without an attribute of torch's state, parameter group or parameter."""
    network: Any = _sharded()
    state = network._get_fsdp_state()
    (group,) = state._fsdp_param_groups
    delattr({"state": state, "group": group, "parameter": group.fsdp_params[0]}[owner], name)
    return network  # type: ignore[no-any-return]


def _by_columns() -> nn.Module:
    network = Plain(first=6, second=8)
    fully_shard(network, shard_placement_fn=lambda p: Shard(1) if p.shape[1:2] == (6,) else None)
    return network


def _wrapped_before() -> nn.Module:
    network: Any = torch.compile(Plain())
    fully_shard(network)
    return network  # type: ignore[no-any-return]


def _wrapped_inside() -> nn.Module:
    network: Any = Plain()
    network.head = torch.compile(network.head)
    fully_shard(network)
    return network  # type: ignore[no-any-return]


def _tensor_parallel() -> nn.Module:
    network = Plain()
    mesh = init_device_mesh("cpu", (2,))
    network.head.weight = nn.Parameter(
        distribute_tensor(network.head.weight.detach(), mesh, [Replicate()])
    )
    return network


def _replicated() -> nn.Module:
    network = Plain()
    replicate(network)
    return network


def _without_parameters() -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.ReLU())
    fully_shard(network)
    return network


def _over_one_rank() -> nn.Module:
    return _sharded(mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards")))


_NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "offload": (
        lambda: _sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)),
        "CPUOffloadPolicy",
    ),
    "fp16": (lambda: _sharded(mp_policy=_FP16), "fp16"),
    "ignored": (_ignoring, "parameter head.weight is not sharded (ignored_params"),
    "hook": (_hooked, "set_all_reduce_hook"),
    "custom": (_custom, "set_custom_all_gather"),
    **{
        name: (partial(_of_another_torch, owner, name), f"has no attribute {name}; install")
        for owner, name in {
            "group": "reduce_scatter_unused_params",
            "state": "_pre_forward_hook_handle",
            "parameter": "_post_load_hook_handle",
        }.items()
    },
    "columns": (_by_columns, "is sharded by columns (shard_placement_fn)"),
    "wrapped before": (_wrapped_before, "the network is torch.compile's wrapper"),
    "wrapped inside": (_wrapped_inside, "head is torch.compile's wrapper"),
    "tensor parallel": (_tensor_parallel, "DTensors"),
    "replicate": (_replicated, "replicate() is not supported"),
    "no parameters": (_without_parameters, "the network has no parameters"),
    "one rank": (_over_one_rank, "shards over one rank"),
}
_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "soft": ({"mode": "soft"}, "truncation.mode 'soft'"),
    "free": ({"frozen_weights": "free"}, "truncation.frozen_weights 'free'"),
    "compression": ({"compression": "bf16"}, "truncation.compression 'bf16'"),
}


_OTHERS = {
    "compiled autograd": "torch._dynamo.config.compiled_autograd is on",
    "hooked later": "an all-reduce hook has been set since attach",
}


def _hooked_later() -> str:
    """What the next backward pass says."""
    network: Any = _sharded()
    optimizer = SGD(network.parameters(), 0.1)
    engine = worm_dist.attach(network, optimizer, example_inputs=random_images(1))
    network.set_all_reduce_hook(lambda _: None)
    try:
        engine.model(random_images(2)).sum().backward()
    except WormError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _refused() -> dict[str, str]:
    said = {}
    for name, (build, _) in _NETWORKS.items():
        said[name] = _said(build(), WormConfig())
    for name, (truncation, _) in _SETTINGS.items():
        said[name] = _said(_sharded(), WormConfig(truncation=truncation))
    with torch._dynamo.config.patch(compiled_autograd=True):
        said["compiled autograd"] = _said(_sharded(), WormConfig())
    said["hooked later"] = _hooked_later()
    return said


def _said(network: nn.Module, config: WormConfig) -> str:
    optimizer = SGD([*network.parameters()] or [torch.zeros(1)], 0.1)
    try:
        worm_dist.attach(network, optimizer, config, example_inputs=random_images(1))
    except WormError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    found: list[dict[str, str]] = Ranks(tmp_path_factory.mktemp("refusals"))(2, _refused)
    return found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((n, words) for n, (_, words) in {**_NETWORKS, **_SETTINGS}.items()),
        *_OTHERS.items(),
    ],
)
def test_refused_by_name(said: list[dict[str, str]], name: str, words: str) -> None:
    for on_rank in said:
        assert on_rank[name].startswith("BackendError: ")
        assert words in on_rank[name]
        assert "\n" not in on_rank[name]
