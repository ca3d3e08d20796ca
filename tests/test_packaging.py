"""The source archive and the wheel, built and installed offline, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

import worm_dist
from worm_dist.extras import EXTRAS

ROOT = Path(__file__).parents[1]
OPTIONAL = sorted({module for modules in EXTRAS.values() for module in modules})
"""Modules that the wheel does not bring along; to the programs below they are not installed."""
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|worm_dist\.egg-info/.*")

# For modules that are None in sys.modules, find_spec returns None and import raises
# ModuleNotFoundError, as if they were not installed.
WITHOUT_OPTIONAL = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}));"
COMMAND = f"{WITHOUT_OPTIONAL} import runpy; runpy.run_module('worm_dist', run_name='__main__')"
DRAW = f"""
{WITHOUT_OPTIONAL}
import json
import torch
from torch import nn
import worm_dist as worm

net = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
inputs, said = torch.randn(1, 1, 8, 8), ""
try:
    config = worm.WormConfig(search={{"elbow": {{"rule": "kneedle"}}}})
    worm.attach(net, optimizer, config, example_inputs=inputs, steps_per_epoch=1)
except worm.ConfigError as error:
    said = str(error)
engine = worm.attach(net, optimizer, example_inputs=inputs, steps_per_epoch=1)
engine.draw(worm.Mask({{"0": torch.arange(8) % 2 == 0}}))
print(json.dumps([worm.__file__, engine.phase, net[0].out_channels, said]))
"""


@dataclass(frozen=True)
class Built:
    """What was built from the checkout.

    Attributes:
        checkout: the files of the checkout.
        sdist: the files of the source archive.
        wheel: the files of the wheel.
        metadata: the wheel's metadata.
        site: the folder into which the wheel is installed.
    """

    checkout: frozenset[str]
    sdist: frozenset[str]
    wheel: frozenset[str]
    metadata: Message
    site: Path

    def python(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a program with the installed wheel, outside of the checkout."""
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=self.site.parent,
            env={**os.environ, "PYTHONPATH": str(self.site)},
            capture_output=True,
            text=True,
        )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("packaging")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip("needs a checkout with git")
    # Built from a copy: in the checkout, files of an earlier build would be taken up.
    checkout = frozenset(name for name in found.stdout.splitlines() if (ROOT / name).is_file())
    for name in checkout:
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "copy" / name).write_bytes((ROOT / name).read_bytes())
    with tarfile.open(_build("sdist", folder / "copy")) as archive:
        archive.extractall(folder / "unpacked")
    (source,) = (folder / "unpacked").iterdir()
    sdist = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    wheel = _build("wheel", source)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, "--target", folder / "site", wheel], check=True)
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        (metadata,) = (files.read(name) for name in names if name.endswith("/METADATA"))
    return Built(
        checkout,
        frozenset(sdist),
        frozenset(names),
        HeaderParser().parsestr(metadata.decode()),
        folder / "site",
    )


def _build(kind: str, source: Path) -> Path:
    """Build a ``sdist`` or a ``wheel``, with the setuptools that is installed here."""
    out = source.parent / kind
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    out.mkdir()
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True)
    (file,) = out.iterdir()
    return file


pytestmark = [
    pytest.mark.slow("builds and installs a wheel, and imports torch anew"),
]


def test_the_source_archive_is_the_checkout(built: Built) -> None:
    assert {name for name in built.sdist if not GENERATED.fullmatch(name)} == built.checkout


def test_the_wheel_has_the_package_and_nothing_else(built: Built) -> None:
    package = {name for name in built.checkout if name.startswith("worm_dist/")}
    assert {name for name in built.wheel if ".dist-info/" not in name} == package
    assert package >= {"worm_dist/py.typed", "worm_dist/analysis/page.html"}
    assert all((built.site / name).is_file() for name in package)


def test_the_metadata_is_that_of_the_code(built: Built) -> None:
    metadata = built.metadata
    assert metadata["Version"] == worm_dist.__version__
    assert f"version: {worm_dist.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    wanted: dict[str, set[str]] = {}
    for line in metadata.get_all("Requires-Dist", []):
        requirement, _, marker = line.partition("; extra == ")
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None, line
        wanted.setdefault(marker.strip("'\""), set()).add(name[0])
    for extra, modules in EXTRAS.items():
        assert wanted[extra] == {*modules.values()}
        assert not wanted[""] & wanted[extra]


def test_a_network_is_drawn_without_the_optional_packages(built: Built) -> None:
    done = built.python(DRAW)
    assert done.returncode == 0, done.stderr
    file, phase, width, refused = json.loads(done.stdout)
    assert Path(file) == built.site / "worm_dist" / "__init__.py"
    assert (phase, width) == ("ticket", 4)
    # It would fail at the fourth check, on rank zero alone.
    assert refused.startswith("search.elbow.rule: 'kneedle': kneed is not installed; run: pip inst")


def test_help_needs_no_optional_package(built: Built) -> None:
    done = built.python(COMMAND, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m worm_dist ")


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            "train run.yaml --search.elbow.rule kneedle",
            [
                "train: jinja2 and matplotlib and tensorboard are not installed; run: "
                'pip install "worm_dist[train]"',
                "data.name: 'digits': scikit-learn is not installed; run: "
                'pip install "worm_dist[digits]"',
                "search.elbow.rule: 'kneedle': kneed is not installed; run: "
                'pip install "worm_dist[kneedle]"',
            ],
        ),
        ("report .", ["report: jinja2 and matplotlib and tensorboard are not installed; run: pi"]),
        ("bench wire --quick", ["bench: jinja2 and matplotlib and tensorboard are not installed"]),
        ("ticket export . --onnx x.onnx", ["--onnx: onnx and onnxruntime and onnxscript are not"]),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_what_is_missing_is_one_line_for_each_extra(
    built: Built, arguments: str, lines: list[str]
) -> None:
    (built.site.parent / "run.yaml").write_text("epochs: 1\n")
    done = built.python(COMMAND, *arguments.split())
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    said = done.stderr.splitlines()
    assert len(said) == len(lines), done.stderr
    for line, begin in zip(said, lines, strict=True):
        assert begin in line
