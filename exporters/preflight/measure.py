"""python -m exporters.preflight.measure 1.27.0 1.28.0

Measures which ONNX files a version of ONNX Runtime opens, with its wheel from PyPI: IR versions, opsets, weights outside the
model's directory, operators of com.microsoft. The last line of stdout is one JSON document: version -> row of containers.json.
Versions before 1.19 need a Python with numpy<2: --python .triton/python/bin/python3
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

IR_VERSIONS = range(8, 19)
OPSETS = range(17, 36)
ML_OPSETS = range(2, 9)
_PROBE = """
import json, pathlib, sys
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state
options = ort.SessionOptions()
options.log_severity_level = 4
opened = []
for path in sorted(pathlib.Path(sys.argv[1]).glob("*/*.onnx")):
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        opened.append(path.stem)
    except Exception:
        pass
contrib = sorted({schema.name for schema in state.get_all_operator_schema() if schema.domain == "com.microsoft"})
print(json.dumps({"version": ort.__version__, "opened": opened, "contrib": contrib}))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 if a version cannot be got or does not run."""
    parser = argparse.ArgumentParser(
        prog="python -m exporters.preflight.measure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="of onnxruntime on PyPI")
    parser.add_argument(
        "--python", default=sys.executable, metavar="PATH", help="Python with NumPy to run it in"
    )
    parsed = parser.parse_args(arguments)
    rows = {}
    with tempfile.TemporaryDirectory(prefix="clotline-onnxruntime-") as scratch:
        probes = Path(scratch, "probes")
        write_probes(probes)
        for version in tqdm(parsed.versions, unit="version", leave=False):
            try:
                rows[version] = measured(version, probes, Path(scratch, version), parsed.python)
            except (OSError, ValueError, subprocess.CalledProcessError) as error:
                said = str(getattr(error, "stderr", "") or error).strip().splitlines()
                print(f"error: onnxruntime {version}: {said[-1] if said else error}", file=sys.stderr)
                return 1
    print(json.dumps(rows, separators=(",", ":")))
    return 0


def write_probes(directory: Path) -> None:
    """A model a question, named after what it asks; its directory is a level below."""
    from onnx import TensorProto, helper

    def write(name: str, ir_version: int, opset: int, **domains: int) -> Any:
        x, y = (helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["n", 2]) for tensor in "xy")
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
        opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(*entry) for entry in domains.items())]
        model = helper.make_model(graph, opset_imports=opsets)
        model.ir_version = ir_version
        (directory / name).mkdir(parents=True)
        (directory / name / f"{name}.onnx").write_bytes(model.SerializeToString())
        return model

    for ir_version in IR_VERSIONS:
        write(f"ir_{ir_version}", ir_version, 17)
    for opset in OPSETS:
        write(f"opset_{opset}", 8, opset)
    for ml_opset in ML_OPSETS:
        write(f"ml_{ml_opset}", 8, 17, **{"ai.onnx.ml": ml_opset})
    model = write("outside", 8, 17)
    model.graph.node[0].op_type = "Add"
    model.graph.node[0].input.append("w")
    weights = model.graph.initializer.add(name="w", dims=[2], data_type=TensorProto.FLOAT)
    weights.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../outside.data"), ("offset", "0"), ("length", "8")):
        weights.external_data.add(key=key, value=value)
    (directory / "outside" / "outside.onnx").write_bytes(model.SerializeToString())
    (directory / "outside.data").write_bytes(bytes(8))


def measured(version: str, probes: Path, wheel: Path, python: str) -> dict[str, Any]:
    """The row of one version.

    Raises:
        OSError, ValueError, subprocess.CalledProcessError: it cannot be got, does not run, or is another version.
    """
    get = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run(
        [*get, "--target", str(wheel), f"onnxruntime=={version}"], capture_output=True, text=True, check=True
    )
    row = row_of(probes, python, wheel)
    if row["source"] != f"onnxruntime-{version}":
        raise ValueError(f"{row['source']} was loaded in its place")
    return row


def row_of(probes: Path, python: str, wheel: Path | None = None) -> dict[str, Any]:
    """The row of the onnxruntime that a Python has, or that lies unpacked in `wheel`.

    Raises:
        OSError, subprocess.CalledProcessError: it does not run.
        ValueError: it opens the newest that is asked for.
    """
    first = f"import sys; sys.path.insert(0, {str(wheel)!r})\n" if wheel is not None else ""
    command = [python, "-c", first + _PROBE, str(probes)]
    told = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    )
    opened = set(told["opened"])

    def newest(what: str, asked: range) -> int:
        found = max(number for number in asked if f"{what}_{number}" in opened)
        if found == asked[-1]:
            raise ValueError(f"it opens {what} {found}, the newest that is asked for: ask for more")
        return found

    return {
        "ir_version": newest("ir", IR_VERSIONS),
        "opset": newest("opset", OPSETS),
        "ai.onnx.ml": newest("ml", ML_OPSETS),
        "data_outside": "outside" in opened,
        "source": f"onnxruntime-{told['version']}",
        "contrib_operators": told["contrib"],
    }


if __name__ == "__main__":
    sys.exit(main())
