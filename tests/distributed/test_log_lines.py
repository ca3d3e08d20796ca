from __future__ import annotations

import logging
import warnings

import pytest

from worm_dist.distributed.log_lines import rank_named

logger = logging.getLogger("worm_dist.any.module")


@pytest.mark.parametrize(("rank", "prefix"), [(0, ""), (3, "[rank 3] ")])
def test_lines_of_other_ranks_than_zero_begin_with_the_rank(
    rank: int, prefix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("worm_dist"), "propagate", False)  # pytest prints too
    with rank_named(rank):
        logger.warning("%d channels", 7)
        logger.info("not shown")
        warned = warnings.formatwarning("odd", UserWarning, "file.py", 1, "")
    assert capsys.readouterr().err == f"{prefix}7 channels\n"
    assert warned == f"{prefix}file.py:1: UserWarning: odd\n"
    assert not logging.getLogger("worm_dist").handlers
    logger.warning("as before")
    assert capsys.readouterr().err == "as before\n"
    assert warnings.formatwarning("odd", UserWarning, "file.py", 1, "").startswith("file.py")
