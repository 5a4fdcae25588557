"""Test-time registers: logits of a reference, the cure of planted artefacts, every family, and nothing left behind."""

import threading
from typing import Any

import pytest
import torch
from torch import nn

import vitscope as vs
from tests.helpers.families import ALL, Family, every_family
from tests.helpers.planted_artefacts import BLOCK, NEURON, Planted, planted
from tests.interventions.test_artefacts import hooks
from tests.reference import artefacts as reference
from vitscope.methods.registry import METHODS

REFUSED = {  # families whose blocks depend on the number of tokens
    "transformers-dinov3": "rotary positions",
    "timm-dinov3": "rotary positions",
    "transformers-beit": "relative position bias",
    "timm-beit": "relative position bias",
}


@pytest.fixture(scope="module")
def example() -> Planted:
    return planted()


def logits(model: vs.VisionModel, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), model.running():
        return model.features(pixels) if model.embed is not None else model.logits(pixels)


@pytest.mark.parametrize("name", ["timm-vit", "timm-vit-mean"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("neurons", [[], [(1, 5)], [(0, 3), (2, 11), (0, -1)]], ids=["none", "one", "three"])
def test_logits_are_those_of_the_reference(neurons: list[tuple[int, int]], count: int, name: str) -> None:
    family = next(each for each in ALL if each.name == name)
    model = family.model()
    with torch.no_grad():  # a neuron whose activations are all negative
        model.module.blocks[1].mlp.fc1.weight[5] *= 0.05
        model.module.blocks[1].mlp.fc1.bias[5] = -0.5
    model.module.double()
    pixels = family.pixels().double()
    moves: dict[int, list[int]] = {}
    for block, neuron in neurons:
        moves.setdefault(block, []).append(neuron)
    with vs.test_time_registers(model, neurons, count=count):
        result = logits(model, pixels)
        norms = vs.artefact_tokens(model, pixels).norms
    for index, image in enumerate(pixels):
        run = reference.Run(model.module, image, moves, count)
        torch.testing.assert_close(result[index], run.logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(norms[index].double(), torch.stack(run.norms), rtol=1e-6, atol=0)


def test_the_registers_take_over_the_planted_artefacts(example: Planted) -> None:
    before = vs.artefact_tokens(example.model, example.pixels)
    neurons = vs.register_neurons(example.model, example.pixels, threshold=before.threshold, count=1)
    with vs.test_time_registers(example.model, neurons) as model:
        after = vs.artefact_tokens(model, example.pixels)
        trace = vs.capture(model, example.pixels)
    assert after.threshold is None
    assert (after.norms[:, -1, after.grid.prefix - 1] > before.threshold).all()  # the register has the norm now
    share_before, share_after = (
        float((result.attention * example.places).sum((1, 2)).mean()) for result in (before, after)
    )
    assert share_after < share_before / 2
    assert share_after < before.share  # not more than other patches get
    assert trace.prefix_names[-1] == "test_register_1"
    assert float(trace.map(-1, query="test_register_1").sum()) > 0


@pytest.mark.parametrize("count", [1, 3])
def test_zero_tokens_alone_change_little_and_cure_nothing(example: Planted, count: int) -> None:
    before = logits(example.model, example.pixels)
    with vs.test_time_registers(example.model, [], count=count):
        after = logits(example.model, example.pixels)
        result = vs.artefact_tokens(example.model, example.pixels)
    change = float((after - before).norm() / before.norm())
    assert 0 < change < 0.03 * count
    assert torch.equal(result.places, example.places)


@every_family
def test_every_family_runs_or_is_refused(family: Family) -> None:
    model, pixels = family.model(), family.pixels()
    before, hooked = logits(model, pixels), hooks(model.module)
    if family.name in REFUSED:
        with (
            pytest.raises(vs.UnsupportedModelError, match=REFUSED[family.name]) as caught,
            vs.test_time_registers(model, [(1, 3)]),
        ):
            pass
        assert "\n" not in str(caught.value)
    else:
        names = (*family.prefix_names, "test_register_1", "test_register_2")
        with vs.test_time_registers(model, [(1, 3), (0, 0)], count=2) as inside:
            for each in (model, inside, model.module):
                trace = vs.capture(each, pixels)
                assert trace.prefix_names == names
                assert trace.grid == vs.Grid(family.grid.height, family.grid.width, len(names))
                maps = vs.rollout(trace).values
                assert maps.shape == (2, family.grid.height, family.grid.width)
            singles = [vs.rollout(model, pixels[index : index + 1]).values[0] for index in range(2)]
            torch.testing.assert_close(torch.stack(singles), maps, rtol=1e-4, atol=1e-6)
            changed = logits(model, pixels)
        assert not torch.equal(changed, before)
        assert vs.capture(model, pixels).prefix_names == family.prefix_names
    assert torch.equal(logits(model, pixels), before)
    assert hooks(model.module) == hooked


@pytest.mark.slow
def test_every_method_runs_inside(example: Planted) -> None:
    model, pixels = example.model, example.pixels[:1]
    slow = {"lime", "kernel_shap", "rise", "smooth_grad", "integrated_gradients"}
    methods = {name: method.compute for name, method in METHODS.items() if name not in {*slow, "le_grad"}}
    before = {name: compute(model, pixels) for name, compute in methods.items()}
    with vs.test_time_registers(model, [(BLOCK, NEURON)]):
        inside = {name: compute(model, pixels) for name, compute in methods.items()}
        with pytest.raises(
            vs.UnsupportedModelError, match=r"le_grad is not available inside vitscope\.test_time_registers"
        ):
            vs.le_grad(model, pixels)
        dropped = vs.lime(model, pixels, target=0, hide="drop", segments="patches", num_samples=480)
    assert len(dropped.weights) == 96
    for name in methods:
        assert inside[name].values.shape == before[name].values.shape
        assert not torch.equal(inside[name].values, before[name].values)
        assert inside[name].provenance["inserted_tokens"] == ["test_register_1"]
        assert "inserted_tokens" not in before[name].provenance
    assert abs(inside["libra"].provenance["completeness"][0]["error"]) < 1e-4


class Wrapper(nn.Module):
    """A module around a known backbone, whose layout is verified by a run."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(32, 4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(pixels).last_hidden_state[:, 0])


def test_a_layout_that_a_run_verifies_is_verified_inside_and_after() -> None:
    family = next(each for each in ALL if each.name == "transformers-dinov2")
    torch.manual_seed(0)
    module = Wrapper(family.build()).eval()
    model = vs.load(module, image_size=32, mean=[0.5] * 3, std=[0.5] * 3)
    assert not model.verified
    pixels = family.pixels()
    for _ in range(2):
        with vs.test_time_registers(model, [(0, 1)]) as inside:
            assert vs.capture(inside, pixels).prefix_names == ("cls", "test_register_1")
            assert vs.rollout(model, pixels).values.shape == (2, 4, 6)
        assert vs.capture(model, pixels).prefix_names == ("cls",)


def test_nothing_is_left_after_an_exception(example: Planted) -> None:
    module, before = example.model.module, logits(example.model, example.pixels)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(KeyError), vs.test_time_registers(example.model, [(0, 0)]):
        raise KeyError
    with pytest.raises(vs.WorkError), vs.test_time_registers(example.model, [(0, 0)]):
        vs.capture(example.model, torch.full_like(example.pixels, 1e38)).map(-1)
    with vs.test_time_registers(example.model, [(BLOCK, NEURON)]):
        pass
    assert hooks(module) == 0
    assert vs.capture(example.model, example.pixels).prefix_names == example.model.layout.prefix_names
    assert torch.equal(logits(example.model, example.pixels), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())


def test_other_threads_run_without_registers(example: Planted) -> None:
    before, results = logits(example.model, example.pixels), []
    with vs.test_time_registers(example.model, [(BLOCK, NEURON)]):

        def run() -> None:
            names = vs.capture(example.model, example.pixels).prefix_names
            results.append((logits(example.model, example.pixels), names))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert torch.equal(results[0][0], before)
    assert results[0][1] == example.model.layout.prefix_names


def test_a_second_context_is_refused(example: Planted) -> None:
    with (
        vs.test_time_registers(example.model, []),
        pytest.raises(vs.CallError, match="has test-time registers already: leave the other context first"),
        vs.test_time_registers(example.model, []),
    ):
        pass
    assert hooks(example.model.module) == 0


@pytest.mark.parametrize(
    ("neurons", "count", "message"),
    [
        (5, 1, r"neurons is 5, a list of \(block, neuron\) is expected"),
        ([5], 1, r"neurons holds 5, pairs of \(block, neuron\) are expected"),
        ([(0, 1, 2)], 1, r"neurons holds \(0, 1, 2\), pairs"),
        ([(3, 0)], 1, "block 3 does not exist: Dinov2WithRegistersForImageClassification has blocks 0 to 2"),
        ([(0, 500)], 1, "neuron 500 does not exist: block 0 of .* has neurons 0 to "),
        ([(0, 1.5)], 1, "a neuron is 1.5, a whole number is expected"),
        ([], 0, "count is 0, at least 1 is expected"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused(example: Planted, neurons: Any, count: int, message: str) -> None:
    with pytest.raises(vs.CallError, match=message), vs.test_time_registers(example.model, neurons, count=count):
        pass
    assert hooks(example.model.module) == 0


def test_window_models_and_classifiers_of_all_tokens_are_refused() -> None:
    with (
        pytest.raises(vs.UnsupportedModelError, match="test-time registers are not supported for swin-nano"),
        vs.test_time_registers(vs.load("swin-nano"), []),
    ):
        pass
    family = next(each for each in ALL if each.name == "timm-vit-mean")
    model = vs.load(family.model().module, readout="tokens")
    with (
        pytest.raises(vs.UnsupportedModelError, match="its classifier reads all tokens"),
        vs.test_time_registers(model, []),
    ):
        pass
