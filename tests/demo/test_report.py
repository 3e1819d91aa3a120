from __future__ import annotations

import dataclasses
import html.parser
import re
import xml.etree.ElementTree as ET

import pytest

from demo.charts import dot_strip, line_chart
from demo.outcome import Outcome
from demo.parity import Parity
from demo.report import chosen, history_charts, render
from demo.scores import scored

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(html.parser.HTMLParser):
    """Collects text and links; fails on tags that do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_the_report_needs_nothing_from_outside(outcome: Outcome) -> None:
    page = render(outcome)
    links = read(page).links
    assert len(links) == 6
    assert all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert not re.search(r"@import|url\(|<script|<link", page)


def test_the_report_tells_what_was_found(outcome: Outcome) -> None:
    text = re.sub(r"[ \n]+", " ", " ".join(read(render(outcome)).text))
    for words in (
        "The slides are synthetic.",
        "Every check passed",
        "resnet18",
        "30 synthetic slides of 20 patients in 3 centres",
        "tile_classifier_torchscript",
        "2.4\u2009\u00d7\u200910\u207b\u2077",
        "p2_0",
        "(wrong)",
        "python -m slides demo --out runs/demo/data",
        "163.2",
    ):
        assert words in text


def test_problems_come_first(outcome: Outcome) -> None:
    worse = dataclasses.replace(outcome, synthetic=False, parity={"onnx": Parity("m", "http://h", 9, 0.5, 3)})
    text = " ".join(read(render(worse)).text)
    assert "1 check failed" in text
    assert "does not match PyTorch" in text
    assert "The slides are synthetic" not in text


def test_names_are_escaped(outcome: Outcome) -> None:
    image = scored("<b>x</b>", "CE", {"CE": 1.0, "LAA": 0.0})
    changed = dataclasses.replace(outcome, images=[image], held_out_patients=[image], heatmaps={})
    page = render(changed)
    assert "<b>x</b>" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page


def test_tiles_three_classes_and_no_history_are_told_too(outcome: Outcome) -> None:
    images = [scored(f"t{n}", name, {"A": 0.2, "B": 0.5, "C": 0.3}) for n, name in enumerate("ABC")]
    spec = {**outcome.manifest["spec"], "class_names": ["A", "B", "C"]}
    changed = dataclasses.replace(
        outcome,
        source="tiles",
        manifest={**outcome.manifest, "spec": spec},
        images=images,
        held_out_patients=images,
        heatmaps={},
        history=[],
    )
    text = " ".join(read(render(changed)).text)
    assert "every image is one tile" in text
    assert "Where on the slide" not in text


def test_mistakes_are_shown_first_then_classes_in_turn(outcome: Outcome) -> None:
    assert [image.name for image in chosen(outcome.images, outcome.heatmaps, 4)] == [
        "p2_0",
        "p1_0",
        "p3_0",
        "p1_1",
    ]
    assert chosen(outcome.images, {}, 4) == []


def test_history_becomes_a_chart_for_losses_and_one_for_scores(outcome: Outcome) -> None:
    loss, scores = history_charts(outcome.history)
    assert "train loss" in loss
    assert "held out tile accuracy" in scores
    assert "learning" not in loss + scores
    assert history_charts([]) == []


def test_lines_stay_inside_their_frame() -> None:
    chart = line_chart({"a & b": [0.1, 5.0, -3.0], "c": [2.0]}, title="<Loss>")
    root = ET.fromstring(chart)  # noqa: S314 (our own)
    points = [point.split(",") for line in root.iter("polyline") for point in line.attrib["points"].split()]
    assert len(points) == 4
    assert all(40 < float(x) < 460 and 40 < float(y) < 190 for x, y in points)
    assert float(points[1][1]) < float(points[0][1]) < float(points[2][1])  # larger is higher up


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5]])
def test_a_flat_line_is_a_chart_too(values: list[float]) -> None:
    ET.fromstring(line_chart({"a": values}, title="t"))  # noqa: S314 (our own)


def test_every_point_has_its_mark_in_its_row() -> None:
    points = [("x", "CE", 0.5), ("y", "CE", 0.5), ("z", "LAA", 1.0)]
    root = ET.fromstring(dot_strip(points, axis="p", groups=["CE", "LAA"]))  # noqa: S314 (our own)
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter("circle")]
    assert len(circles) == 2
    assert len(set(circles)) == 2  # not on top of each other
    assert len(list(root.iter("rect"))) == 1
    assert [title.text for title in root.iter("title")] == ["x: 0.500", "y: 0.500", "z: 1.000"]
