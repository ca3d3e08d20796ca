from __future__ import annotations

import pytest

from tests.launch.scripts import CONFIG, ROOT, SHORT, result_of
from tests.programs import call, variables_of_ranks


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the mask that two ranks come to, whatever has started them."""
    folder = tmp_path_factory.mktemp("expected")
    words = ["-m", "worm_dist", "train", ROOT / CONFIG, *SHORT, "--out", folder / "run"]
    for ended in call(words, folder, variables_of_ranks(2)):
        assert ended.exitcode == 0, ended.err
    digest = result_of(folder / "run")["mask_digest"]
    assert isinstance(digest, str)
    return digest
