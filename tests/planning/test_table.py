from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from worm_dist import Mask, WormConfig
from worm_dist.groups.channel_groups import ChannelGroup, Groups
from worm_dist.planning.forecast import Forecast, forecast
from worm_dist.planning.step_time import Link
from worm_dist.planning.table import show
from worm_dist.planning.target import Target


@pytest.fixture(scope="module")
def found() -> Forecast:
    link = Link.parse(8, "10Gbit/s")
    return forecast(Target("vgg_small", (1, 8, 8), 10, WormConfig()), None, link, 4)


@pytest.fixture(scope="module")
def deep(found: Forecast) -> Forecast:
    """The same with the names that modules have in a large network, many of them in a group."""

    def deeper(name: str) -> str:
        return f"features.denseblock{len(name)}.denselayer{name.rpartition('.')[2]}.{name}"

    groups = [
        ChannelGroup(
            deeper(group.name),
            group.num_channels,
            tuple(
                dataclasses.replace(member, module=deeper(member.module))
                for member in group.members
                for _ in range(12)
            ),
        )
        for group in found.groups
    ]
    reasons = {f"features.denseblock1.denselayer{n}.norm1": "because of that" for n in range(12)}
    costs = {
        stage: dataclasses.replace(
            each, groups={deeper(name): cost for name, cost in each.groups.items()}
        )
        for stage, each in found.costs.items()
    }
    mask = Mask({deeper(name): kept for name, kept in found.mask.items()})
    others = [deeper(f"fc{n}") for n in range(12)]
    return dataclasses.replace(
        found, groups=Groups(groups, reasons), mask=mask, costs=costs, others=others
    )


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _log(found: Forecast) -> list[str]:
    file = io.StringIO()
    show(found, file)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def _on_a_terminal(found: Forecast, columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    file = _Terminal()
    show(found, file)
    return file.getvalue()


def test_it_says_what_is_dropped_and_what_that_saves(found: Forecast) -> None:
    lines = _log(found)
    assert lines[:3] == [
        "vgg_small",
        "Input 1x8x8, 10 classes.",
        "Drops 224 of 448 channels: 50 % asked, 50 % after rounding to 8.",
    ]
    start = lines.index("Channel groups, ranked by the size of their scales")
    assert lines[start + 1 : start + 9] == [
        "producers    channels  dropped  scored by    consumers",
        "features.0         32       16  features.1   features.3",
        "features.3         32       16  features.4   features.7",
        "features.7         64       32  features.8   features.10",
        "features.10        64       32  features.11  features.14",
        "features.14       128       64  features.15  features.17",
        "features.17       128       64  features.18  head",
        "",
    ]
    start = lines.index("Costs, of what makes the channels of each group")
    assert lines[start + 1 : start + 12] == [
        "                 parameters  FLOPs a sample             bytes a step",
        "group          dense ticket    dense ticket   dense truncated ticket",
        "features.0       352    176    36.9k  18.4k   1.41k       704    704",
        "features.3     9.28k  2.34k    1.18M   295k   37.1k     18.6k  9.34k",
        "features.7     18.6k  4.67k     590k   147k   74.2k     37.1k  18.7k",
        "features.10    37.0k  9.28k    1.18M   295k    148k     74.0k  37.1k",
        "features.14    74.0k  18.6k     590k   147k    296k      148k  74.2k",
        "features.17     148k  37.0k    1.18M   295k    591k      295k   148k",
        "others: head   1.29k    650    2.56k  1.28k   5.16k     5.16k  2.60k",
        "all             288k  72.7k    4.76M  1.20M   1.15M      579k   291k",
        "",
    ]
    start = lines.index("The whole network")
    assert lines[start + 1 : start + 9] == [
        "                parameters     FLOPs a sample       bytes a step",
        "dense      288,170 100.0 %  4,758,016 100.0 %  1,152,680 100.0 %",
        "truncated  288,170 100.0 %  4,758,016 100.0 %    578,920  50.2 %",
        "faded      288,170 100.0 %  4,758,016 100.0 %    290,664  25.2 %",
        "ticket      72,666  25.2 %  1,199,360  25.2 %    290,664  25.2 %",
        "truncated: the gradients of dropped channels are not sent.",
        "faded: nor are those of the columns that read them.",
        "ticket: dropped channels are gone.",
    ]


def test_it_says_what_the_engine_will_hold(found: Forecast) -> None:
    """Of a rank that passes four samples at a time."""
    lines = _log(found)
    start = lines.index("The engine's memory on a rank, in MiB")
    assert lines[start + 1 : start + 6] == [
        "           held weights  held state  packing  indices  inputs           all",
        "dense              0.00        0.00     0.00     0.00    0.01  0.01   0.7 %",
        "truncated          0.55        0.00     0.55     2.21    0.01  3.32 301.6 %",
        "faded              0.55        0.00     0.28     1.67    0.01  2.50 227.9 %",
        "ticket             0.00        0.00     0.00     0.00    0.00  0.00   0.0 %",
    ]


def test_an_estimate_says_what_it_is(found: Forecast) -> None:
    text = "\n".join(_log(found))
    assert "A step's time, estimated: 8 ranks at 10Gbit/s, 4 samples each" in text
    assert "a ring's 2 (n-1)/n x bytes / bandwidth + 2 (n-1) x latency" in " ".join(text.split())
    assert "measured on this machine (CPU, 1 thread; median of" in " ".join(text.split())
    for stage in ("dense", "truncated", "faded", "ticket"):
        assert re.search(rf"^{stage} +\S+ \S?s +\S+ \S?s +\S+ \S?s +\S+ % ", text, re.MULTILINE)


@pytest.mark.parametrize("columns", [80, 100])
def test_nothing_is_wrapped_within_a_table(
    columns: int, found: Forecast, deep: Forecast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in (found, deep):
        text = re.sub(r"\x1b\[[0-9;]*m", "", _on_a_terminal(each, columns, monkeypatch))
        lines = text.splitlines()
        assert max(len(line) for line in lines) <= columns
        start = next(n for n, line in enumerate(lines) if line.startswith("producers"))
        assert lines[start + len(each.groups) + 1].strip() == ""  # a line each
        rows = lines[start : start + len(each.groups) + 1]
        assert len({row[:24] for row in rows}) == len(rows), "names that cannot be told apart"
        start = next(n for n, line in enumerate(lines) if line.startswith("group "))
        assert lines[start + len(each.groups) + 2].startswith("all")
        start = next(n for n, line in enumerate(lines) if line.startswith("A step's time"))
        stages = [line.split()[0] for line in lines[start + 2 : start + 6]]
        assert stages == ["dense", "truncated", "faded", "ticket"]
        assert "…" not in text


def test_a_log_is_plain(deep: Forecast, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.setenv(name, "1")
    text = "\n".join(_log(deep))
    assert text.isascii() and "\x1b" not in text


def test_what_stays_dense_is_told_with_the_reason(deep: Forecast) -> None:
    lines = _log(deep)
    start = lines.index("What stays dense")
    assert lines[start + 1 : start + 3] == [
        "f.d1.denselayer0.norm1 +11  because of that",
        "",
    ]


def test_our_own_form_of_a_known_network_is_told_from_torchvisions(found: Forecast) -> None:
    other = dataclasses.replace(found, target=dataclasses.replace(found.target, model="resnet18"))
    assert _log(other)[0].endswith("torchvision's is torchvision/resnet18")


def _head(**settings: Any) -> str:
    """What is said before the tables."""
    target = Target("vgg_small", (1, 8, 8), 10, WormConfig(**settings))
    lines = _log(forecast(target, None, None, None))
    return " ".join(lines[2 : lines.index("")])


def test_the_head_says_what_share_was_asked_for_and_what_came_of_it() -> None:
    text = _head(search={"threshold": "global", "prune_ratio": 0.3, "ratios": {"features.17": 0.5}})
    assert "Drops 164 of 448 channels: 30 % asked, others by search.ratios" in text
    assert "36.6 % after rounding to 8." in text and "every other group loses" in text
    assert "so every norm loses about" in _head(search={"threshold": "global", "grouping": "layer"})
    text = _head(search={"prune_ratio": 0.3, "threshold": "layer"}, ticket={"round_to": 1})
    assert text.endswith("30 % asked, 29.5 % reached.")  # every group rounds its own count down


def _titles(name: str, **search: Any) -> list[str]:
    """The title and the headings of the table of groups."""
    target = Target(name, (1, 8, 8), 10, WormConfig(search=search))
    lines = _log(forecast(target, None, None, None))
    start = next(n for n, line in enumerate(lines) if line.startswith("Channel groups"))
    return [lines[start], " ".join(lines[start + 1].split())]


def test_the_score_is_the_one_that_the_settings_name() -> None:
    headings = "producers channels dropped scored by consumers"
    assert _titles("resnet20") == [
        "Channel groups, ranked by the mean size of their scales",
        headings,
    ]
    largest = "Channel groups, ranked by the largest size of their scales"
    assert _titles("resnet20", coupling="max") == [largest, headings]
    by_layer = "Channel groups, ranked layer by layer by the size of their scales"
    assert _titles("resnet20", grouping="layer") == [by_layer, headings]
    assert _titles("vit_small", importance="gate") == [
        "Channel groups, ranked by the size of their gates",
        headings,
    ]
    assert _titles("vit_small", importance="weight_norm") == [
        "Channel groups, ranked by the mean norm of the weights that make a channel",
        "producers channels dropped consumers",
    ]


def test_heads_and_neurons_are_scored_by_gates() -> None:
    lines = _log(forecast(Target("vit_small", (1, 8, 8), 10, WormConfig()), None, None, None))
    start = next(n for n, line in enumerate(lines) if line.startswith("producers"))
    assert lines[start + 1].split()[1:4] == ["6", "3", "gate"]
    assert lines[start + 2].split()[1:4] == ["192", "96", "gate"]
    start = lines.index("What stays dense")
    assert lines[start + 1].endswith(
        "ln_1 +8  LayerNorm: of all norms only BatchNorm's channels are dropped"
    )
    assert lines[-1] == "The ticket has no gates: they are folded into the weights."


def test_channels_of_several_places_say_of_how_many(found: Forecast) -> None:
    wide = [
        dataclasses.replace(
            group,
            members=tuple(
                dataclasses.replace(
                    member, positions=torch.arange(4 * group.num_channels).view(-1, 4)
                )
                for member in group.members
            ),
        )
        for group in found.groups
    ]
    lines = _log(dataclasses.replace(found, groups=Groups(wide, {})))
    start = next(n for n, line in enumerate(lines) if line.startswith("producers"))
    assert lines[start + 1].split()[1:5] == ["32", "x", "4", "16"]
    assert lines[start + 7] == "N x k: N channels, each of which takes k places."


def test_a_ticket_is_told_from_equal_shares(found: Forecast) -> None:
    drawn = dataclasses.replace(found, ticket=Path("runs/digits/ticket"))
    assert "those that the ticket in runs/digits/ticket has dropped." in " ".join(_log(drawn))
