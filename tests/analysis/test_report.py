"""The page of real runs: it is whole, needs nothing else, and has the figures of the files."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from worm_dist.__main__ import main
from worm_dist.analysis.page import page
from worm_dist.analysis.run_files import read_run
from worm_dist.analysis.run_table import differing_settings

pytestmark = pytest.mark.slow("trains three small runs")

_VOID = {"meta", "link", "br", "img", "input", "hr"}


class _Page(HTMLParser):
    """Reads a page; elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.numbers: dict[str, list[float | None]] = {}
        self.texts: dict[str, list[str]] = {}
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.heads: list[str] = []
        self._open: list[str] = []
        self._key = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag == "tr":
            self._key = values.get("data-key") or ""
            self.numbers[self._key], self.texts[self._key] = [], []
        elif tag == "td":
            self.numbers[self._key].append(None)
            self.texts[self._key].append("")
        elif tag == "data":
            self.numbers[self._key][-1] = float(str(values["value"]))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self._open:
            self.texts[self._key][-1] += data
        if self._open and self._open[-1] in ("h1", "h2", "h3"):
            self.heads.append(data)


def _written(capsys: pytest.CaptureFixture[str], out: Path, *runs: Path) -> tuple[str, str]:
    """The page, and what was printed on the standard error."""
    code = main(["report", *map(str, runs), "--out", str(out)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return out.read_text(), printed.err


def _flat(result: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in result.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def test_the_page_has_the_figures_of_the_result_files(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shown = [runs["worm"], runs["dense"]]
    text, said = _written(capsys, tmp_path / "pages" / "report.html", *shown)
    assert said == ""
    read = _Page(text)
    results = [_flat(json.loads((run / "result.json").read_text())) for run in shown]
    for key in results[0].keys() - {"at_chance"}:
        values = [result[key] for result in results]
        numbers = [value if isinstance(value, (int, float)) else None for value in values]
        if any(value is not None for value in numbers):
            assert read.numbers[key] == numbers, key
    assert read.texts["parameters.ticket"][1] == "–"
    percent = results[0]["parameters.ticket"] / results[0]["parameters.dense"]
    assert read.texts["parameters.ticket"][0].endswith(f"({percent:.1%})")


def test_the_page_needs_nothing_else(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text, _ = _written(capsys, tmp_path / "report.html", *runs.values())
    read = _Page(text)
    assert not re.search(r"https?:|src=|@import|<script|<link", text)
    links = re.findall(r'(?:href="|url\()([^")]+)', text)
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert {link[1:] for link in links if link[0] == "#"} <= set(read.ids)
    assert len(read.ids) == len(set(read.ids))
    assert text.count('role="img" aria-labelledby=') == text.count("<title id=") == 4 + 2 + 2
    assert read.heads[0] == "Comparison of 3 runs"
    for variable in re.findall(r"var\((--[\w-]+)\)", text):
        assert f"{variable}:" in text


def test_only_settings_that_differ_are_shown(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text, _ = _written(capsys, tmp_path / "report.html", runs["worm"], runs["dense"])
    rows = _Page(text).texts
    assert rows["preset"] == ["worm", "dense"]
    assert rows["search.enabled"] == ["true", "false"]
    assert "optimizer.lr" not in rows and "epochs" not in rows
    read = [read_run(runs[name], name) for name in ("worm", "dense")]
    assert differing_settings(read[:1]) == []
    unknown = differing_settings([*read, replace(read[0], description=None)])
    assert {row.cells[2].text for row in unknown} == {"not known"}


def test_an_unfinished_run_is_shown_and_a_damaged_one_left_out(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("unfinished", "damaged", "empty"):
        shutil.copytree(runs["worm"], tmp_path / name)
    (tmp_path / "unfinished" / "result.json").unlink()
    (tmp_path / "damaged" / "result.json").write_text('{"preset": "worm"')
    shutil.rmtree(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    folders = [tmp_path / name for name in ("unfinished", "damaged", "empty")]
    text, said = _written(capsys, tmp_path / "report.html", *folders, runs["dense"])
    assert "worm_dist: warning: unfinished has not finished" in said
    assert f"damaged is left out: {tmp_path}/damaged/result.json: damaged: " in said
    assert "empty is left out: it holds no run" in said and "Traceback" not in said
    assert said.count("\n") == 3
    read = _Page(text)
    assert read.heads[:2] == ["Comparison of 2 runs", "Notes"]
    assert read.texts["status"] == ["unfinished", "dense"]
    assert read.numbers["accuracy.final"][0] is None


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["{tmp}/nothing"], 2, "nothing is no folder"),
        (["{tmp}"], 2, "none of the folders holds a run"),
        (["{worm}", "--out", "{worm}/result.json"], 2, "does not end in .html"),
        (["{tmp}/damaged"], 3, "line 1: not an event of a run"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    runs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "journal.jsonl").write_text("[]\n")
    before = (runs["worm"] / "result.json").read_bytes()
    assert main(["report", *(word.format(tmp=tmp_path, **runs) for word in words)]) == code
    printed = capsys.readouterr().err
    assert says in printed and "Traceback" not in printed
    assert not (tmp_path / "report.html").exists()
    assert (runs["worm"] / "result.json").read_bytes() == before


def test_names_and_texts_are_escaped(runs: dict[str, Path]) -> None:
    evil = "<b>&\"'</svg>$x$"
    run = read_run(runs["worm"], evil)
    assert run.description is not None and run.result is not None
    settings = {**run.description["settings"], "model.name": evil}
    changed = replace(run, name="other", description={**run.description, "settings": settings})
    text = page([run, changed], [evil])
    _Page(text)
    assert "<b>" not in text and "&lt;b&gt;&amp;" in text
    assert asdict(differing_settings([run, changed])[0])["key"] == "model.name"
