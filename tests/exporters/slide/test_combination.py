"""The combination graph against the ensemble library's own NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnxruntime
import pytest

from exporters.formats.interface import OnnxTarget
from exporters.slide.combination import MEMBERS, OUTPUTS, combination_onnx
from training.ensembles import uncertainty
from training.ensembles.combination import Combination
from training.ensembles.definition import Abstention, Ensemble, Member
from training.ensembles.stacking import MetaLearner

WEIGHTS_M = np.array([0.2, 0.3, 0.5])
CLASSES = ("a", "b", "c", "d")
_RNG = np.random.default_rng(4)
META = MetaLearner("regression", _RNG.normal(0, 2, (4, 12)), _RNG.normal(0, 1, 4))
COMBINATIONS = {
    "soft": Combination("soft", WEIGHTS_M),
    "hard": Combination("hard", WEIGHTS_M),
    "stack": Combination("stack", WEIGHTS_M, META),
    "soft tempered": Combination("soft", WEIGHTS_M, None, 1.7),
    "stack tempered": Combination("stack", WEIGHTS_M, META, 0.6),
}


def definition_of(combination: Combination, abstention: Abstention | None = None) -> Ensemble:
    members = tuple(Member(str(m), "") for m in range(3))
    return Ensemble(CLASSES, members, combination, abstention)


def rows() -> np.ndarray:
    """FP32 [M, N, K]: sure and unsure members, certainty, and no opinion at all."""
    rows_MNK = _RNG.dirichlet(np.full(4, 0.3), (3, 60)).astype(np.float32)
    rows_MNK[0, 0] = (1, 0, 0, 0)
    rows_MNK[:, 1] = 0.25
    return rows_MNK


def run(content: bytes, members_MK: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {MEMBERS: members_MK}), strict=True))


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("abstention", [None, Abstention(0.1, 0.4, 50)])
def test_answers_as_the_definition_does(name: str, abstention: Abstention | None) -> None:
    ensemble = definition_of(COMBINATIONS[name], abstention)
    content, members_MNK = combination_onnx(ensemble), rows()
    wanted_NK = ensemble.apply(members_MNK)
    unsure = uncertainty.of_members(members_MNK, WEIGHTS_M, wanted_NK)
    wanted_answered = ensemble.answered(wanted_NK)
    for n in range(members_MNK.shape[1]):
        got = run(content, members_MNK[:, n])
        np.testing.assert_allclose(got["probabilities"], wanted_NK[n], atol=1e-6)
        np.testing.assert_allclose(got["confidence"], [wanted_NK[n].max()], atol=1e-6)
        assert got["label_index"].tolist() == [wanted_NK[n].argmax()]
        np.testing.assert_allclose(got["entropy"], [unsure.entropy_N[n]], atol=1e-6)
        np.testing.assert_allclose(got["mutual_information"], [unsure.mutual_information_N[n]], atol=1e-6)
        np.testing.assert_allclose(got["std"], [unsure.std_N[n]], atol=1e-6)
        assert got["answered"].tolist() == [wanted_answered[n]]


def test_abstains_on_either_side_of_the_threshold() -> None:
    ensemble = definition_of(COMBINATIONS["soft"], Abstention(0.1, 0.3, 50))
    content = combination_onnx(ensemble)
    sure, unsure, torn = (0.71, 0.29, 0.0, 0.0), (0.69, 0.31, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0)
    said = [run(content, np.array([row] * 3, np.float32))["answered"][0] for row in (sure, unsure, torn)]
    assert said == [True, False, False]


def test_types_and_shapes() -> None:
    got = run(combination_onnx(definition_of(COMBINATIONS["stack"])), rows()[:, 2])
    assert {name: (value.dtype.name, value.shape) for name, value in got.items()} == {
        "probabilities": ("float32", (4,)),
        "confidence": ("float32", (1,)),
        "label_index": ("int64", (1,)),
        "entropy": ("float32", (1,)),
        "mutual_information": ("float32", (1,)),
        "std": ("float32", (1,)),
        "answered": ("bool", (1,)),
    }


def test_the_same_definition_gives_the_same_bytes_and_the_target_is_kept() -> None:
    import onnx

    ensemble = definition_of(COMBINATIONS["stack tempered"], Abstention(0.1, 0.4, 50))
    assert combination_onnx(ensemble) == combination_onnx(dataclasses.replace(ensemble))
    older = onnx.load_from_string(combination_onnx(ensemble, OnnxTarget(18, 8)))
    assert older.ir_version == 8
    assert older.opset_import[0].version == 18
