"""Register neurons: the planted one comes first, and the scores are those of the reference."""

import pytest
import torch

import vitscope as vs
from tests.helpers.families import ALL, Family, every_family
from tests.helpers.planted_artefacts import BLOCK, NEURON, Planted, planted
from tests.reference import artefacts as reference


@pytest.fixture(scope="module")
def example() -> Planted:
    return planted()


def test_the_planted_neuron_comes_first(example: Planted) -> None:
    threshold = vs.artefact_tokens(example.model, example.pixels).threshold
    neurons = vs.register_neurons(example.model, example.pixels, threshold=threshold)
    assert neurons[0] == (BLOCK, NEURON)
    assert len(neurons) == len(set(neurons)) == 10
    assert max(block for block, _ in neurons) <= BLOCK  # artefacts appear in this block
    assert vs.register_neurons(example.model, example.pixels, threshold=threshold, highest=0)[0][0] == 0
    assert (BLOCK, NEURON) not in vs.register_neurons(example.model, example.pixels, threshold=threshold, highest=-3)
    later = vs.register_neurons(example.model, example.pixels, threshold=threshold, highest=-1, count=1000)
    assert {block for block, _ in later} == {0, 1, 2}
    assert later[0] == (BLOCK, NEURON)


def test_a_neuron_that_is_large_everywhere_does_not_come_first(example: Planted) -> None:
    """The mean on artefacts alone, as in the paper, would rank it first."""
    layer = vs.artefact_tokens(example.model, example.pixels).layer
    model = planted().model
    first, last = (
        child for child in model.module.dinov2_with_registers.encoder.layer[0].mlp.modules() if hasattr(child, "weight")
    )
    with torch.no_grad():
        first.bias[3] = 100.0
        last.bias -= 100.0 * last.weight[:, 3]  # so that nothing changes
    neurons = vs.register_neurons(model, example.pixels, threshold=16.0, layer=layer, count=1)
    assert neurons == [(BLOCK, NEURON)]


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_the_ranking_is_that_of_the_reference(quantile: float) -> None:
    family = next(each for each in ALL if each.name == "timm-vit")
    model = family.model()
    model.module.double()
    pixels = family.pixels(3).double()
    norms = vs.artefact_tokens(model, pixels).norms[:, -1, 1:]
    threshold = float(norms.quantile(quantile))
    scores = reference.neuron_scores(model.module, pixels, norms > threshold)
    order = scores.flatten().argsort(descending=True)[:40].tolist()
    width = scores.shape[1]
    expected = [(index // width, index % width) for index in order]
    assert vs.register_neurons(model, pixels, threshold=threshold, count=40) == expected


@every_family
def test_every_family_has_neurons(family: Family) -> None:
    model = family.model()
    norms = vs.artefact_tokens(model, family.pixels()).norms[:, -1, len(family.prefix_names) :]
    neurons = vs.register_neurons(model, family.pixels(), threshold=float(norms.median()), count=5)
    assert len(neurons) == 5
    assert all(0 <= block < 3 and neuron >= 0 for block, neuron in neurons)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": None}, "threshold is None, so there are no artefacts"),
        ({"threshold": "high"}, "threshold is 'high', a number is expected"),
        ({"threshold": 1e6}, r"threshold 1e\+06 is above the norms of all patches after block 3 \(index 2\) \("),
        ({"threshold": 0.1}, "threshold 0.1 is below the norms of all patches"),
        ({"threshold": 16.0, "count": 0}, "count is 0, at least 1 is expected"),
        ({"threshold": 16.0, "highest": 3}, "highest is 3, a block from 0 to 2 is expected"),
        ({"threshold": 16.0, "layer": 1, "highest": 2}, "highest is 2, a block from 0 to 1 is expected"),
        ({"threshold": 16.0, "layer": 5}, "layer 5 is out of range"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_options_are_refused(example: Planted, options: dict, message: str) -> None:
    with pytest.raises(vs.CallError, match=message):
        vs.register_neurons(example.model, example.pixels, **options)


def test_window_models_are_refused(chelsea) -> None:
    with pytest.raises(vs.UnsupportedModelError, match="register neurons are not supported for swin-nano"):
        vs.register_neurons(vs.load("swin-nano"), chelsea, threshold=10.0)
