"""The engine's files beside a trainer's: what one rank cannot read is told on every rank."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, random_images
from tests.ranks import Ranks
from worm_dist import Engine, WormError
from worm_dist.integrations.rank_files import (
    has_engine_state,
    load_engine_state,
    save_engine_state,
)


def _engine() -> Engine:
    torch.manual_seed(0)
    model = DistributedDataParallel(Plain())
    optimizer = SGD(model.parameters(), lr=0.1)
    return worm_dist.attach(model, optimizer, example_inputs=random_images(1))


def _loaded(folder: str) -> tuple[str, str]:
    """What this rank says of its damaged file, and of a whole one."""
    save_engine_state(_engine(), folder)
    dist.barrier()
    path = Path(folder, "worm_engine_1.pt")
    whole, said = path.read_bytes(), []
    for content in (whole[:100], whole):
        if dist.get_rank() == 1:
            path.write_bytes(content)
        dist.barrier()
        try:
            load_engine_state(_engine(), folder)
        except WormError as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("loaded")
    return said[0], said[1]


def test_a_file_that_is_damaged_is_named_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    """The other ranks said that they no longer held the same network."""
    zero, one = ranks(2, _loaded, str(tmp_path))
    assert zero == one
    assert zero[0].startswith("CheckpointError: rank 1: ") and "worm_engine_1.pt: the" in zero[0]
    assert zero[1] == "loaded"


def _found(folder: str) -> tuple[list[bool], str]:
    """Whether there is a state before it is saved, and after; and what is said where it is lost on
    the host of one rank."""
    own = Path(folder, str(dist.get_rank()))  # as on hosts that do not share a disk
    engine = _engine()
    found = [has_engine_state(own)]
    save_engine_state(engine, own)
    found.append(has_engine_state(own))
    if dist.get_rank() == 1:
        (own / "worm_engine_1.pt").unlink()
    found.append(has_engine_state(own))
    try:
        load_engine_state(_engine(), own)
    except WormError as error:
        return found, str(error)
    return found, "loaded"


def test_a_file_that_is_missing_on_one_host_is_named_on_every_rank(
    ranks: Ranks, tmp_path: Path
) -> None:
    """That rank loaded the trainer's weights alone, while the others restored the engine."""
    zero, one = ranks(2, _found, str(tmp_path))
    assert zero == one
    assert zero[0] == [False, True, True]
    assert zero[1].startswith("rank 1: ") and "cannot be read (FileNotFoundError)" in zero[1]
