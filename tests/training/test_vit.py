"""A vision transformer that finds its ticket on two ranks, and what is loaded of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.ranks import NO_GROUP, Ranks
from worm_dist import load_ticket
from worm_dist.distributed.init import RankInfo
from worm_dist.groups.gates import gates_of
from worm_dist.training.config_file import read_run_config
from worm_dist.training.reporting.reporter import Report
from worm_dist.training.trainer import Trainer

pytestmark = pytest.mark.slow("trains a whole run")

CONFIG = Path(__file__).parents[2] / "configs" / "vit-digits.yaml"
FAST = (
    ("epochs", "2"),
    ("model.arguments", "{num_layers: 2}"),
    ("search.every", "3ba"),
    ("truncation.removal.duration", "12ba"),
)


def _outputs(network: nn.Module) -> Tensor:
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network.eval()(images)  # type: ignore[no-any-return]


def _train(ticket: str) -> tuple[Any, ...]:
    place = RankInfo(dist.get_rank(), dist.get_world_size(), 0)
    trainer = Trainer(read_run_config(CONFIG, FAST), place, torch.device("cpu"), Report())
    result, engine = trainer.run(), trainer.engine
    assert isinstance(engine.model, nn.parallel.DistributedDataParallel)
    assert engine.mask is not None
    kept = {name: int(flags.sum()) for name, flags in engine.mask.items()}
    if place.rank == 0:
        engine.save_ticket(ticket, trainer.model_arguments)
    return result.as_dict(), kept, engine.mask.digest, _outputs(engine.model.module)


def _load(ticket: str) -> tuple[Any, ...]:
    network = load_ticket(ticket)
    heads = [m.num_heads for m in network.modules() if isinstance(m, nn.MultiheadAttention)]
    num_parameters = sum(p.numel() for p in network.parameters())
    return heads, num_parameters, len(gates_of(network)), _outputs(network)


def test_a_transformer_finds_its_ticket_on_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    folder = str(tmp_path / "ticket")
    (result, kept, digest, outputs), (_, _, other_digest, other_outputs) = ranks(2, _train, folder)
    assert result["status"] == "ticket"
    assert digest == other_digest == result["mask_digest"]
    assert torch.equal(outputs, other_outputs)

    heads = [count for name, count in kept.items() if name.endswith("self_attention")]
    neurons = [count for name, count in kept.items() if ".mlp." in name]
    assert heads == [3] * 2 and sum(neurons) == 2 * 192 / 2
    # A head has eight rows of three makers with their biases, and eight columns; a neuron a row, a
    # bias and a column.  Before the draw each has a gate too.
    head, neuron = 3 * 8 * (48 + 1) + 8 * 48, 48 + 1 + 48
    plain = result["parameters"]["dense"] - 2 * (6 + 192)
    ticket = plain - 2 * 3 * head - 2 * 96 * neuron
    assert (plain, ticket) == (58_234, result["parameters"]["ticket"])
    assert result["traffic"]["ticket_bytes_per_step"] == 4 * ticket
    # Frozen heads and neurons are not sent; the gates of those that live are, until the draw.  The
    # last ones to leave have not been sent since the elbow either.
    assert result["traffic"]["truncated_bytes_per_step"] == 4 * (ticket + 2 * (3 + 96))

    ((loaded_heads, num_parameters, num_gates, loaded),) = ranks(NO_GROUP, _load, folder)
    assert (loaded_heads, num_parameters, num_gates) == ([3] * 2, ticket, 0)
    assert torch.equal(loaded, outputs)
