"""The picture of a calibration shows every point that was measured, on the right side of the condition."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from tether.causal.calibration import Point
from tether.report.frontier import frontier_png


@pytest.fixture
def record():
    points = [
        Point("constant" if size == 0 else "fill", size, form, level, agreement, loss, 9.0)._asdict()
        for size, agreement in ((0.0, 0.8), (1.5, 0.985), (3.0, 1.0))
        for form in ("context", "constant")
        for level, loss in ((8.0, 900.0), (2.0, 4000.0), (100.0, 40.0))
    ]
    return {"frontier": points, "chosen": points[-1]}


def test_all_points_are_drawn_in_the_order_of_their_thresholds(record, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    frontier_png(record, tmp_path / "unused.png")
    axes = kept[0].axes[0]
    curves = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert set(curves) - {"chosen"} >= {
        "context threshold, no class noise",
        "constant threshold, scale_S >= 1.50",
        "constant threshold, scale_S >= 3.00",
    }
    np.testing.assert_array_equal(
        curves["context threshold, scale_S >= 1.50"], [(0.985, 4000.0), (0.985, 900.0), (0.985, 40.0)]
    )
    np.testing.assert_array_equal(curves["chosen"], [(1.0, 40.0)])
    drawn = sum(len(line) for label, line in curves.items() if "threshold" in label)
    assert drawn == len(record["frontier"])
    assert axes.get_yscale() == "log"
    assert "nats" in axes.get_ylabel()


def test_the_file_is_a_picture_and_the_same_one_twice(record, tmp_path):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    frontier_png(record, first)
    frontier_png(record, second)
    assert first.read_bytes() == second.read_bytes()
    pixels = imread(first)
    assert pixels.shape == (546, 975, 4)
    assert pixels[..., :3].min() < 0.5 < pixels[..., :3].max()
