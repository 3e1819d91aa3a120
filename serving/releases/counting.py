"""Who counts a classifier's predictions on a live server: the backend of its network, or else a step of its ensemble.

Our Python-based backends count what a network answers, told by the parameter `clotline_answers_for` (docs/metrics.md). Native
backends do not know it: in NVIDIA's container, and for TensorRT engines anywhere. There a release gets `<network>_counter`, a
small Python model, as the last step of each ensemble over that network; what a client asks and is answered stays the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from tritonclient.grpc import model_config_pb2 as triton

from serving.embedded import triton_home
from serving.errors import ServerNotFound
from serving.releases.errors import BadRelease
from serving.tritonserver import TritonServer, counting_backends, find_tritonserver, python_based_backends
from slides.model_metrics import ANSWERS_FOR
from slides.switches import is_off

COUNTER = Path(__file__).resolve().parent / "prediction_counter"
SUFFIX = "_counter"
SWITCH_VARIABLE = "CLOTLINE_PREDICTION_COUNTER"


def is_wanted() -> bool:
    """False where the environment says `CLOTLINE_PREDICTION_COUNTER=off`: no step is added, predictions are not counted."""
    return not is_off(SWITCH_VARIABLE)


def backends_to_come(server: TritonServer | None) -> set[str]:
    """Backends that will count by themselves where no server runs yet: those of `server`, None: of the one that is found."""
    try:
        return counting_backends(server or find_tritonserver(triton_home()))
    except ServerNotFound:
        return set(python_based_backends())


def add_counters(
    models: Path, found: dict[str, triton.ModelConfig], counting_backends: Collection[str]
) -> None:
    """Give a release that is being staged a counter for each network that answers clients and counts nothing itself.

    Args:
        models: the release's copy; directories of counters are made in it.
        found: model -> its configuration; counters come in, and configurations of networks and ensembles are changed.
        counting_backends: backends that count by themselves.

    Raises:
        BadRelease: the release has a model of a counter's name.
    """
    uncounted = {
        name: config
        for name, config in found.items()
        if ANSWERS_FOR in config.parameters and config.backend not in counting_backends
    }
    for name, network in sorted(uncounted.items()):
        counter = name + SUFFIX
        if counter in found:
            raise BadRelease(f"the release has a model {counter}, which is the name of a part of the server.")
        ensembles = [config for config in found.values() if _answers_with(config, name)]
        if not ensembles:
            continue
        shutil.copytree(COUNTER, models / counter, ignore=shutil.ignore_patterns("__pycache__"))
        found[counter] = _counter_config(counter, network, ensembles[0])
        del network.parameters[ANSWERS_FOR]
        for ensemble in ensembles:
            _lead_through(ensemble, name, counter)


def _answers_with(config: triton.ModelConfig, network: str) -> bool:
    """True for an ensemble that answers with what the network gives, all three of it."""
    outputs = {output.name for output in config.output}
    steps = [step for step in config.ensemble_scheduling.step if step.model_name == network]
    return len(steps) == 1 and len(outputs) == 3 and set(steps[0].output_map.values()) == outputs


def _counter_config(
    name: str, network: triton.ModelConfig, ensemble: triton.ModelConfig
) -> triton.ModelConfig:
    config = triton.ModelConfig(name=name, backend="python", max_batch_size=ensemble.max_batch_size)
    for output in ensemble.output:
        config.input.add(name=output.name, data_type=output.data_type, dims=output.dims)
        config.output.add(name=output.name, data_type=output.data_type, dims=output.dims)
    config.instance_group.add(count=1, kind=triton.ModelInstanceGroup.KIND_CPU)
    config.dynamic_batching.SetInParent()  # what waits is handed to the process together
    config.parameters[ANSWERS_FOR].CopyFrom(network.parameters[ANSWERS_FOR])
    return config


def _lead_through(ensemble: triton.ModelConfig, network: str, counter: str) -> None:
    steps = ensemble.ensemble_scheduling.step
    counting = triton.ModelEnsembling.Step(model_name=counter, model_version=1)
    (answering,) = (step for step in steps if step.model_name == network)
    for theirs, ours in list(answering.output_map.items()):
        answering.output_map[theirs] = f"uncounted_{ours}"
        counting.input_map[ours] = f"uncounted_{ours}"
        counting.output_map[ours] = ours
    steps.append(counting)
