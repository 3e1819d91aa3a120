import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from slides.decode import decode_tile, encode_tile
from slides.spec import ModelSpec
from tests.training.tracking.conftest import write_journal
from training import checkpoint
from training.errors import OutputExistsError, TrackingError, TrackingOptionsError
from training.tracking import promote, registry, sender, store


@pytest.fixture(scope="module")
def registered(empty_database, checkpoint_dir, tmp_path_factory):
    """The URI of a store with two versions of the model clotline; tests move only aliases of their own."""
    folder = tmp_path_factory.mktemp("model registry")
    shutil.copy(empty_database, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    before = dict(os.environ)
    for number in range(2):
        directory = write_journal(uri, folder / f"run {number}", checkpoint_dir, register="clotline")
        one = sender.Sender(directory, uri, warn=print)
        one.send()
        one.close()
        assert one.sent.model_version == str(number + 1)
    os.environ.clear()
    os.environ.update(before)
    return uri


@pytest.fixture
def client(registered):
    return store.connect(registered)


def test_the_model_answers_what_the_checkpoint_answers(registered, client, checkpoint_dir):
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model("models:/clotline@challenger")
    loaded = checkpoint.load(checkpoint_dir)
    size_px = loaded.spec.input_size_px
    images_NHWC = np.stack([decode_tile(loaded.golden_tiles[0].data, size_px)] * 3)
    probabilities_NK = model.predict(images_NHWC)
    import torch

    with torch.inference_mode():
        expected_NK = torch.softmax(loaded.model(torch.from_numpy(images_NHWC)), dim=1).numpy()
    np.testing.assert_allclose(probabilities_NK, expected_NK, atol=1e-6)
    assert probabilities_NK.dtype == np.float32

    inputs, outputs = model.metadata.signature.inputs.inputs, model.metadata.signature.outputs.inputs
    assert (inputs[0].type, inputs[0].shape) == (np.dtype(np.uint8), (-1, 32, 32, 3))
    assert (outputs[0].type, outputs[0].shape) == (np.dtype(np.float32), (-1, 2))
    example_NHWC = model.input_example
    np.testing.assert_array_equal(example_NHWC, images_NHWC[:1])
    with pytest.raises(Exception, match="shape"):
        model.predict(images_NHWC[:, :16])


def test_nothing_in_the_model_is_a_pickle(registered):
    models = Path(registered.removeprefix("sqlite:///")).parent / "mlflow-artifacts" / "models"
    files = [path for path in models.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".pth")]
    assert not [path for path in files if path.read_bytes().startswith((b"\x80\x04", b"\x80\x05"))]
    assert [path for path in files if path.name == "model.safetensors"]


def test_the_model_has_the_scores_and_its_run(registered, client):
    version = client.get_model_version_by_alias("clotline", "challenger")
    assert version.version == 2
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert {metric.key: metric.value for metric in model.metrics} == {"slide_roc_auc": 0.75}
    assert model.source_run_id == version.run_id
    assert version.tags["clotline.data_fingerprint"] == "f" * 64


def promoted(uri, *words):
    parser = argparse.ArgumentParser()
    promote.add_arguments(parser)
    return promote.run(parser.parse_args([*words, "--tracking-uri", uri]))


def test_champion_moves_only_by_command_and_every_move_is_recorded(registered, client):
    assert "champion" not in client.get_registered_model("clotline").aliases
    assert promoted(registered, "clotline", "1")["from_version"] is None
    assert promoted(registered, "clotline", "challenger")["from_version"] == "1"
    assert promoted(registered, "clotline", "2")["from_version"] == "2"  # stays where it is: no record
    assert promoted(registered, "clotline", "1")["version"] == "1"  # the way back

    model = client.get_registered_model("clotline")
    assert model.aliases == {"challenger": 2, "champion": 1}
    moves = [
        json.loads(value) for key, value in sorted(model.tags.items()) if "clotline.alias.champion" in key
    ]
    assert [(move["from_version"], move["version"]) for move in moves] == [
        (None, "1"),
        ("1", "2"),
        ("2", "1"),
    ]
    assert all(move["by"] and move["at"].endswith("+00:00") for move in moves)


