from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from worm_dist.config import SearchConfig
from worm_dist.groups.mask import Mask
from worm_dist.search.convergence import CheckRecord, History
from worm_dist.training.reporting.plots import distance_curve, distance_matrix, mask_picture

SMALL = {"stem": 32, "body": 64, "head": 352}
RESNET50 = {
    f"layer{stage}.{block}.conv{conv}": width if conv < 3 else 4 * width
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], 1)
    for block in range(blocks)
    for conv in (1, 2, 3)
}

PICTURES: list[Callable[[Sequence[CheckRecord]], Figure]] = [
    mask_picture,
    distance_matrix,
    lambda findings: distance_curve(findings, 0.1),
]


def _findings(
    checks: int, sizes: Mapping[str, int] = SMALL, **config: object
) -> tuple[CheckRecord, ...]:
    """Masks that change ever less."""
    generator = torch.Generator().manual_seed(0)
    channels = sum(sizes.values())
    wanted = torch.rand(channels, generator=generator)
    history = History(SearchConfig(**config))  # type: ignore[arg-type]
    for check in range(checks):
        scores = wanted + 0.7**check * torch.rand(channels, generator=generator)
        history.record(
            10 * (check + 1), Mask.from_vector(sizes, scores > scores.median()), floored=()
        )
    return history.records


def _pixels(figure: Figure) -> np.ndarray:
    canvas: Any = figure.canvas  # of matplotlib's methods these have no types
    assert isinstance(figure.canvas, FigureCanvasAgg)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _words(figure: Figure) -> str:
    axes = figure.axes[0]
    texts = [axes.get_title(loc="left"), *(text.get_text() for text in axes.texts)]
    return "\n".join(texts)


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("checks", [1, 2, 13, 130])
def test_every_history_can_be_drawn(
    picture: Callable[[Sequence[CheckRecord]], Figure], checks: int
) -> None:
    pixels = _pixels(picture(_findings(checks)))
    assert pixels.std() > 1


@pytest.mark.parametrize("picture", PICTURES)
def test_no_check_is_no_picture(picture: Callable[[Sequence[CheckRecord]], Figure]) -> None:
    with pytest.raises(ValueError, match="before the first check"):
        picture([])


def test_pyplot_keeps_no_figure() -> None:
    for picture in PICTURES:
        _pixels(picture(_findings(3)))
    assert pyplot.get_fignums() == []


def test_mask_picture_shows_kept_and_dropped_in_the_legends_colours() -> None:
    kept = torch.tensor([True] * 30 + [False] * 10)
    history = History(SearchConfig())
    history.record(5, Mask({"only": kept}), floored=())
    figure = mask_picture(history.records)
    pixels = _pixels(figure).reshape(-1, 3)
    shares = {
        patch.get_label(): (pixels == np.round(255 * np.array(to_rgb(patch.get_facecolor())))).all(
            axis=1
        )
        for patch in figure.legends[0].get_patches()
    }
    assert set(shares) == {"kept", "dropped"}
    assert shares["kept"].sum() == pytest.approx(3 * shares["dropped"].sum(), rel=0.05)
    assert "30 of 40 channels kept" in _words(figure)
    assert "no distance before the second check" in _words(figure)


def test_mask_picture_sorts_each_group_for_itself_and_hides_no_change() -> None:
    first = Mask({"a": torch.tensor([False, True, True]), "b": torch.tensor([True, False])})
    second = Mask({"a": torch.tensor([False, False, True]), "b": torch.tensor([False, True])})
    history = History(SearchConfig())
    history.record(1, first, floored=())
    history.record(2, second, floored=())
    (image,) = mask_picture(history.records).axes[0].get_images()
    shown = np.asarray(image.get_array())
    assert shown[:3].tolist() == [[1, 1], [1, 0], [0, 0]]
    assert sorted(shown[3:].tolist()) == [[0, 1], [1, 0]]


