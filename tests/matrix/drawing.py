"""Drawing: the draw at the end of a run, and the steps after it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tests.matrix.pair import Norm, Pair
from tests.matrix.trainee import images_like
from tests.oracles import folded, folded_name, live_flags

__all__ = ["draw_and_train_on"]

_STEPS_AFTER_DRAW = 2

# Of the outputs: the drawn network's sums have fewer terms, and so another rounding.
_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 0.01}


def draw_and_train_on(pair: Pair) -> None:
    """Draw the mask in force; compare with the masked network; train two steps more."""
    _draw(pair)
    for _ in range(_STEPS_AFTER_DRAW):
        _step(pair)


def _draw(pair: Pair) -> None:
    engine, trainee, findings = pair.engine, pair.trainee, pair.findings
    network, mask = trainee.network, engine.mask
    assert mask is not None
    flags = live_flags(network, engine.groups, ~mask.keep, "coupled")
    kept = {folded_name(name): flag for name, flag in flags.items()}
    masked = copy.deepcopy(network)
    _silence(masked, live_flags(masked, engine.groups, ~mask.keep, "norm"))
    weights = folded(trainee.values)
    states = {folded_name(name): trainee.state_of(name) for name, _ in network.named_parameters()}

    engine.draw(mask, copies=[] if trainee.schedule is None else [trainee.schedule.average.module])
    trainee.model = engine.model

    stepped = [p for group in trainee.optimizer.param_groups for p in group["params"]]
    whole = set(stepped) == set(network.parameters()) >= trainee.optimizer.state.keys()
    findings.expect("draw", whole, f"{pair.where}, draw: the optimizer steps something else")
    for name, parameter in network.named_parameters():
        survived = weights[name][kept[name]].view_as(parameter)
        findings.same("draw", parameter, survived, f"{pair.where}, draw: {name}")
        survivors = {k: v[kept[name]].view_as(parameter) for k, v in states[name].items()}
        what = f"{pair.where}, draw: state of {name}"
        findings.all_same("draw", trainee.state_of(name), survivors, what)
    _take_statistics(masked, network, kept)
    images = images_like(network, 6, seed=9)
    outputs = _outputs(network, images), _outputs(masked, images)
    what = f"{pair.where}, draw: outputs"
    findings.same("draw", *outputs, what, _TOLERANCE[images.dtype])


def _step(pair: Pair) -> None:
    engine, trainee, findings = pair.engine, pair.trainee, pair.findings
    before = trainee.values
    trainee.backward(pair.step)
    trainee.finish()
    findings.weights.append(trainee.digest)
    trained = {n: p for n, p in trainee.network.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        sound = bool(parameter.isfinite().all()) and not torch.equal(parameter, before[name])
        findings.expect("draw", sound, f"{pair.where}, drawn: {name} does not train")
    if pair.combination.why_not("bytes") is None:
        sent = engine.traffic.sent_bytes
        expected = sum(p.numel() * pair.reference.bytes_of(p) for p in trained.values())
        what = f"{pair.where}, drawn: {sent} sent, not {expected}"
        findings.expect("bytes", sent == expected, what)
    if trainee.schedule is not None and pair.reference.schedule is not None:
        pair.reference.schedule.scheduler.step()
        rates = trainee.schedule.rates, pair.reference.schedule.rates
        findings.expect("schedule", rates[0] == rates[1], f"{pair.where}, drawn: rates {rates}")
        averages = dict(trainee.schedule.average.module.named_parameters())
        for name, parameter in trainee.network.named_parameters():
            average = averages.pop(name)
            fits = average.shape == parameter.shape and bool(average.isfinite().all())
            findings.expect("schedule", fits, f"{pair.where}, drawn: average of {name}")
    pair.step += 1


@torch.no_grad()
def _silence(network: nn.Module, flags: dict[str, Tensor]) -> None:
    for name, parameter in network.named_parameters():
        parameter[~flags[name]] = 0


@torch.no_grad()
def _take_statistics(masked: nn.Module, drawn: nn.Module, kept: dict[str, Tensor]) -> None:
    """The draw has estimated them anew; they are not what is compared here."""
    for name, norm in drawn.named_modules():
        if isinstance(norm, Norm):
            for what in ("running_mean", "running_var"):
                whole = masked.get_buffer(f"{name}.{what}")
                whole[kept[f"{name}.weight"]] = drawn.get_buffer(f"{name}.{what}")


@torch.no_grad()
def _outputs(network: nn.Module, images: Tensor) -> Tensor:
    network.eval()
    outputs: Tensor = network(images)
    network.train()
    return outputs
