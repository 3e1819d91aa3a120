"""Whether the files of a model load in the runtimes of a container: one function a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from exporters.preflight import files, table
from exporters.preflight.findings import Finding, blocks, note, unknown
from exporters.preflight.table import Container, numbers

GIVEN_BY_TRITON = "triton_python_backend_utils"
_PACKAGE_OF = {"cv2": "opencv-python-headless", "PIL": "pillow"}
_PINS = Path(__file__).resolve().parents[2] / "serving" / "server-requirements.txt"


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        path: the file that the backend looks for; it exists.
        config: ModelConfig of the model.
        container: where it is to load.
        written_by: "torch", "openvino" ... -> version that wrote the files; from release.json, empty without one.
        adds: Python modules that the user's image has beside the container's own.
    """

    path: Path
    config: Any
    container: Container
    written_by: Mapping[str, str]
    adds: frozenset[str]


def onnxruntime(asked: Question) -> tuple[dict[str, Any], list[Finding]]:
    """IR version, opsets, operators, external data, names of tensors."""
    model = files.read_onnx(asked.path)
    about = {
        "ir_version": model.ir_version,
        "opset": model.opsets.get("", 0),
        "external_data": sorted(model.external),
    }
    return about, [
        *_onnx_versions(model, asked.container),
        *_onnx_operators(model, asked),
        *_external_data(model, asked),
        *_tensor_names(model, asked.config),
    ]


def _onnx_versions(model: files.OnnxFile, container: Container) -> list[Finding]:
    surely, at_best = table.onnx_surely(container), table.onnx_at_best(container)
    found = []
    for what, value, index in (
        ("IR version", model.ir_version, 0),
        ("opset", model.opsets.get("", 0) if "" in model.operators else 0, 1),
        (
            "opset of ai.onnx.ml",
            model.opsets.get("ai.onnx.ml", 0) if "ai.onnx.ml" in model.operators else 0,
            2,
        ),
    ):
        if value == 0 or (surely is not None and value <= int(surely[index])):
            continue
        if at_best is None:
            found.append(
                unknown(f"{what} {value}: what the ONNX Runtime of {container.name} opens is not known")
            )
        elif value > int(at_best[index]):
            found.append(
                blocks(
                    f"{what} {value} is newer than ONNX Runtime {container.said('onnxruntime')} of {container.name} opens (at "
                    f"most {at_best[index]}): {_what_to_do(model, container)}",
                    at_best.source,
                )
            )
        else:
            runtime = container.said("onnxruntime")
            found.append(
                unknown(
                    f"{what} {value}: whether ONNX Runtime {runtime} of {container.name} opens it is not known"
                )
            )
    return found


def _what_to_do(model: files.OnnxFile, container: Container) -> str:
    if container.is_embedded:
        return "export with the versions that Clotline pins, or install a newer onnxruntime for the server"
    readers = table.readers_of(model.ir_version, model.opsets.get("", 0))
    newer = f"take a container from {readers[0]} on" if readers else "no listed container opens it"
    return f"export for this container (`export --container {container.tag}`), or {newer}"


def _onnx_operators(model: files.OnnxFile, asked: Question) -> list[Finding]:
    found = []
    runtime = asked.container.at_least("onnxruntime")
    for domain, names in sorted(model.operators.items()):
        if domain in ("", "ai.onnx.ml"):
            continue
        if domain == "com.microsoft":
            known = table.contrib_operators()
            late = {
                name: known.get(name)
                for name in names
                if runtime is None or name not in known or numbers(known[name]) > numbers(runtime.value)
            }
            for name, since in sorted(late.items()):
                exactly = asked.container.facts.get("onnxruntime")
                text = f"operator com.microsoft.{name} came with ONNX Runtime {since or 'newer than any that was looked at'}"
                found.append(
                    blocks(f"{text}, {asked.container.name} has {exactly.value}")
                    if exactly
                    else unknown(text)
                )
        elif domain.startswith(("com.microsoft.nchwc", "com.ms.internal")):
            found.append(
                unknown(
                    f"operators of {domain} are made for one kind of CPU: export without that optimisation"
                )
            )
        elif asked.config.model_operations.op_library_filename:
            found.append(
                unknown(f"operators of {domain} come from a library of your own (op_library_filename)")
            )
        else:
            found.append(
                blocks(
                    f"operators of {domain} ({', '.join(sorted(names)[:3])}) are in no ONNX Runtime: name their library in "
                    "model_operations.op_library_filename"
                )
            )
    return found


