"""The generated configurations are what Triton's protobuf says, and fit to each other."""

from __future__ import annotations

import json

import pytest
from google.protobuf import text_format

from exporters.errors import RepositoryError
from exporters.formats import FORMATS, formats_named
from exporters.formats.interface import ServedFormat
from exporters.triton_config import (
    ModelConfig,
    classifier_config,
    from_text,
    labels_text,
    network_config,
    preprocess_config,
    to_text,
)
from serving.releases.configs import references, renamed
from slides.model_metrics import ANSWERS_FOR


def preprocess() -> ModelConfig:
    return preprocess_config(
        input_size_px=96, max_batch=8, instances=2, max_tile_bytes=1000, max_tile_pixels=5000
    )


def network(fmt: ServedFormat, **changes: object) -> ModelConfig:
    settings = {
        "backend": fmt.backend,
        "platform": fmt.platform,
        "artifact_filename": fmt.artifact_filename,
        "tensors": fmt.tensors,
        "parameters": fmt.parameters,
        "input_size_px": 96,
        "classes": 3,
        "max_batch": 8,
        "instances": 2,
        "instance_kind": "cpu",
        "versions_loaded": 2,
    }
    return network_config(fmt.model_name, **(settings | changes))  # type: ignore[arg-type]


@pytest.fixture(params=[name for name in FORMATS if "rtx" not in name])
def fmt(request: pytest.FixtureRequest) -> ServedFormat:
    return formats_named([request.param])[0]


def test_preprocessing_has_no_dynamic_batches_in_which_a_malformed_request_would_fail_its_neighbours() -> (
    None
):
    assert not preprocess().HasField("dynamic_batching")


def test_networks_on_a_cpu_gather_as_many_tiles_as_they_are_told_and_warm_up_with_them(
    fmt: ServedFormat,
) -> None:
    assert list(network(fmt).dynamic_batching.preferred_batch_size) == [2]
    gathering = network(fmt, gathered=4)
    assert list(gathering.dynamic_batching.preferred_batch_size) == [4]
    assert [warmup.batch_size for warmup in gathering.model_warmup] == [1, 4, 8]
    assert list(network(fmt, gathered=4, max_batch=3).dynamic_batching.preferred_batch_size) == [3]


def test_the_ensembles_dataflow_connects_tensors_of_the_same_type_and_shape(fmt: ServedFormat) -> None:
    steps = {config.name: config for config in (preprocess(), network(fmt))}
    ensemble = classifier_config(
        "tile_classifier",
        network=steps[fmt.model_name],
        tensors=fmt.tensors,
        network_version=7,
        preprocess_version=1,
        parameters={},
    )
    known = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        config = steps[step.model_name]
        assert config.max_batch_size >= ensemble.max_batch_size
        assert {tensor.name for tensor in config.input} == set(step.input_map)
        for tensor in config.input:
            assert known[step.input_map[tensor.name]] == (tensor.data_type, list(tensor.dims))
        for tensor in config.output:
            known[step.output_map[tensor.name]] = (tensor.data_type, list(tensor.dims))
    for tensor in ensemble.output:
        assert known[tensor.name] == (tensor.data_type, list(tensor.dims))
    assert [step.model_version for step in ensemble.ensemble_scheduling.step] == [1, 7]
    assert ensemble.platform == "ensemble"
    assert not ensemble.instance_group  # Triton refuses one for an ensemble


def test_native_pytorch_backend_finds_tensors_by_place() -> None:
    config = network(formats_named(["torchscript"])[0])
    assert [tensor.name for tensor in config.input] == ["tiles__0"]
    assert [tensor.name for tensor in config.output] == [
        "probabilities__0",
        "confidence__1",
        "label_index__2",
    ]
    assert (config.backend, config.default_model_filename) == ("pytorch", "model.pt")


def test_onnx_runs_one_thread_an_instance() -> None:
    config = network(formats_named(["onnx"])[0], max_batch=1)
    assert config.parameters["intra_op_thread_count"].string_value == "1"
    assert (config.backend, config.platform) == ("onnxruntime", "")
    assert [warmup.batch_size for warmup in config.model_warmup] == [1]


def test_text_reads_back_with_every_character() -> None:
    spec = json.dumps({"class_names": ['"quoted"', "naïve\\path", "赤 血球"]}, ensure_ascii=False)
    config = preprocess()
    config.parameters["clotline_spec"].string_value = spec
    read = text_format.Parse(to_text(config), ModelConfig())
    assert read.parameters["clotline_spec"].string_value == spec
    assert read == config


def test_broken_text_is_an_error_with_its_origin() -> None:
    with pytest.raises(
        RepositoryError, match=r"m/config\.pbtxt is not a Triton model configuration.*no_such_field"
    ):
        from_text('name: "m"\nno_such_field: 1', origin="m/config.pbtxt")


def test_labels_are_a_class_a_line() -> None:
    assert labels_text(["CE", "large artery"]) == "CE\nlarge artery\n"
    with pytest.raises(RepositoryError, match="line break"):
        labels_text(["CE", "two\nlines"])


def test_a_network_says_whose_answers_it_gives_and_a_live_server_leaves_that_alone(fmt: ServedFormat) -> None:
    config = network(fmt, answers_for=("tile_classifier", ("CE", 'a "b"', "c")))
    told = json.loads(config.parameters[ANSWERS_FOR].string_value)
    assert told == {"model": "tile_classifier", "classes": ["CE", 'a "b"', "c"]}
    assert from_text(to_text(config), origin="x") == config
    models = {config.name, "tile_classifier"}
    assert renamed(config, models, 7, "id").parameters[ANSWERS_FOR] == config.parameters[ANSWERS_FOR]
    assert references(config, models) == set(), "a network asks nobody"
    assert ANSWERS_FOR not in network(fmt).parameters
