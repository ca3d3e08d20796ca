from __future__ import annotations

import pytest

from tests.launch.scripts import trained


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the mask that torchrun's two ranks came to."""
    digest = trained(tmp_path_factory.mktemp("torchrun") / "run", "torchrun")["mask_digest"]
    assert isinstance(digest, str)
    return digest