def _external_data(model: files.OnnxFile, asked: Question) -> list[Finding]:
    limits = table.onnx_surely(asked.container)
    found = []
    for location, end_bytes in sorted(model.external.items()):
        place = asked.path.parent / location
        outside = not location or Path(location).is_absolute() or ".." in Path(location).parts
        if outside and limits is not None and not limits.data_outside:
            text = f"its weights lie outside the version directory ({location!r}), where {asked.container.name} reads none"
            found.append(blocks(f"{text}: export again, the weights stay inside", limits.source))
        elif outside and (limits is None or "onnxruntime" not in asked.container.facts):
            found.append(unknown(f"its weights lie outside the version directory ({location!r})"))
        elif not place.is_file():
            found.append(
                blocks(f"its weights {location} are missing beside it: copy both files, or export again")
            )
        elif place.stat().st_size < end_bytes:
            text = f"its weights {location} have {place.stat().st_size:,} bytes, {end_bytes:,} are needed"
            found.append(blocks(f"{text}: copy the file again, or export again"))
    return found


def _tensor_names(model: files.OnnxFile, config: Any) -> list[Finding]:
    found = []
    for what, ours, theirs in (
        ("input", config.input, model.inputs),
        ("output", config.output, model.outputs),
    ):
        missing = sorted({entry.name for entry in ours} - theirs)
        if missing:
            found.append(
                blocks(
                    f"config.pbtxt names {what} {', '.join(missing)}, the file has {', '.join(sorted(theirs))}"
                )
            )
    unfed = sorted(model.inputs - {entry.name for entry in config.input})
    if unfed and config.input:
        found.append(blocks(f"input {', '.join(unfed)} of the file is not in config.pbtxt"))
    return found


def pytorch(asked: Question) -> tuple[dict[str, Any], list[Finding]]:
    """Kind of archive, and PyTorch that wrote it."""
    kind = files.read_archive(asked.path)
    wants = "pt2" if asked.config.platform == "torch_aoti" else "torchscript"
    container, here = asked.container, asked.container.at_least("pytorch")
    found: list[Finding] = []
    if kind != wants:
        found.append(
            blocks(
                f"it is a {kind} file, platform {asked.config.platform or 'pytorch_libtorch'!r} wants {wants}"
            )
        )
    if container.is_embedded and here is None:
        found.append(
            blocks(
                "the server's Python has no torch: install torch, then `python -m serving install --force`"
            )
        )
    if wants == "pt2":
        found += _aoti(asked)
    writer = asked.written_by.get("torch")
    about = {"kind": kind, "written_by_torch": writer}
    if found:
        return about, found
    if writer is None:
        found.append(
            unknown(
                "which PyTorch wrote it is not told (no release.json); an older one or the same would load"
            )
        )
    elif here is None:
        found.append(unknown(f"written by PyTorch {writer}; the PyTorch of {container.name} is not known"))
    elif wants == "pt2":
        found.append(
            unknown(
                f"compiled by PyTorch {writer} for the CPU that built it; build it inside {container.name} to be sure"
            )
        )
    elif numbers(writer)[:2] > numbers(here.value)[:2]:
        theirs = container.said("pytorch")
        found.append(
            unknown(
                f"written by PyTorch {writer}, {container.name} has {theirs}: TorchScript promises that newer reads "
                "older, not the reverse",
                here.source,
            )
        )
    return about, found


def _aoti(asked: Question) -> list[Finding]:
    container = asked.container
    if container.is_embedded:
        return [blocks("the embedded server serves TorchScript only: serve torchscript, or use a container")]
    least, most = container.at_least("torch_aoti"), container.at_most("torch_aoti")
    if most is not None and most.value == "no":
        return [blocks(f"the pytorch backend of {container.name} serves TorchScript only", most.source)]
    if least is None or least.value != "yes":
        return [unknown(f"whether the pytorch backend of {container.name} serves .pt2 files is not known")]
    return []


def openvino(asked: Question) -> tuple[dict[str, Any], list[Finding]]:
    """Weights beside it, and OpenVINO that wrote it."""
    if asked.path.suffix != ".xml":
        return {}, [
            unknown(
                f"{asked.path.name} is read by OpenVINO itself; only its own .xml files are looked into here"
            )
        ]
    version, writer = files.read_openvino(asked.path)
    writer = writer or asked.written_by.get("openvino")
    about = {"ir_version": version, "written_by_openvino": writer}
    weights = asked.path.with_suffix(".bin")
    if not weights.is_file():
        return about, [
            blocks(f"its weights {weights.name} are missing beside it: copy both files, or export again")
        ]
    container, here = asked.container, asked.container.at_least("openvino")
    if container.is_embedded and here is None:
        return about, [
            blocks(
                "the server's Python has no openvino: install openvino, then `python -m serving install --force`"
            )
        ]
    if writer is None or here is None:
        what = (
            "which OpenVINO wrote it"
            if writer is None
            else f"written by OpenVINO {writer}; the OpenVINO of {container.name}"
        )
        return about, [unknown(f"{what} is not known")]
    if numbers(writer)[:2] > numbers(here.value)[:2]:
        theirs = container.said("openvino")
        return about, [
            unknown(
                f"written by OpenVINO {writer}, {container.name} has {theirs}: OpenVINO reads older files, newer ones only "
                "where they use nothing new",
                here.source,
            )
        ]
    return about, []


