"""Names, references, and the public models that lead to a release."""

from __future__ import annotations

import pytest
from tritonclient.grpc import model_config_pb2 as triton

from serving.releases import configs
from serving.releases.errors import BadRelease


def python_model(name: str, **parameters: str) -> triton.ModelConfig:
    config = triton.ModelConfig(name=name, backend="python", max_batch_size=0)
    config.input.add(name="tiles", data_type=triton.TYPE_STRING, dims=[-1])
    config.output.add(name="probabilities", data_type=triton.TYPE_FP32, dims=[2], label_filename="labels.txt")
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


def ensemble(name: str, *steps: str, version: int = 1) -> triton.ModelConfig:
    config = triton.ModelConfig(name=name, platform="ensemble", max_batch_size=8)
    config.input.add(name="tile", data_type=triton.TYPE_STRING, dims=[1])
    for step in steps:
        config.ensemble_scheduling.step.add(model_name=step, model_version=version)
    return config


def test_every_way_to_name_a_model_is_renamed() -> None:
    models = {"slide", "tile_classifier", "network", "preprocess"}
    slide = configs.renamed(
        python_model("slide", embedder_model="tile_classifier", embedder_version="1", note="the network", clotline_spec="{}"),
        models, 7, "abc")  # fmt: skip
    values = {key: parameter.string_value for key, parameter in slide.parameters.items()}
    assert slide.name == "slide__r7"
    assert values == {"embedder_model": "tile_classifier__r7", "embedder_version": "1", "note": "the network",
                      "clotline_spec": "{}", "clotline_release": "abc"}  # fmt: skip
    classifier = configs.renamed(ensemble("tile_classifier", "preprocess", "network"), models, 7, "abc")
    assert [step.model_name for step in classifier.ensemble_scheduling.step] == [
        "preprocess__r7",
        "network__r7",
    ]
    assert configs.number_of("a__r3__r12") == 12
    assert configs.number_of("tile_classifier") is None


def test_models_are_loaded_behind_what_they_ask() -> None:
    found = {
        "a_slide": python_model("a_slide", embedder_model="b_classifier"),
        "b_classifier": ensemble("b_classifier", "c_preprocess", "d_network"),
        "c_preprocess": python_model("c_preprocess"),
        "d_network": python_model("d_network"),
    }
    assert configs.load_order(found) == ["c_preprocess", "d_network", "b_classifier", "a_slide"]
    found["c_preprocess"].parameters["x"].string_value = "a_slide"
    with pytest.raises(BadRelease, match="in a circle"):
        configs.load_order(found)


def test_steps_that_are_missing_or_not_pinned_are_named() -> None:
    found = {"c": ensemble("c", "network"), "network": python_model("network")}
    assert configs.missing_steps(found) == []
    found["c"] = ensemble("c", "network", "other", version=-1)
    assert configs.missing_steps(found) == [
        "c asks version -1 of network, not 1",
        "c asks other, which the release does not have",
    ]


def test_the_public_ensemble_has_the_steps_and_the_number_of_the_release() -> None:
    entry = configs.renamed(ensemble("tile_classifier", "network"), {"tile_classifier", "network"}, 5, "abc")
    public = configs.public_config("tile_classifier", entry, 5, "abc")
    assert public.name == "tile_classifier"
    assert list(public.version_policy.specific.versions) == [5]
    assert public.ensemble_scheduling == entry.ensemble_scheduling
    assert public.parameters["clotline_release"].string_value == "abc"


def test_a_python_model_gets_an_ensemble_in_front() -> None:
    entry = configs.renamed(python_model("slide", clotline_spec="{}", max_tiles="9"), {"slide"}, 5, "abc")
    public = configs.public_config("slide", entry, 5, "abc")
    (step,) = public.ensemble_scheduling.step
    assert (step.model_name, step.model_version, dict(step.input_map)) == ("slide__r5", 1, {"tiles": "tiles"})
    assert (public.platform, public.backend, public.max_batch_size) == ("ensemble", "", 0)
    assert public.output[0].label_filename == "5/labels.txt"
    assert set(public.parameters) == {"clotline_spec", "clotline_release", "max_tiles"}
    assert public.parameters["max_tiles"].string_value == "9"


def test_the_switch_has_every_public_model_as_a_step() -> None:
    public = {"slide": python_model("slide"), "tile": ensemble("tile", "network")}
    switch = configs.switch_config(public, 5, "abc")
    assert [step.model_name for step in switch.ensemble_scheduling.step] == ["slide", "tile"]
    assert {tensor.name: list(tensor.dims) for tensor in switch.input} == {
        "slide.tiles": [-1],
        "tile.tile": [-1, 1],
    }
    assert configs.to_text(switch).startswith("#")
