"""One process of LIMIT: decode, resize, network, in a bare loop. `perf.limit` starts it and speaks to it in lines of JSON.

First line in: the order (see `Order`). Out: {"ready": true, "probabilities": [[...] a tile],
"decoder": of JPEG tiles}. Then a line in, {"seconds": S},
for every measurement; out: {"tiles", "seconds", "cpu_s", "calls_s": [...]}. End of file ends it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from slides.decode import decode_tile, jpeg_decoder


class Order(TypedDict):
    """What a worker is to do: the fields of `perf.served_work.ServedWork`, the layout's, and files with the tiles."""

    runtime: str
    path: str
    input: str
    probabilities: str
    input_size_px: int
    threads: int
    batch: int
    spin: bool
    first: int
    tiles: list[str]


def main() -> None:
    """Serve the process that started this one."""
    order: Order = json.loads(sys.stdin.readline())
    network = {"onnxruntime": _onnxruntime, "openvino": _openvino}[order["runtime"]](order)
    tiles = [Path(path).read_bytes() for path in order["tiles"]]
    size_px, batch = order["input_size_px"], order["batch"]

    def answer(first: int) -> Any:
        """Probabilities of `batch` tiles from number `first` on."""
        if batch == 1:
            return network(decode_tile(tiles[first % len(tiles)], size_px)[np.newaxis])
        decoded = [decode_tile(tiles[(first + offset) % len(tiles)], size_px) for offset in range(batch)]
        return network(np.stack(decoded))

    alone = [network(decode_tile(tile, size_px)[np.newaxis])[0] for tile in tiles]
    answer(0)
    probabilities = [[float(value) for value in row] for row in alone]
    _say({"ready": True, "probabilities": probabilities, "decoder": jpeg_decoder()})
    number = order["first"]
    for line in sys.stdin:
        wanted_s = json.loads(line)["seconds"]
        calls_s: list[float] = []
        cpu_from_s, from_s = time.process_time(), time.perf_counter()
        now_s = from_s
        while now_s - from_s < wanted_s:
            answer(number)
            number += batch
            before_s, now_s = now_s, time.perf_counter()
            calls_s.append(now_s - before_s)
        _say(
            {
                "tiles": batch * len(calls_s),
                "seconds": now_s - from_s,
                "cpu_s": time.process_time() - cpu_from_s,
                "calls_s": calls_s,
            }
        )


def _say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def _onnxruntime(order: Order) -> Callable[[Any], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = order["threads"]
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(order["spin"])))
    session = onnxruntime.InferenceSession(order["path"], options, providers=["CPUExecutionProvider"])
    return lambda tiles_NHWC: session.run([order["probabilities"]], {order["input"]: tiles_NHWC})[0]


def _openvino(order: Order) -> Callable[[Any], Any]:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": order["threads"],
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,  # it would pin the threads of every process to the same cores
    }
    request = core.compile_model(core.read_model(order["path"]), "CPU", settings).create_infer_request()
    return lambda tiles_NHWC: np.array(request.infer({order["input"]: tiles_NHWC})[order["probabilities"]])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
