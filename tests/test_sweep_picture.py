"""Pictures of sweeps: every point is drawn, whatever varies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from lp_plugin import InvalidInputError
from lp_plugin.sweep.grid import Point
from lp_plugin.sweep.picture import sweep_picture


def point(**changed: object) -> Point:
    """A point that was planned, for pictures of what no model gives."""
    blank = {
        "model": "model",
        "phase": "decode",
        "objective": "throughput",
        "constraints": "",
        "cluster": "h200:8",
        "device": "h200",
        "num_devices": 8,
        "num_stages": 8,
        "dtype": "float16",
        "weight_dtype": "float16",
        "batch": 8,
        "sequence": 512,
        "outcome": "planned",
        "tokens_per_second": 100.0,
    }
    return Point(**{**blank, **changed})


def misfit(**changed: object) -> Point:
    return point(**{"outcome": "does not fit", "tokens_per_second": None, **changed})


PICTURES = {
    "one point": [point()],
    "one number": [point(batch=batch, tokens_per_second=float(batch)) for batch in (1, 3, 5)],
    "powers": [point(batch=2**power, tokens_per_second=2.0**power) for power in range(12)],
    "many values": [point(sequence=value, tokens_per_second=1e6 / value) for value in range(1, 200)],
    "clusters without numbers": [point(cluster=name, device=name) for name in ("a", "b")],
    "equal devices, other links": [point(cluster=name) for name in ("a.toml", "b.toml")],
    "precisions": [point(weight_dtype=name) for name in ("float16", "int8")],
    "nothing fits": [misfit(batch=batch) for batch in (8, 16)],
    "nothing fits, one point": [misfit()],
    "no sense": [point(), misfit(batch=9, outcome="makes no sense")],
    "costs nothing": [point(tokens_per_second=float("inf")), point(batch=16)],
    "a line without points": [misfit(num_devices=2), misfit(num_devices=2, batch=16), point(), point(batch=16)],
    "long names": [point(cluster="x" * 80 + f"{name}.toml", device=name) for name in "ab"],
    "two panels": [
        point(batch=batch, sequence=sequence, dtype=dtype)
        for batch in (1, 2, 3)
        for sequence in (4, 5)
        for dtype in ("float16", "bfloat16")
    ],
    "five panels in a block": [
        point(batch=batch, sequence=sequence, num_devices=devices, cluster=f"h200:{devices}")
        for batch in range(1, 8)
        for sequence in range(1, 7)
        for devices in range(1, 6)
    ],
    "many lines": [point(batch=batch, sequence=sequence) for batch in range(1, 31) for sequence in range(1, 25)],
}


@pytest.mark.parametrize("name", PICTURES)
def test_any_sweep_can_be_drawn(name: str, tmp_path: Path) -> None:
    target = tmp_path / "sweep.png"
    sweep_picture(PICTURES[name], target)
    assert imread(target).shape[0] > 300
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.png"]


def test_everything_that_varies_is_drawn(tmp_path: Path) -> None:
    """An axis, a line for each value of another variable, and a panel for each combination of the rest."""
    points = [
        point(
            sequence=sequence,
            num_devices=devices,
            cluster=f"h200:{devices}",
            batch=batch,
            weight_dtype=weights,
            outcome="planned" if devices == 8 else "does not fit" if batch == 4 else "makes no sense",
            tokens_per_second=1000.0 / sequence if devices == 8 else None,
        )
        for sequence in (1024, 2048, 4096, 8192)
        for devices in (2, 4, 8)
        for batch in (4, 16)
        for weights in ("float16", "int4")
    ]
    sweep_picture(points, tmp_path / "sweep.svg")
    texts = re.findall("<!-- (.*) -->", (tmp_path / "sweep.svg").read_text(encoding="utf-8"))
    assert {"tokens of context", "1,024", "2,048", "4,096", "8,192", "tokens/s"} <= {*texts}
    assert {"devices", "2", "4", "8", "does not fit", "makes no sense"} <= {*texts}
    panels = [text for text in texts if "sequences in the batch" in text]
    assert panels == [
        "4 sequences in the batch, float16",
        "4 sequences in the batch, float16, int4 weights",
        "16 sequences in the batch, float16",
        "16 sequences in the batch, float16, int4 weights",
    ]


def test_clusters_that_differ_in_more_than_devices(tmp_path: Path) -> None:
    """Equally many equal devices: neither kind nor number tells them apart."""
    named = [point(cluster=name, num_devices=count) for name, count in (("a.toml", 8), ("b.toml", 8), ("c.toml", 4))]
    sweep_picture(named, tmp_path / "sweep.svg")
    text = (tmp_path / "sweep.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {words} -->" in text for words in ("a.toml", "b.toml", "c.toml", "cluster"))
    assert "<!-- devices -->" not in text


def test_numbers_are_drawn_in_their_order(tmp_path: Path) -> None:
    pictures = []
    for batches in ((1, 5, 9, 2), (9, 5, 2, 1)):
        sweep_picture([point(batch=batch, tokens_per_second=10.0 * batch) for batch in batches], tmp_path / "sweep.png")
        pictures.append(imread(tmp_path / "sweep.png"))
    assert (pictures[0] == pictures[1]).all()


def test_a_point_is_drawn_where_it_belongs(tmp_path: Path) -> None:
    """One bright mark at the left or at the right of the panel."""
    columns = []
    for place in (1, 9):
        points = [point(batch=1, tokens_per_second=None, outcome="does not fit"), misfit(batch=9)]
        points[place == 9] = point(batch=place)
        sweep_picture(points, tmp_path / "sweep.png")
        pixels = imread(tmp_path / "sweep.png")[:, :, :3]
        blue = (abs(pixels - [0x44 / 255, 0x77 / 255, 0xAA / 255]).max(axis=2) < 0.02).nonzero()
        upper = blue[1][blue[0] < pixels.shape[0] * 0.7]  # the marks of what does not fit are below
        columns.append(float(upper.mean()) / pixels.shape[1])
    assert columns[0] < 0.3
    assert columns[1] > 0.6


def test_pictures_that_would_be_too_large(tmp_path: Path) -> None:
    lines = [point(batch=batch, sequence=sequence) for batch in range(1, 31) for sequence in range(1, 26)]
    with pytest.raises(InvalidInputError, match="25 lines"):
        sweep_picture(lines, tmp_path / "sweep.png")
    panels = [
        point(batch=batch, sequence=sequence, num_devices=devices, cluster=f"h200:{devices}", dtype=dtype)
        for batch in range(1, 8)
        for sequence in range(1, 6)
        for devices in range(1, 6)
        for dtype in ("a", "b", "c", "d", "e")
    ]
    with pytest.raises(InvalidInputError, match="25 panels"):
        sweep_picture(panels, tmp_path / "sweep.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["missing/sweep.png", "sweep.unknown"])
def test_a_picture_that_can_not_be_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="can't be written"):
        sweep_picture([point()], tmp_path / name)
    assert not list(tmp_path.iterdir())
