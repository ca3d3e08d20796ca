from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.nets import Residual
from tests.ticket_command.tickets import NAMED, drawn
from worm_dist.models import build_model


@pytest.fixture(scope="session")
def ticket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ticket of a named model; not to be changed."""
    folder = tmp_path_factory.mktemp("named") / "ticket"
    torch.manual_seed(0)
    drawn(build_model(**NAMED)).save_ticket(folder, model=NAMED)
    return folder


@pytest.fixture(scope="session")
def own_ticket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ticket of a network that is not in worm_dist.models; not to be changed."""
    folder = tmp_path_factory.mktemp("own") / "ticket"
    drawn(Residual()).save_ticket(folder)
    return folder
