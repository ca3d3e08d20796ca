"""Sparse and complex gradients beside packed ones: averaged as DDP averages them, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import random_images
from tests.oracles import live_flags, mask_dropping
from tests.ranks import Ranks
from worm_dist import WormConfig


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class _Words(nn.Module):
    """An image with words, whose embedding has sparse gradients."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = _block(3, 16), _block(16, 12)
        self.words = kind(50, 4, sparse=True)
        self.head = nn.Linear(12 + 4, 5)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        features = self.second(self.first(images)).mean(dim=(2, 3))
        embedded = self.words(words)
        embedded = embedded.sum(1) if embedded.dim() == 3 else embedded
        logits: Tensor = self.head(torch.cat([features, embedded], dim=1))
        return logits


class _Spectral(nn.Module):
    """A layer of complex weights, as in a Fourier neural operator (arXiv 2010.08895)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _block(3, 16), _block(16, 10)
        self.weights = nn.Parameter(0.3 * torch.randn(10, 8, 8, 5, dtype=torch.complex64))
        self.third, self.head = _block(8, 12), nn.Linear(12, 5)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(self.second(self.first(images)))
        mixed = torch.einsum("bixy,ioxy->boxy", spectrum, self.weights)
        features = self.third(torch.fft.irfft2(mixed, s=images.shape[2:]))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    kinds = {"embedding": nn.Embedding, "bag": nn.EmbeddingBag}
    return _Words(kinds[name]) if name in kinds else _Spectral()


def _inputs(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return random_images(6, seed=seed), torch.randint(50, (6, 2), generator=generator)


def _whole(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _differences(name: str, compression: str) -> dict[str, Any]:
    """Largest difference to plain DDP with frozen gradients zeroed, of the gradients' largest; and
    whether the ranks still hold the same weights after a draw."""
    rank = dist.get_rank()
    model = DistributedDataParallel(_network(name))
    plain = DistributedDataParallel(_network(name))
    optimizer = SGD(model.parameters(), lr=0.05)
    engine = worm_dist.attach(
        model,
        optimizer,
        WormConfig(truncation={"frozen_weights": "hold", "compression": compression}),
        example_inputs=_inputs(9),
        steps_per_epoch=10,
    )
    mask = mask_dropping(engine.groups, *range(0, 14, 2))
    flags = live_flags(plain.module, engine.groups, ~mask.keep, "producer")
    difference, sent = 0.0, []
    for step in range(6):
        if step == 3:
            engine.truncate(mask)
        plain.module.load_state_dict(model.module.state_dict())
        for trained in (model, plain):
            trained.zero_grad()
            trained(*_inputs(2 * step + rank)).square().mean().backward()
        if step >= 3:
            for key, parameter in plain.module.named_parameters():
                assert parameter.grad is not None
                if not parameter.grad.is_sparse:
                    parameter.grad[~flags[key]] = 0
        for key, theirs in plain.module.named_parameters():
            ours = model.module.get_parameter(key)
            assert ours.grad is not None and theirs.grad is not None
            assert ours.grad.is_sparse == theirs.grad.is_sparse
            largest = _whole(theirs.grad).abs().max()
            apart = (_whole(ours.grad) - _whole(theirs.grad)).abs().max()
            difference = max(difference, float(apart / (largest + 1e-12)))
        optimizer.step()
        sent.append(engine.traffic.sent_bytes)
    engine.draw(mask)
    for step in range(6, 8):
        engine.optimizer.zero_grad()
        engine.model(*_inputs(2 * step + rank)).square().mean().backward()
        engine.optimizer.step()
    weights = torch.cat([torch.view_as_real(p).flatten() if p.is_complex() else p.flatten()
                         for p in engine.model.parameters()])  # fmt: skip
    others = weights.detach().clone()
    dist.broadcast(others, 0)
    return {"difference": difference, "sent": sent, "alike": torch.equal(weights, others)}


@pytest.mark.parametrize("name", ["embedding", "bag", "complex"])
def test_they_are_averaged_as_by_plain_ddp(ranks: Ranks, name: str) -> None:
    """The hook took the values of a sparse gradient for a bucket, and failed at the first truncated
    step."""
    for outcome in ranks(2, _differences, name, "none"):
        assert outcome["difference"] == 0
        assert outcome["alike"]
        assert 0 < outcome["sent"][-1] < outcome["sent"][0]


@pytest.mark.parametrize("name", ["bag", "complex"])
def test_rounding_keeps_imaginary_parts_and_leaves_sparse_gradients_alone(
    ranks: Ranks, name: str
) -> None:
    """Complex numbers were rounded to real ones, and lost half of themselves in silence."""
    for outcome in ranks(2, _differences, name, "bf16"):
        assert 0 < outcome["difference"] < 0.02
        assert outcome["alike"]


def _attach_low_rank(name: str) -> None:
    model = DistributedDataParallel(_network(name))
    optimizer = SGD(model.parameters(), lr=0.05)
    config = WormConfig(truncation={"compression": "powersgd"})
    worm_dist.attach(model, optimizer, config, example_inputs=_inputs(9), steps_per_epoch=10)


@pytest.mark.parametrize("name", ["bag", "complex"])
def test_power_sgd_of_them_is_refused(ranks: Ranks, name: str) -> None:
    for outcome in ranks.outcomes(2, _attach_low_rank, name):
        assert outcome.error == "BackendError"
        assert "which PowerSGD does not support" in outcome.text
