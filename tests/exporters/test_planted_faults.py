"""Every planted fault is caught: in this process, and through a tritonserver that serves it.

The served half stands for a repository whose file was swapped after the gate in this process had let it pass.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from exporters.comparison_tiles import ComparisonTiles, EncodedTile, Truth, decode_tiles
from exporters.conformance import stage_classifier
from exporters.errors import DamagedArtifactError, ParityError, ServedError
from exporters.formats import formats_named, tensorrt
from exporters.formats.engine_file import engine_version
from exporters.formats.interface import Answer, Network, Runner, ServedFormat
from exporters.parity import check_parity, reference_answer
from exporters.proving_server import ProvingServer, proving_server
from exporters.publication import Publication
from exporters.served_parity import check_served_on
from exporters.serving_options import ServingOptions
from exporters.target_repository import stage_preprocess
from slides.decode import encode_tile
from training.checkpoint import Checkpoint
from training.network import TileNetwork

SIZE_PX = 64
MAX_BATCH = 4
Files = Mapping[str, bytes]
(ONNX,) = formats_named(["onnx"])
(TORCHSCRIPT,) = formats_named(["torchscript"])
(INT8,) = formats_named(["onnx-int8"])


def blotches(count: int, seed: int) -> list[bytes]:
    """JPEG tiles."""
    grid = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [encode_tile(np.kron(tile, np.ones((8, 8, 1), np.uint8)), 90) for tile in grid]


@pytest.fixture(scope="module")
def epochs(loaded: Checkpoint) -> tuple[TileNetwork, TileNetwork]:
    """A network after each of two epochs of training on a few tiles."""
    torch.manual_seed(0)
    encoded = [EncodedTile(str(number), data) for number, data in enumerate(blotches(16, seed=7))]
    tiles = torch.from_numpy(decode_tiles(encoded, SIZE_PX))
    labels = torch.arange(len(tiles)) % 2
    network = copy.deepcopy(loaded.model).train()
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    kept = []
    for _ in range(2):
        for batch, wanted in zip(tiles.split(8), labels.split(8), strict=True):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(batch), wanted).backward()
            optimiser.step()
        kept.append(copy.deepcopy(network).eval())
    return kept[0], kept[1]


@pytest.fixture(scope="module")
def tiles() -> ComparisonTiles:
    encoded = tuple(EncodedTile(f"tile {n}", data) for n, data in enumerate(blotches(32, seed=2)))
    unknown = (None,) * len(encoded)
    return ComparisonTiles(
        decode_tiles(encoded, SIZE_PX), Truth(("CE", "LAA"), unknown, unknown, unknown), encoded
    )


@pytest.fixture(scope="module")
def expected(epochs: tuple[TileNetwork, TileNetwork], tiles: ComparisonTiles) -> Answer:
    return reference_answer(epochs[1], tiles.tiles_NHWC)


def edited(written: bytes, changes: Mapping[str, np.ndarray]) -> Files:
    """The ONNX file with other values in some of its weights."""
    model = onnx.load_from_string(written)
    of_name = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, values in changes.items():
        of_name[name].CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    return {"model.onnx": model.SerializeToString()}


def weights_of(model: TileNetwork) -> dict[str, np.ndarray]:
    """Under their names in the ONNX file."""
    return {f"backbone.{name}": tensor.numpy() for name, tensor in model.backbone.state_dict().items()}


@pytest.fixture(scope="module")
def frozen_at_one(network: Network) -> Files:
    """An ONNX file that was exported with one example tile and no free batch."""
    graph = network.graph(channels_last=False)
    program = torch.onnx.export(
        graph,
        (torch.zeros(1, SIZE_PX, SIZE_PX, 3, dtype=torch.uint8),),
        dynamo=True,
        input_names=["tiles"],
        output_names=["probabilities", "confidence", "label_index"],
        verbose=False,
    )
    assert program is not None
    return {"model.onnx": program.model_proto.SerializeToString()}


def opened(fmt: ServedFormat, files: Files, directory: Path) -> Runner:
    for filename, content in files.items():
        (directory / filename).write_bytes(content)
    return fmt.open(directory / fmt.artifact_filename)


@dataclasses.dataclass(frozen=True)
class Fault:
    """An artefact that opens, and what the gate has to say of it."""

    fmt: ServedFormat
    files: Files
    message: str


@pytest.fixture(scope="module")
def network(epochs: tuple[TileNetwork, TileNetwork], loaded: Checkpoint) -> Network:
    """The network that is exported: of the second epoch."""
    return Network(epochs[1].backbone, loaded.spec.mean, loaded.spec.std, SIZE_PX, MAX_BATCH)


@pytest.fixture(scope="module")
def faults(network: Network, epochs: tuple[TileNetwork, TileNetwork]) -> Mapping[str, Fault]:
    weights = weights_of(epochs[1])
    last = [name for name in weights if name.startswith("backbone.classifier")]
    first = "backbone.features.0.weight"
    flipped = weights[first].copy()
    flipped.view(np.uint8).reshape(-1)[3] ^= 0x40  # the highest bit of a number's exponent
    normalisation = {"scale": np.ones((1, 3, 1, 1)), "shift": np.zeros((1, 3, 1, 1))}
    noise = np.random.default_rng(3).integers(118, 138, (32, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    calibrated_on_noise = INT8.build(dataclasses.replace(network, calibration_NHWC=noise))

    def fault(changes: Mapping[str, np.ndarray], message: str) -> Fault:
        return Fault(ONNX, edited(network.onnx, changes), message)

    return {
        "swapped_classes": fault({name: weights[name][::-1] for name in last}, "probabilities differ"),
        "missing_normalisation": fault(normalisation, "probabilities differ"),
        "weights_of_another_epoch": fault(weights_of(epochs[0]), "probabilities differ"),
        "nan_weights": fault({first: np.full_like(weights[first], np.nan)}, "not finite"),
        "flipped_byte": fault({first: flipped}, "probabilities differ|not finite"),
        "int8_calibrated_on_noise": Fault(
            INT8, calibrated_on_noise.files, r"differ from PyTorch|follow PyTorch"
        ),
    }


FAULTS = (
    "swapped_classes",
    "missing_normalisation",
    "weights_of_another_epoch",
    "nan_weights",
    "flipped_byte",
    "int8_calibrated_on_noise",
)
SERVED_FAULTS = tuple(name for name in FAULTS if name != "nan_weights")  # of that, the server itself says no


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_in_this_process(
    name: str, faults: Mapping[str, Fault], tiles: ComparisonTiles, expected: Answer, tmp_path: Path
) -> None:
    fault = faults[name]
    run = opened(fault.fmt, fault.files, tmp_path)
    with pytest.raises(ParityError, match=fault.message):
        check_parity(
            name, run, tiles.tiles_NHWC, expected, max_batch=MAX_BATCH, precision=fault.fmt.precision
        )


@pytest.fixture(scope="module")
def models(
    faults: Mapping[str, Fault],
    network: Network,
    loaded: Checkpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """Model directories: `faithful`, a fault each, and two whose network is faithful but whose class names are not."""
    repository = tmp_path_factory.mktemp("planted faults") / "models"
    repository.mkdir()
    options = ServingOptions(max_batch=MAX_BATCH, instances=1)
    with Publication(repository) as publication:
        version = stage_preprocess(publication, repository, SIZE_PX, options)

        def stage(name: str, fmt: ServedFormat, files: Files, checkpoint: Checkpoint = loaded) -> None:
            stage_classifier(
                publication, name, fmt, files, checkpoint.spec, options, preprocess_version=version
            )

        for name, fault in faults.items():
            stage(name, fault.fmt, fault.files)
        faithful = {"model.onnx": network.onnx}
        swapped = dataclasses.replace(
            loaded, spec=dataclasses.replace(loaded.spec, class_names=("LAA", "CE"))
        )
        stage("faithful", ONNX, faithful)
        stage("swapped_specification", ONNX, faithful, swapped)
        stage("swapped_labels", ONNX, faithful)
        publication.stage("swapped_labels/labels.txt", b"LAA\nCE\n")
        publication.stage("swapped_labels_network/labels.txt", b"LAA\nCE\n")
        yield publication.root


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[ProvingServer]:
    """One server with all faults that it loads."""
    names = ["faithful", *SERVED_FAULTS, "swapped_specification", "swapped_labels"]
    with proving_server(models, names, announce=lambda _: None) as up:
        yield up


def check(
    server: ProvingServer,
    name: str,
    fmt: ServedFormat,
    tiles: ComparisonTiles,
    expected: Answer,
    spec: object,
) -> None:
    check_served_on(
        server, {name: fmt}, tiles, expected, spec=spec, max_batch=MAX_BATCH, announce=lambda _: None
    )


@pytest.mark.parametrize("name", SERVED_FAULTS)
def test_a_fault_is_caught_in_what_is_served(
    name: str,
    server: ProvingServer,
    faults: Mapping[str, Fault],
    tiles: ComparisonTiles,
    expected: Answer,
    loaded: Checkpoint,
) -> None:
    with pytest.raises(ParityError, match=faults[name].message) as caught:
        check(server, name, faults[name].fmt, tiles, expected, loaded.spec)
    assert f"{name} over http" in str(caught.value)


def test_nan_weights_are_caught_in_what_is_served(models: Path) -> None:
    with (
        pytest.raises(ServedError, match=r"nan_weights answers a synthetic tile with .*nan"),
        proving_server(models, ["nan_weights"], announce=lambda _: None),
    ):
        pass


def test_what_is_faithful_passes_on_the_same_server(
    server: ProvingServer, tiles: ComparisonTiles, expected: Answer, loaded: Checkpoint
) -> None:
    check(server, "faithful", ONNX, tiles, expected, loaded.spec)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swapped_labels", "the server calls the classes LAA, CE; the checkpoint calls them CE, LAA"),
        ("swapped_specification", r"clotline_spec is not the checkpoint's: class_names \['LAA', 'CE'\]"),
    ],
)
def test_swapped_class_names_beside_a_faithful_network_are_caught(
    name: str,
    message: str,
    server: ProvingServer,
    tiles: ComparisonTiles,
    expected: Answer,
    loaded: Checkpoint,
) -> None:
    with pytest.raises(ParityError, match=message):
        check(server, name, ONNX, tiles, expected, loaded.spec)


def test_a_frozen_batch_is_caught_in_this_process(
    frozen_at_one: Files, tiles: ComparisonTiles, expected: Answer, tmp_path: Path
) -> None:
    run = opened(ONNX, frozen_at_one, tmp_path)
    with pytest.raises(ParityError, match=r"batch 2.*batch dimension frozen"):
        check_parity("x", run, tiles.tiles_NHWC, expected, max_batch=MAX_BATCH)


def test_a_network_whose_own_weights_are_nan_is_caught(
    epochs: tuple[TileNetwork, TileNetwork], tiles: ComparisonTiles
) -> None:
    broken = copy.deepcopy(epochs[1])
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(ParityError, match="weights are broken"):
        reference_answer(broken, tiles.tiles_NHWC)


def without_external_data(written: bytes, directory: Path) -> Files:
    """An ONNX file whose weights lay beside it, in `model.onnx.data`."""
    onnx.save_model(
        onnx.load_from_string(written),
        directory / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1024,
    )
    return {"model.onnx": (directory / "model.onnx").read_bytes()}


@pytest.fixture(scope="module")
def torchscript(network: Network) -> bytes:
    return TORCHSCRIPT.build(network).files["model.pt"]


@pytest.fixture(scope="module")
def damaged(
    network: Network, torchscript: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, tuple[ServedFormat, Files]]:
    """Artefacts that no runtime opens."""
    half = len(torchscript) // 2
    return {
        "missing_external_data": (
            ONNX,
            without_external_data(network.onnx, tmp_path_factory.mktemp("external data")),
        ),
        "truncated_onnx": (ONNX, {"model.onnx": network.onnx[: len(network.onnx) // 2]}),
        "truncated_torchscript": (TORCHSCRIPT, {"model.pt": torchscript[:half]}),
    }


@pytest.mark.parametrize("name", ["missing_external_data", "truncated_onnx", "truncated_torchscript"])
def test_what_does_not_open_is_named_in_this_process(
    name: str, damaged: Mapping[str, tuple[ServedFormat, Files]], tmp_path: Path
) -> None:
    fmt, files = damaged[name]
    with pytest.raises(DamagedArtifactError, match=fmt.artifact_filename):
        opened(fmt, files, tmp_path)


def test_one_flipped_byte_in_torchscript_does_not_open(torchscript: bytes, tmp_path: Path) -> None:
    middle = len(torchscript) // 2  # inside a weight
    flipped = torchscript[:middle] + bytes([torchscript[middle] ^ 1]) + torchscript[middle + 1 :]
    with pytest.raises(DamagedArtifactError, match=r"model\.pt"):
        opened(TORCHSCRIPT, {"model.pt": flipped}, tmp_path)


def test_what_does_not_load_is_named_by_the_server(
    damaged: Mapping[str, tuple[ServedFormat, Files]],
    frozen_at_one: Files,
    loaded: Checkpoint,
    tmp_path: Path,
) -> None:
    everything = {**damaged, "frozen_batch": (ONNX, frozen_at_one)}
    repository = tmp_path / "models"
    repository.mkdir()
    options = ServingOptions(max_batch=MAX_BATCH, instances=1)
    with Publication(repository) as publication:
        version = stage_preprocess(publication, repository, SIZE_PX, options)
        for name, (fmt, files) in everything.items():
            stage_classifier(publication, name, fmt, files, loaded.spec, options, preprocess_version=version)
        with (
            pytest.raises(ServedError, match="did not load") as caught,
            proving_server(publication.root, list(everything), announce=lambda _: None),
        ):
            pass
    said = str(caught.value)
    assert "\n" not in said
    for name in everything:
        assert f"{name}_network" in said
    assert "fixed batch of 1" in said
    assert "model.onnx.data" in said


def test_a_plan_of_another_tensorrt_version_is_refused_before_a_runtime_sees_it(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="an extra of the exporters")
    (fmt,) = formats_named(["tensorrt-rtx"])
    files = fmt.build(network).files
    plan = bytearray(files[fmt.artifact_filename])
    version = engine_version(bytes(plan))
    assert version is not None
    assert version.module == "tensorrt_rtx"
    major, minor, *rest = map(int, version.version.split("."))
    at = plan.index(bytes([major, minor, *rest]))
    plan[at + 1] = minor - 1
    other = ".".join(map(str, [major, minor - 1, *rest]))
    monkeypatch.setattr(
        tensorrt, "deserialised", lambda *arguments: pytest.fail("a runtime was given the plan")
    )
    with pytest.raises(DamagedArtifactError, match=rf"was built by tensorrt_rtx {other}, this is"):
        opened(fmt, {fmt.artifact_filename: bytes(plan)}, tmp_path)
