"""What cannot be exact under DeepSpeed is refused by name when an engine is attached.

The engines are real ones, built on the CPU, save those that this machine cannot have: fp16, for
which the accelerator is told that it could; tensor parallelism, for which there is a placeholder of
one rank; and 1-bit Adam, which DeepSpeed 0.19.6 no longer has: there a class in a module of that
name.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer

import worm_dist
from tests.nets import Plain, Residual, random_images
from tests.ranks import Ranks
from tests.zero.building import engine_around, import_deepspeed, settings_of
from worm_dist import WormConfig

pytestmark = pytest.mark.slow("imports DeepSpeed on every rank, many times")

_BF16: Mapping[str, Any] = {"enabled": True}


def _sgd(network: nn.Module) -> Optimizer:
    return SGD(network.parameters(), lr=0.1)


def _adamw(network: nn.Module) -> Optimizer:
    return AdamW(network.parameters())


def _adagrad(network: nn.Module) -> Optimizer:
    return Adagrad(network.parameters())


class OnebitAdam(SGD):
    __module__ = "deepspeed.runtime.fp16.onebit.adam"


def _onebit(network: nn.Module) -> Optimizer:
    return OnebitAdam(network.parameters(), lr=0.1)


def _pipeline() -> nn.Module:
    from deepspeed.pipe import PipelineModule

    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    network: nn.Module = PipelineModule(layers, num_stages=1)
    return network


class Experts(nn.Module):
    def __init__(self) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.features = Residual()
        self.experts = MoE(10, nn.Linear(10, 10), num_experts=2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.experts(self.features(images))[0]
        return logits


class Complex(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(10, dtype=torch.complex64))

    def forward(self, images: Tensor) -> Tensor:
        return (super().forward(images) * self.phase).real


class Words(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 10, sparse=True)

    def forward(self, images: Tensor) -> Tensor:
        words: Tensor = self.words(torch.arange(images.shape[0]))
        return super().forward(images) + words


class OneRank:
    """As much of Megatron's ``mpu`` as DeepSpeed asks for."""

    def __getattr__(self, name: str) -> Callable[[], Any]:
        if name.endswith("group"):
            return lambda: dist.group.WORLD
        if name.endswith("world_size"):
            return lambda: 1
        if name.endswith("rank"):
            return lambda: 0
        raise AttributeError(name)


@contextmanager
def _told_that_fp16_works() -> Iterator[None]:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported


@dataclass(frozen=True)
class Case:
    """An engine, and what is said of it.

    Attributes:
        says: part of the message.
        stage, settings: of DeepSpeed.
        network, optimizer: in the engine; no optimizer for the one that the settings name.
        arguments: for ``deepspeed.initialize``.
        config: of the attached engine.
        around: in which the engine is built.
        found: settings of ``zero_optimization`` that this machine cannot have, written into the
            engine's.
    """

    says: str
    stage: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    network: Callable[[], nn.Module] = Residual
    optimizer: Callable[[nn.Module], Optimizer] | None = _sgd
    arguments: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    around: Callable[[], Any] | None = None
    found: Mapping[str, Any] = field(default_factory=dict)


CASES: Mapping[str, Case] = {
    "optimizer offload": Case(
        "optimizer offload keeps gradients on the CPU",
        2,
        {
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
        },
        optimizer=_adamw,
    ),
    "BF16_Optimizer": Case(
        "set data_types.grad_accum_dtype to bf16, or choose stage 2",
        1,
        {"bf16": _BF16, "data_types": {"grad_accum_dtype": "fp32", "buffer_dtype": "bf16"}},
    ),
    "fp16": Case(
        "fp16 with its loss scale has not been proved exact; choose bf16 or fp32",
        2,
        {"fp16": {"enabled": True}},
        around=_told_that_fp16_works,
    ),
    "not contiguous": Case(
        "contiguous_gradients false takes another path",
        2,
        {"zero_optimization": {"contiguous_gradients": False}},
    ),
    "quantized gradients": Case(
        "turn zero_quantized_gradients off",
        2,
        {"zero_optimization": {"zero_quantized_gradients": True}},
    ),
    "parameter offload": Case(
        "parameter offload moves the weights away; turn it off",
        3,
        {"zero_optimization": {"offload_param": {"device": "cpu"}}},
    ),
    "stage 3, all-reduce": Case(
        "reduce_scatter false takes another path to the reduction; leave it true",
        3,
        {"zero_optimization": {"reduce_scatter": False}},
    ),
    "stage 3, sums for gathers": Case(
        "use_all_reduce_for_fetch_params gathers weights by sums; turn it off",
        3,
        {"zero_optimization": {"use_all_reduce_for_fetch_params": True}},
    ),
    "stage 3, quantized weights": Case(
        "turn zero_quantized_weights and zero_quantized_nontrainable_weights off",
        3,
        found={"zero_quantized_weights": True},
    ),
    "stage 3, quantized gradients": Case(
        "turn zero_quantized_gradients off", 3, found={"zero_quantized_gradients": True}
    ),
    "stage 3, second copies": Case(
        "zero_hpz_partition_size keeps second copies of the weights",
        3,
        found={"zero_hpz_partition_size": 2},
    ),
    "stage 3, zenflow": Case(
        "zenflow steps some channels on their own; turn it off", 3, found={"zenflow": object()}
    ),
    "stage 3, Adagrad": Case("replaces a given Adagrad by its own", 3, optimizer=_adagrad),
    "pipeline": Case("pipeline parallelism splits the network into stages", network=_pipeline),
    "complex": Case("complex parameters have not been proved exact", 0, network=Complex),
    "sparse": Case(
        "sparse gradients are reduced by another path",
        0,
        network=Words,
    ),
    "experts": Case("experts (MoE) are reduced in process groups of their own", 0, network=Experts),
    "tensor parallelism": Case(
        "tensor parallelism spreads a channel over ranks", arguments={"mpu": OneRank()}
    ),
    "torch_autocast": Case(
        "torch_autocast reduces in several precisions",
        1,
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    ),
    "1-bit Adam": Case("OnebitAdam compresses and averages by itself", 0, optimizer=_onebit),
    "Adagrad": Case("replaces a given Adagrad by its own", 2, optimizer=_adagrad),
    "Muon": Case(
        "MuonWithAuxAdam updates a whole matrix jointly",
        1,
        {"optimizer": {"type": "Muon", "params": {"lr": 0.1, "torch_adam": True}}},
        network=Plain,
        optimizer=None,
    ),
    "no optimizer": Case("the engine has no optimizer", 0, optimizer=None),
    "rule free": Case(
        "truncation.frozen_weights 'free' is not supported under DeepSpeed",
        config={"truncation": {"frozen_weights": "free"}},
    ),
    "compression": Case(
        "truncation.compression 'bf16' is not supported under DeepSpeed; set",
        config={"truncation": {"compression": "bf16"}},
    ),
}