def tensorrt(asked: Question) -> tuple[dict[str, Any], list[Finding]]:
    """Version of the engine: TensorRT reads its own only."""
    engine = files.read_plan(asked.path)
    about = {"engine_of": engine.module, "version": engine.version}
    if engine.module != "tensorrt":
        return about, [
            blocks(f"it is an engine of {engine.module} {engine.version}, for which Triton has no backend")
        ]
    container, theirs = asked.container, asked.container.facts.get("tensorrt")
    build = f"build it in nvcr.io/nvidia/tensorrt:{container.tag}-py3"
    found = [
        note("a plan runs only on the kind of GPU that it was built on, and the file does not say which")
    ]
    if theirs is None:
        text = f"built by TensorRT {engine.version}; the TensorRT of {container.name} is not known: {build}, whose TensorRT fits"
        found.append(unknown(text, table.source("tensorrt-same-tag")))
    elif numbers(engine.version)[: len(numbers(theirs.value))] != _in_header(theirs.value):
        text = f"built by TensorRT {engine.version}, {container.name} has {theirs.value}; a plan is read by its own version only"
        found.append(blocks(f"{text}: {build}", theirs.source))
    return about, found


def _in_header(version: str) -> tuple[int, ...]:
    return tuple(part % 256 for part in numbers(version))  # a byte each


def python(asked: Question) -> tuple[dict[str, Any], list[Finding]]:
    """Modules that model.py imports."""
    wanted = files.imported_modules(asked.path) - {GIVEN_BY_TRITON}
    about = {"imports": sorted(wanted)}
    container = asked.container
    if "EXECUTION_ENV_PATH" in asked.config.parameters:
        return about, [
            unknown(
                "it brings a Python environment of its own (EXECUTION_ENV_PATH), which is not looked into"
            )
        ]
    if container.is_embedded:
        missing = sorted(name for name in wanted if not files.is_importable(name, container.search_path))
        what_to_do = "install them, then `python -m serving install --force`"
    else:
        missing = sorted(wanted - asked.adds - (container.modules or frozenset()))
        what_to_do = _image_with(missing, container)
    if not missing:
        return about, []
    if container.modules is None and "slides" not in missing:  # that one is in no image of NVIDIA's
        return about, [
            unknown(f"whether {container.name} has {', '.join(missing)} is not known: {what_to_do}")
        ]
    if container.modules is None:
        return about, [
            blocks(
                f"imports slides, which is in no image of NVIDIA's; of the others it is not known: {what_to_do}"
            )
        ]
    text = f"imports {', '.join(missing)}, which {container.name} lacks: {what_to_do}"
    return about, [blocks(text, container.modules_source)]


def _image_with(modules: Sequence[str], container: Container) -> str:
    pins = _pins()  # of the server's libraries: other ones could decode and resize to other pixels
    names = [_PACKAGE_OF.get(name, name) for name in modules if name != "slides"]
    packages = [pins.get(name, name) for name in names]
    steps = [
        f"FROM nvcr.io/nvidia/tritonserver:{container.name}",
        *([f"RUN pip install {' '.join(packages)}"] if packages else []),
        *(
            ["COPY slides /opt/clotline/slides", "ENV PYTHONPATH=/opt/clotline"]
            if "slides" in modules
            else []
        ),
    ]
    return f"build an image `{'; '.join(steps)}` and ask again with --adds {','.join(modules)}"


def _pins() -> dict[str, str]:
    lines = _PINS.read_text("utf-8").splitlines() if _PINS.is_file() else []
    return {line.partition("==")[0]: line for line in lines if "==" in line and not line.startswith("#")}


RUNTIMES: Mapping[str, Callable[[Question], tuple[dict[str, Any], list[Finding]]]] = MappingProxyType(
    {
        "onnxruntime": onnxruntime,
        "pytorch": pytorch,
        "openvino": openvino,
        "tensorrt": tensorrt,
        "python": python,
    }
)
"""Backend -> what is looked at: facts of the file (JSON types), and findings. They raise files.UnreadableError."""
