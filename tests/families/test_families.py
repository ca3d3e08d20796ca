"""Every architecture of the list: attached, trained, drawn, trained on, saved and loaded.

The large ones only with LARGE_FAMILIES=1 in the environment; then a table is written.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.drawing import draw
from tests.families.families import FAMILIES, OWN, Family
from tests.families.finding import Finding

pytestmark = [
    pytest.mark.slow("trains and draws every architecture"),
]

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}

_families = pytest.mark.parametrize(
    "name", [n for n, each in FAMILIES.items() if not each.large or "LARGE_FAMILIES" in os.environ]
)


@pytest.fixture(scope="module")
def tickets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tickets")


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {}


@pytest.fixture(scope="module")
def loaded(tickets: Path) -> Any:
    """What a fresh process makes of all tickets: importing the libraries takes longer than any.

    Its strings have other hashes than those here, which must not change anything.
    """
    program = f"from tests.families.loading import load_all; load_all({str(tickets)!r})"
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@_families
def test_a_drawn_network_is_the_masked_one(
    name: str,
    tickets: Path,
    findings: dict[str, Finding],
    record_property: Callable[[str, Any], None],
) -> None:
    family = FAMILIES[name]
    finding = draw(family, list(FAMILIES).index(name), tickets / name)
    findings[name] = finding
    record_property("family", (name, asdict(finding)))  # plain, to go from process to process
    assert finding.difference < _TOLERANCES[family.dtype]
    _assert_dense_as_expected(family, finding.dense)


def _assert_dense_as_expected(family: Family, dense: Mapping[str, str]) -> None:
    """Every module that stays dense is expected to, for that reason, and the other way round."""
    seen = set()
    for module, reason in dense.items():
        for pattern, expected in family.dense.items():
            if fnmatchcase(module, pattern) and re.fullmatch(expected, reason):
                seen.add(pattern)
                break
        else:
            raise AssertionError(f"{module} stays dense: {reason}")
    assert seen == family.dense.keys()


@_families
def test_its_ticket_is_loaded_in_a_fresh_process(name: str, tickets: Path, loaded: Any) -> None:
    if not (tickets / name).exists():
        pytest.skip("it was not drawn")
    assert loaded["wrong"][name] == ""


@pytest.mark.parametrize("name", OWN)
def test_the_same_groups_are_found_by_every_process(
    name: str, findings: dict[str, Finding], loaded: Any
) -> None:
    if name not in findings:
        pytest.skip("it was not drawn")
    assert loaded["structures"][name] == findings[name].structure