def _attach(engine: nn.Module, optimizer: Optimizer | None = None, **config: Any) -> str:
    """What is said, with the kind of error; "" if nothing is."""
    try:
        worm_dist.attach(
            engine,
            optimizer,
            WormConfig(**config),
            example_inputs=random_images(1),
            steps_per_epoch=4,
        )
    except worm_dist.WormError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _build(case: Case) -> Any:
    network = case.network()
    optimizer = None if case.optimizer is None else case.optimizer(network)
    settings = copy.deepcopy(settings_of(case.stage, **case.settings))
    engine = engine_around(network, optimizer, settings, **case.arguments)
    vars(engine._config.zero_config).update(case.found)
    return engine


def _sayings() -> dict[str, str]:
    """Of every case, and of engines whose DeepSpeed is not the known one."""
    import_deepspeed()
    warnings.simplefilter("ignore")
    said = {}
    for name, case in CASES.items():
        if case.around is None:
            said[name] = _attach(_build(case), **case.config)
        else:
            with case.around():
                said[name] = _attach(_build(case), **case.config)
    return said | _sayings_of_others()


def _sayings_of_others() -> dict[str, str]:
    import deepspeed
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    engine = _build(Case(""))
    said = {"other optimizer": _attach(engine, _sgd(Residual()))}
    version, deepspeed.__version__ = deepspeed.__version__, "0.20.1"
    said["version"] = _attach(engine)
    deepspeed.__version__ = version

    optimizer = stage_1_and_2.DeepSpeedZeroOptimizer
    known = optimizer.average_tensor
    optimizer.average_tensor = lambda self, tensor: known(self, tensor, torch.float32)
    said["changed signature"] = _attach(engine)
    del optimizer.average_tensor
    said["missing point"] = _attach(engine)
    optimizer.average_tensor = known
    gather = stage_1_and_2.all_gather_dp_groups
    stage_1_and_2.all_gather_dp_groups = lambda groups: None
    said["changed gather"] = _attach(engine)
    stage_1_and_2.all_gather_dp_groups = gather
    scatter = stage3.reduce_scatter_coalesced
    stage3.reduce_scatter_coalesced = lambda tensors: []
    said["changed scatter"] = _attach(engine)
    stage3.reduce_scatter_coalesced = scatter

    said["nothing"] = _attach(engine, engine.optimizer)
    return said


_CHANGED = (
    "BackendError: attach: DeepSpeed: {} has an unknown signature; install deepspeed>=0.19,<0.20"
)
OTHERS = {
    "other optimizer": "ConfigError: attach: this is not the DeepSpeed engine's optimizer; leave "
    "it out, or give the one that deepspeed.initialize returned",
    "version": "BackendError: attach: DeepSpeed: version 0.20.1 is not known; its reduction "
    "points are known for 0.19.x",
    "changed signature": _CHANGED.format("DeepSpeedZeroOptimizer.average_tensor"),
    "missing point": _CHANGED.format("DeepSpeedZeroOptimizer.average_tensor"),
    "changed gather": _CHANGED.format("stage_1_and_2.all_gather_dp_groups"),
    "changed scatter": _CHANGED.format("stage3.reduce_scatter_coalesced"),
    "nothing": "",
}


@pytest.fixture(scope="module")
def sayings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    (outcome,) = Ranks(tmp_path_factory.mktemp("refusals")).outcomes(1, _sayings)
    assert outcome.exitcode == 0, str(outcome)
    said: dict[str, str] = outcome.value
    return said


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused_has_a_name_and_a_way_out(sayings: dict[str, str], name: str) -> None:
    said = sayings[name]
    assert said.startswith("BackendError: attach: ")
    assert CASES[name].says in said
    assert "\n" not in said


def _sequence_parallel() -> str:
    settings = {"sequence_parallel_size": 2, "data_parallel_size": 1}
    return _attach(_build(Case("", 1, settings)))


def test_sequence_parallelism_is_refused(ranks: Ranks) -> None:
    for outcome in ranks.outcomes(2, _sequence_parallel):
        assert outcome.exitcode == 0, str(outcome)
        assert "sequence parallelism reduces in a precision of its own" in outcome.value


@pytest.mark.parametrize("name", OTHERS)
def test_another_deepspeed_or_optimizer_is_not_taken(sayings: dict[str, str], name: str) -> None:
    assert sayings[name] == OTHERS[name]
