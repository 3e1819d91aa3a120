"""Member heads and the combination as one graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporters.errors import DamagedArtifactError
from exporters.slide.combination import MEMBERS
from exporters.slide.head import ATTENTION, MeanHead, MemberHead, embedding_names, head_onnx, open_head
from slides.aggregate import mean_probabilities
from training.ensembles.combination import Combination
from training.ensembles.definition import Ensemble, Member
from training.mil.heads import ServedHead, SlideHead

CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def attentive() -> ServedHead:
    torch.manual_seed(1)
    return ServedHead(SlideHead(12, 3, pooling="attention", hidden_dim=6, attention_dim=4)).eval()


@pytest.fixture(scope="module")
def content(attentive: ServedHead) -> bytes:
    """A learner whose classes stand in another order, and a mean."""
    weights_M = np.array([0.25, 0.75])
    ensemble = Ensemble(CLASSES, (Member("x", ""), Member("y", "")), Combination("soft", weights_M))
    return head_onnx([MemberHead(attentive, 12, (2, 0, 1)), MemberHead(MeanHead(), 3, (0, 1, 2))], ensemble)


@pytest.mark.parametrize("tiles", [1, 2, 57])
def test_any_number_of_tiles(content: bytes, attentive: ServedHead, tiles: int) -> None:
    rng = np.random.default_rng(tiles)
    embeddings_TD = rng.normal(size=(tiles, 12)).astype(np.float32)
    probabilities_TK = rng.dirichlet([1, 1, 1], tiles).astype(np.float32)
    got = open_head(content)([embeddings_TD, probabilities_TK])
    with torch.inference_mode():
        own_K, attention_T = attentive(torch.from_numpy(embeddings_TD))
    mean_K = mean_probabilities(probabilities_TK)
    np.testing.assert_allclose(got[MEMBERS], [own_K.numpy()[[2, 0, 1]], mean_K], atol=1e-6)
    np.testing.assert_allclose(
        got["probabilities"], 0.25 * own_K.numpy()[[2, 0, 1]] + 0.75 * mean_K, atol=1e-6
    )
    np.testing.assert_allclose(got[ATTENTION], 0.25 * attention_T.numpy() + 0.75 / tiles, atol=1e-6)
    assert got[ATTENTION].shape == (tiles,)
    assert got[ATTENTION].sum() == pytest.approx(1, abs=1e-5)


def test_one_network_is_an_ensemble_of_one() -> None:
    ensemble = Ensemble(CLASSES, (Member("x", ""),), Combination("soft", np.ones(1)))
    run = open_head(head_onnx([MemberHead(MeanHead(), 3, (0, 1, 2))], ensemble))
    probabilities_TK = np.array([[0.2, 0.3, 0.5], [0.4, 0.5, 0.1]], np.float32)
    got = run([probabilities_TK])
    np.testing.assert_array_equal(
        got["probabilities"], mean_probabilities(probabilities_TK).astype(np.float32)
    )
    np.testing.assert_array_equal(got[ATTENTION], [0.5, 0.5])
    assert (got["mutual_information"][0], got["std"][0], got["answered"][0]) == (0, 0, True)
    assert embedding_names(1) == ("embeddings",)
    assert embedding_names(2) == ("embeddings_0", "embeddings_1")


def test_the_graph_does_not_tell_where_it_was_built(content: bytes) -> None:
    assert b"/work" not in content
    assert b"site-packages" not in content


def test_a_damaged_head_is_an_error_of_ours(content: bytes) -> None:
    with pytest.raises(DamagedArtifactError, match="slide head"):
        open_head(content[: len(content) // 2])