def test_the_checkpoint_of_an_alias_comes_back(registered, checkpoint_dir, tmp_path):
    fetched = registry.fetch_checkpoint(
        "models:/clotline@challenger", tmp_path / "a b" / "fetched", uri=registered
    )
    assert checkpoint.load(fetched).manifest == checkpoint.load(checkpoint_dir).manifest
    assert [path.name for path in fetched.parent.iterdir()] == ["fetched"]
    assert registry.fetch_checkpoint("models:/clotline/1", tmp_path / "first", uri=registered).is_dir()
    with pytest.raises(OutputExistsError):
        registry.fetch_checkpoint("models:/clotline/1", tmp_path / "first", uri=registered)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("clotline", "nobody"), r"no alias 'nobody'; it has .*challenger \(version 2\)"),
        (("clotline", "7"), "clotline version 7 is not in the registry"),
        (("unknown", "1"), "unknown version 1 is not in the registry"),
    ],
)
def test_what_the_registry_does_not_have(registered, words, reason):
    with pytest.raises(TrackingError, match=reason):
        promoted(registered, *words)


def test_names_are_checked_before_any_server_is_asked(tmp_path):
    nowhere = "http://127.0.0.1:9"
    with pytest.raises(TrackingOptionsError, match="model name"):
        promoted(nowhere, "a/b", "1")
    with pytest.raises(TrackingOptionsError, match="alias"):
        promoted(nowhere, "clotline", "1", "--alias", "latest")
    with pytest.raises(TrackingOptionsError, match="names no model"):
        registry.fetch_checkpoint("models:/clotline", tmp_path / "x", uri=nowhere)
    with pytest.raises(TrackingError, match="cannot be reached"):
        promoted(nowhere, "clotline", "1")


def test_a_slide_checkpoint_is_a_model_of_the_tiles_of_one_slide(uri, tmp_path):
    import mlflow.pyfunc
    import torch

    from training.mil import checkpoint as slide_checkpoint
    from training.mil import network
    from training.mil.options import BagOptions

    torch.manual_seed(0)
    spec = ModelSpec(
        class_names=("CE", "LAA", "other"),
        tile_size_px=48,
        um_per_px=0.5,
        input_size_px=32,
        tiles_per_slide=4,
        min_tissue_share=0.0,
    )
    options = BagOptions(tiles=4, pooling="attention")
    encoder = network.build_encoder("shufflenet_v2_x0_5", spec, options).module.eval()
    head = network.build_head(encoder.feature_dim, spec, options).eval()
    generator = np.random.default_rng(0)
    tiles = tuple(encode_tile(generator.integers(0, 255, (48, 48, 3), np.uint8), 90) for _ in range(3))
    bag = slide_checkpoint.GoldenBag("a", "CE", tiles, (0.4, 0.3, 0.3), (0.2, 0.4, 0.4))
    slide_checkpoint.save(
        tmp_path / "slide checkpoint",
        encoder,
        head,
        spec,
        architecture="shufflenet_v2_x0_5",
        bags=options,
        metrics={},
        data={"fingerprint": "f" * 64},
        golden_bags=[bag],
    )
    directory = write_journal(uri, tmp_path / "run", tmp_path / "slide checkpoint", register="slides")
    one = sender.Sender(directory, uri, warn=print)
    one.send()
    one.close()
    assert one.sent.refused == 0
    model = mlflow.pyfunc.load_model("models:/slides@challenger")
    images_NHWC = np.stack([decode_tile(tile, 32) for tile in tiles])
    probabilities_NK = model.predict(images_NHWC)
    expected = slide_checkpoint.load(tmp_path / "slide checkpoint").answer(tiles).probabilities_K
    np.testing.assert_allclose(probabilities_NK, expected[None], atol=1e-6)
    assert model.metadata.signature.outputs.inputs[0].shape == (1, 3)
    fetched = registry.fetch_checkpoint("models:/slides/1", tmp_path / "fetched", uri=uri)
    assert checkpoint.kind_of(fetched) == "slide"