def test_a_large_network_is_averaged_to_what_a_screen_shows() -> None:
    findings = _findings(5, RESNET50)
    (image,) = mask_picture(findings).axes[0].get_images()
    shown = np.asarray(image.get_array())
    assert shown.shape == (1000, 5)
    assert shown[:, -1].mean() == pytest.approx(0.5, abs=0.01)


def test_labels_of_a_large_network_do_not_overlap() -> None:
    figure = mask_picture(_findings(5, RESNET50))
    _pixels(figure)
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) > 10
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


CARD = 350
"""Width in pixels in which TensorBoard shows a picture in a window of 1500."""


@pytest.mark.parametrize("sizes", [SMALL, RESNET50])
@pytest.mark.parametrize("picture", PICTURES)
def test_every_text_is_legible_in_a_card(
    picture: Callable[[Sequence[CheckRecord]], Figure], sizes: Mapping[str, int]
) -> None:
    """The letters were three pixels high there."""
    figure = picture(_findings(13, sizes))
    _pixels(figure)
    shrunk = CARD / figure.bbox.width
    texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
    assert len(texts) > 5
    for text in texts:
        height = shrunk * float(text.get_fontsize()) * figure.dpi / 72
        assert height >= 10, text.get_text()


def test_a_long_group_name_leaves_room_for_the_picture() -> None:
    figure = mask_picture(_findings(2, {"encoder." * 20 + "norm": 8, "b": 8}))
    _pixels(figure)
    (label, _) = figure.axes[0].get_yticklabels()
    assert label.get_text().endswith("norm")
    assert figure.axes[0].get_window_extent().width > 0.5 * figure.bbox.width


def test_distance_matrix_is_the_distance_of_every_pair() -> None:
    findings = _findings(7)
    (image,) = distance_matrix(findings).axes[0].get_images()
    expected = [[a.mask.distance(b.mask) for b in findings] for a in findings]
    np.testing.assert_allclose(np.asarray(image.get_array()), expected, atol=1e-6)


@pytest.mark.parametrize(("checks", "annotations"), [(6, 36), (7, 0)])
def test_only_a_small_matrix_is_annotated(checks: int, annotations: int) -> None:
    texts = distance_matrix(_findings(checks)).axes[0].texts
    assert sum("." in text.get_text() for text in texts) == annotations


def test_distance_matrix_ends_with_the_newest_hundred_checks() -> None:
    figure = distance_matrix(_findings(130))
    (image,) = figure.axes[0].get_images()
    assert np.asarray(image.get_array()).shape == (100, 100)
    assert "newest 100 of 130 checks" in figure.axes[0].get_xlabel()
    assert "1,300" in [label.get_text() for label in figure.axes[0].get_xticklabels()]


def test_curve_shows_distances_thresholds_and_verdicts() -> None:
    findings = _findings(12)
    figure = distance_curve(findings, 0.1)
    heights = [
        np.asarray(line.get_ydata(), dtype=float)[: len(findings)].tolist()
        for line in figure.axes[0].get_lines()
    ]
    assert [f.distance_mean for f in findings[1:]] in [line[1:] for line in heights]
    assert [f.distance_max for f in findings[1:]] in [line[1:] for line in heights]
    assert [0.1] * 12 in heights and [f.threshold for f in findings] in heights
    for word in ("elbow", "settled"):
        check = next(i for i, f in enumerate(findings, 1) if getattr(f, word))
        assert f"{word}: step {10 * check}" in _words(figure)


def test_curve_without_a_threshold_has_no_line_for_it() -> None:
    figure = distance_curve(_findings(6, elbow={"rule": "kneedle"}), 0.1)
    assert "elbow below" not in _words(figure)
    assert "settled below 0.1" in _words(figure)


def test_names_of_the_curves_do_not_overlap() -> None:
    figure = distance_curve(_findings(40), 0.1)
    _pixels(figure)
    texts = figure.axes[0].texts
    names = [t for t in texts if t.get_text().startswith(("mean", "largest", "settled b"))]
    assert len(names) == 3
    boxes = [text.get_window_extent() for text in names]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
