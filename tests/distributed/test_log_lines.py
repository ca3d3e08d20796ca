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
    with rank_named(rank), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = _shown
        logger.warning("%d channels", 7)
        logger.info("not shown")
        warnings.warn("odd", UserWarning, stacklevel=1)
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == f"{prefix}7 channels"
    assert second.startswith(prefix) and second.endswith("UserWarning: odd")
    assert not logging.getLogger("worm_dist").handlers
    logger.warning("as before")
    assert capsys.readouterr().err == "as before\n"


def _shown(message: Warning | str, category: type[Warning], *where: object) -> None:
    """As Python prints it; pytest collects warnings."""
    import sys

    sys.stderr.write(warnings.formatwarning(message, category, str(where[0]), 1, ""))
