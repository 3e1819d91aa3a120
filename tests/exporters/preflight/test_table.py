"""The table of containers: whole, sourced, and bounded by neighbours only."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime
import pytest

import exporters.preflight.table as table
from exporters.errors import FormatError
from exporters.preflight.measure import row_of, write_probes

DOCUMENT = json.loads((Path(table.__file__).parent / "containers.json").read_text("utf-8"))


def test_every_fact_names_a_source_with_an_address() -> None:
    facts = [
        fact for own in DOCUMENT["containers"].values() for named in own.values() for fact in named.values()
    ]
    assert len(facts) > 200
    for value, key in facts:
        assert value
        assert DOCUMENT["sources"][key]["url"].startswith("https://")
        assert DOCUMENT["sources"][key]["says"]


def test_tags_from_24_08_to_26_11_and_nothing_earlier() -> None:
    assert table.tags()[0] == "24.08"
    assert table.tags()[-1] == "26.11"
    assert len(table.tags()) == 28


def test_versions_never_go_back_from_one_container_to_the_next() -> None:
    """What `at_least` and `at_most` rest on."""
    for name in (
        "triton",
        "onnxruntime",
        "openvino",
        "pytorch",
        "python",
        "cuda",
        "driver",
        "compute_capability",
    ):
        for variant in DOCUMENT["variants"]:
            known = [
                table.numbers(fact.value)
                for tag in table.tags()
                if (fact := table.container(f"{tag}-{variant}").facts.get(name)) is not None
            ]
            if variant == "py3" or name in ("python", "tensorrt"):
                assert known == sorted(known), (name, variant)


def test_bounds_come_from_the_nearest_neighbours() -> None:
    here = table.container("26.07")
    assert here.facts["onnxruntime"].value == "1.27.0"
    assert "openvino" not in here.facts
    assert here.at_least("openvino").value == "2026.1.0"  # type: ignore[union-attr]
    assert here.at_most("openvino").value == "2026.3.1"  # type: ignore[union-attr]
    assert here.at_least("tensorrt") is None


def test_a_variant_has_facts_and_backends_of_its_own() -> None:
    here = table.container("26.07-trtllm-python-py3")
    assert here.facts["tensorrt"].value == "10.14.1.48"
    assert "onnxruntime" not in here.backends  # type: ignore[operator]


@pytest.mark.parametrize(
    "name", ["26", "latest", "26.07-", "26.07-nonsense", "v26.07", "", "26.07-py3 "[:-1] + "x"]
)
def test_what_is_no_tag_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        table.container(name)


def test_an_unlisted_tag_has_bounds_only() -> None:
    here = table.container("31.01")
    assert not here.listed
    assert not here.facts
    assert here.at_least("onnxruntime").value == "1.28.0"  # type: ignore[union-attr]
    assert table.nearest_tags("31.01") == ["26.11"]
    assert table.nearest_tags("19.01") == ["24.08"]


@pytest.mark.parametrize(
    ("tag", "wanted"),
    [("24.08", (21, 10)), ("25.02", (21, 10)), ("25.04", (22, 10)), ("25.08", (22, 10)), ("25.09", (23, 11)), ("26.05", (25, 13)), ("26.07", (26, 13))],
)  # fmt: skip
def test_newest_onnx_a_container_opens(tag: str, wanted: tuple[int, int]) -> None:
    assert table.newest_loadable(tag) == wanted


def test_newest_onnx_the_embedded_server_opens() -> None:
    opset, ir_version = table.newest_loadable("embedded")
    assert opset >= 28
    assert ir_version >= 14


def test_newest_onnx_of_an_unlisted_container_names_the_nearest() -> None:
    with pytest.raises(FormatError, match=r"nearest are 26\.11"):
        table.newest_loadable("27.03")
    with pytest.raises(FormatError, match="not known"):
        table.newest_loadable("26.07-vllm-python-py3")


def test_readers_are_those_whose_runtime_is_new_enough() -> None:
    assert table.readers_of(10, 21)[0] == "24.08"
    assert table.readers_of(11, 18)[0] == "25.09"  # 25.08 has a commit before the release
    assert table.readers_of(13, 26)[0] == "26.07"
    assert table.readers_of(14, 18) == []


def test_the_row_of_the_installed_onnx_runtime_is_what_is_measured_here(tmp_path: Path) -> None:
    write_probes(tmp_path)
    measured = row_of(tmp_path, sys.executable)
    operators = set(measured.pop("contrib_operators"))
    version = onnxruntime.__version__
    assert measured == DOCUMENT["onnxruntime"][version.rpartition(".")[0]], "measure it and add a row"
    since = table.contrib_operators()
    assert operators == {name for name in since if table.numbers(since[name]) <= table.numbers(version)}
