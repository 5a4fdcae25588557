"""The interpretation of a module's output, against the formula applied to what the module itself returns."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.live import WithOutput, hf_vit, images, seeded, timm_vit, torchvision_vit
from vitscope.errors import CallError, UnclearOutputError, UnsupportedModelError

Pair = namedtuple("Pair", ["embedding", "classes"])


@dataclass
class TokensAndClasses:
    tokens: Tensor
    classes: Tensor


def softmax(rows: Tensor) -> Tensor:
    return rows.softmax(-1)


def sigmoid(rows: Tensor) -> Tensor:
    return rows.sigmoid()


def identity(rows: Tensor) -> Tensor:
    return rows


def module_rows(module: Any, pixels: Tensor) -> Tensor:
    """Return what the module itself computes, called directly."""
    with torch.no_grad():
        returned = module.logits(pixels) if isinstance(module, WithOutput) else module(pixels)
    return returned if isinstance(returned, Tensor) else returned.logits


def expect(model: vs.VisionModel, pixels: Tensor, rows: Tensor) -> None:
    """Assert that every prediction is the number in its column, and that the predictions are ranked."""
    for row, predictions in zip(rows.tolist(), model.predict(pixels, top_k=100), strict=True):
        numbers = {p.index: p.probability if p.value is None else p.value for p in predictions}
        assert [numbers[index] for index in range(len(row))] == pytest.approx(row, abs=1e-5)
        assert list(numbers.values()) == sorted(numbers.values(), reverse=True)


def with_head(ending: nn.Module) -> nn.Module:
    module: Any = timm_vit(5)
    module.head = nn.Sequential(module.head, ending)
    return module.eval()


def torchvision_with(ending: nn.Module) -> nn.Module:
    module: Any = torchvision_vit(5)
    module.heads.append(ending)
    return module.eval()


def hf_with(ending: nn.Module) -> nn.Module:
    module: Any = hf_vit(5)
    module.classifier = nn.Sequential(module.classifier, ending)
    return module.eval()


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor], str]] = {
    "timm": (lambda: timm_vit(5), softmax, "logits"),
    "torchvision": (lambda: torchvision_vit(5), softmax, "logits"),
    "transformers": (lambda: hf_vit(5), softmax, "logits"),
    "multi-label": (lambda: hf_vit(5, problem_type="multi_label_classification"), sigmoid, "sigmoid"),
    "single output": (lambda: hf_vit(1), sigmoid, "logits"),
    "single output of timm": (lambda: timm_vit(1), sigmoid, "logits"),
    "regression": (lambda: hf_vit(1, problem_type="regression"), identity, "value"),
    "regression of three": (lambda: hf_vit(3, problem_type="regression"), identity, "value"),
    "softmax layer of timm": (lambda: with_head(nn.Softmax(-1)), identity, "probabilities"),
    "sigmoid layer of timm": (lambda: with_head(nn.Sigmoid()), identity, "probabilities"),
    "log softmax of timm": (lambda: with_head(nn.LogSoftmax(-1)), softmax, "softmax"),
    "softmax layer of torchvision": (lambda: torchvision_with(nn.Softmax(-1)), identity, "probabilities"),
    "sigmoid layer of torchvision": (lambda: torchvision_with(nn.Sigmoid()), identity, "probabilities"),
    "softmax layer of transformers": (lambda: hf_with(nn.Softmax(-1)), identity, "probabilities"),
    "sigmoid layer of transformers": (lambda: hf_with(nn.Sigmoid()), identity, "probabilities"),
    "dropout head of timm": (lambda: with_head(nn.Dropout(0.5)), softmax, "logits"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_output_meaning(kind: str) -> None:
    build, formula, meaning = KINDS[kind]
    module, pixels = build(), images()
    model = vs.load(module)
    expect(model, pixels, formula(module_rows(module, pixels)))
    assert model.meaning == meaning


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "F.softmax": (lambda rows: F.softmax(rows, -1), "probabilities"),
    "torch.softmax": (lambda rows: torch.softmax(rows, -1), "probabilities"),
    "Tensor.softmax": (lambda rows: rows.softmax(-1), "probabilities"),
    "F.sigmoid": (lambda rows: F.sigmoid(rows), "probabilities"),
    "torch.sigmoid": (torch.sigmoid, "probabilities"),
    "expit": (torch.special.expit, "probabilities"),
    "Tensor.sigmoid": (lambda rows: rows.sigmoid(), "probabilities"),
}


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_probability_function_at_the_end_of_a_forward_method(function: str) -> None:
    apply, meaning = FUNCTIONS[function]
    module, pixels = WithOutput(apply), images()
    model = vs.load(module)
    expect(model, pixels, apply(module_rows(module, pixels)))
    assert model.meaning == meaning


def test_a_softmax_that_is_not_last_proves_nothing() -> None:
    module = WithOutput(lambda rows: rows.softmax(-1) * 7 - rows)
    with pytest.raises(UnclearOutputError, match=r"^WithOutput returns 5 numbers per image.*pass output='logits'"):
        vs.load(module).predict(images())


OVERRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": softmax,
    "softmax": softmax,
    "sigmoid": sigmoid,
    "value": identity,
}
BUILT: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm_vit(5),
    "torchvision": lambda: torchvision_vit(5),
    "transformers": lambda: hf_vit(5),
    "multi-label": lambda: hf_vit(5, problem_type="multi_label_classification"),
    "container": WithOutput,
}


@pytest.mark.slow
@pytest.mark.parametrize("output", OVERRIDES)
@pytest.mark.parametrize("kind", [kind for kind in BUILT if kind != "multi-label"])
def test_the_output_meaning_that_the_caller_states_is_used(kind: str, output: Any) -> None:
    module, pixels = BUILT[kind](), images()
    model = vs.load(module, output=output)
    expect(model, pixels, OVERRIDES[output](module_rows(module, pixels)))
    assert model.meaning == output


def test_output_logits_for_a_multi_label_model_means_softmax() -> None:
    module, pixels = BUILT["multi-label"](), images()
    expect(vs.load(module, output="logits"), pixels, module_rows(module, pixels).softmax(-1))


@pytest.mark.parametrize("kind", BUILT)
def test_probabilities_are_returned_unchanged(kind: str) -> None:
    module, pixels = BUILT[kind](), images()
    expect(vs.load(module, output="probabilities"), pixels, module_rows(module, pixels))


@pytest.mark.parametrize("kind", BUILT)
def test_output_features_means_no_classes(kind: str) -> None:
    module, pixels = BUILT[kind](), images()
    model = vs.load(module, output="features")
    with pytest.raises(UnsupportedModelError, match="has no classifier: it returns features, not classes"):
        model.predict(pixels)
    with torch.no_grad(), model.running():
        assert torch.allclose(model.features(pixels), module_rows(module, pixels), atol=1e-5)


@pytest.mark.parametrize("output", ["logit", "features ", "probability", 3, ["logits"]])
@pytest.mark.usefixtures("unchecked")
def test_an_unknown_output_is_refused(output: Any) -> None:
    with pytest.raises(CallError, match=r"choose logits, softmax, sigmoid, probabilities, value, features$"):
        vs.load(timm_vit(5), output=output)


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda rows: rows,
    "tuple": lambda rows: (rows,),
    "list": lambda rows: [rows],
    "tuple with maps": lambda rows: (rows, [torch.zeros(2, 3, 4, 4, device=rows.device)]),
    "pair with tokens": lambda rows: (rows, torch.zeros(len(rows), 17, 32, device=rows.device)),
    "logits": lambda rows: {"logits": rows, "embedding": torch.zeros(len(rows), 8, device=rows.device)},
    "class_logits": lambda rows: {"features": torch.zeros(len(rows), 8, device=rows.device), "class_logits": rows},
    "scores": lambda rows: {"loss": None, "scores": rows},
    "pred": lambda rows: {"pred": rows},
    "only candidate": lambda rows: {"whatever": rows, "maps": torch.zeros(len(rows), 2, 4, 4, device=rows.device)},
    "(B, 1, C)": lambda rows: rows[:, None],
    "(B, C, 1, 1)": lambda rows: rows[:, :, None, None],
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_output_structures(shape: str) -> None:
    module, pixels = WithOutput(SHAPES[shape]), images()
    expect(vs.load(module), pixels, module_rows(module, pixels).softmax(-1))


def test_a_single_number_per_image_is_a_sigmoid() -> None:
    module, pixels = WithOutput(lambda rows: rows[:, 0], classes=1), images()
    expect(vs.load(module), pixels, module_rows(module, pixels).sigmoid())
    expect(vs.load(module, output="value"), pixels, module_rows(module, pixels))
    assert vs.load(module, output="value").predict(pixels)[0][0].label == "value"


def heads(rows: Tensor) -> dict[str, Any]:
    return {"species": rows, "colour": {"hue": rows[:, :3] * 2, "shade": rows[:, 3:]}, "age": rows[:, :1]}


SELECTED: dict[str, tuple[Callable[[Tensor], Any], Any, Callable[[Tensor], Tensor]]] = {
    "key": (heads, "species", lambda rows: rows.softmax(-1)),
    "nested key": (heads, "colour.hue", lambda rows: (rows[:, :3] * 2).softmax(-1)),
    "single output": (heads, "age", lambda rows: rows[:, :1].sigmoid()),
    "position": (lambda rows: (rows[:, :2], rows), 1, lambda rows: rows.softmax(-1)),
    "position from the end": (lambda rows: (rows[:, :2], rows), -2, lambda rows: rows[:, :2].softmax(-1)),
    "position in words": (lambda rows: (rows[:, :2], {"x": rows}), "1.x", lambda rows: rows.softmax(-1)),
    "name of a tuple": (lambda rows: Pair(rows[:, :2], rows), "classes", lambda rows: rows.softmax(-1)),
    "field": (lambda rows: TokensAndClasses(rows[:, :2], rows), "classes", lambda rows: rows.softmax(-1)),
    "position of a mapping": (lambda rows: {"a": rows[:, :2], "b": rows}, 1, lambda rows: rows.softmax(-1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SELECTED)
def test_select_chooses_among_several_heads(case: str) -> None:
    output, select, formula = SELECTED[case]
    module, pixels = WithOutput(output), images()
    model = vs.load(module, select=select, output="logits")
    expect(model, pixels, formula(module_rows(module, pixels)))


@pytest.mark.parametrize(
    ("output", "listing"),
    [
        (lambda rows: {"a": rows, "b": rows[:, :2]}, r"'a' \(2, 5\), 'b' \(2, 2\)"),
        (lambda rows: (rows, rows[:, :2]), r"0 \(2, 5\), 1 \(2, 2\)"),
        (lambda rows: Pair(rows, rows[:, :2]), r"'embedding' \(2, 5\), 'classes' \(2, 2\)"),
        (lambda rows: TokensAndClasses(rows, rows[:, :2]), r"'tokens' \(2, 5\), 'classes' \(2, 2\)"),
    ],
    ids=["mapping", "tuple", "namedtuple", "dataclass"],
)
def test_several_heads_are_listed_not_guessed(output: Any, listing: str) -> None:
    with pytest.raises(UnclearOutputError, match=f"WithOutput returns several outputs \\({listing}\\): pass select="):
        vs.load(WithOutput(output)).predict(images())


@pytest.mark.slow
@pytest.mark.parametrize("select", ["colours", "colour.hues", "species.0", 3, -4])
def test_a_wrong_selection_lists_the_entries(select: Any) -> None:
    with pytest.raises(CallError, match=r"^select=.* is not in the output of WithOutput: it returns a \w+") as caught:
        vs.load(WithOutput(heads), select=select).predict(images())
    assert "\n" not in str(caught.value)
    if select in ("colours", 3, -4):
        assert "'species' (2, 5), 'colour' dict, 'age' (2, 1)" in str(caught.value)


@pytest.mark.parametrize("select", [True, 1.5, ("a", "b"), b"a"])
@pytest.mark.usefixtures("unchecked")
def test_a_selection_of_another_type_is_refused(select: Any) -> None:
    with pytest.raises(CallError, match="pass a key, a position, or keys joined by dots"):
        vs.load(WithOutput(heads), select=select)


class Detector(nn.Module):
    """A backbone whose tokens ``output`` turns into queries, boxes or maps."""

    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.backbone, self.output = timm_vit(0), output

    def forward(self, pixels: Tensor) -> Any:
        return self.output(self.backbone.forward_features(pixels))  # type: ignore[operator]


def test_functions_can_read_the_output() -> None:
    module, pixels = Detector(lambda tokens: {"queries": tokens[:, :4, :7]}).eval(), images()
    with torch.no_grad():
        rows = module(pixels)["queries"].amax(1)
    model = vs.load(module, logits=lambda returned: returned["queries"].amax(1))
    expect(model, pixels, rows.softmax(-1))
    embedded = vs.load(module, embed=lambda returned: returned["queries"].mean(1))
    with torch.no_grad(), embedded.running():
        assert torch.equal(embedded.features(pixels), module(pixels)["queries"].mean(1))


@pytest.mark.parametrize("name", ["logits", "embed"])
def test_a_function_that_returns_no_row_per_image_is_refused(name: str) -> None:
    options: dict[str, Any] = {name: lambda returned: returned["queries"]}
    model = vs.load(Detector(lambda tokens: {"queries": tokens[:, :4, :7]}).eval(), **options)
    with pytest.raises(CallError, match=rf"^{name}= returned a tensor of shape \(1, 4, 7\): a tensor \(batch, "):
        vs.occlusion(model, images(1), target="similarity" if name == "embed" else 0)


@pytest.mark.parametrize("name", ["logits", "embed"])
@pytest.mark.usefixtures("unchecked")
def test_logits_and_embed_must_be_functions(name: str) -> None:
    options: dict[str, Any] = {name: "queries"}
    with pytest.raises(CallError, match=f"^{name} is 'queries': a function of the module's output is expected$"):
        vs.load(WithOutput(), **options)


def yolos() -> nn.Module:
    import transformers

    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.YolosConfig(
        **shape, intermediate_size=48, image_size=[32, 32], patch_size=8, num_detection_tokens=4
    )
    return seeded(lambda: transformers.YolosForObjectDetection(config))


def segformer() -> nn.Module:
    import transformers

    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8
    )
    return seeded(lambda: transformers.SegformerForSemanticSegmentation(config))


UNREADABLE: dict[str, Callable[[], nn.Module]] = {
    "yolos": yolos,
    "segformer": segformer,
    "queries": lambda: Detector(lambda tokens: {"pred_logits": tokens[:, :4, :7], "pred_boxes": tokens[:, :4, :4]}),
    "map": lambda: Detector(lambda tokens: tokens[:, 1:].mT.unflatten(-1, (4, 4))),
    "tokens": lambda: Detector(lambda tokens: tokens),
    "sentence": lambda: Detector(lambda _: "a cat"),
    "nothing": lambda: Detector(lambda _: None),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_output_without_class_rows_cannot_be_predicted_but_captured(kind: str) -> None:
    model = vs.load(UNREADABLE[kind]().eval())
    with pytest.raises(UnsupportedModelError) as caught:
        model.predict(images())
    message = str(caught.value)
    assert "\n" not in message
    assert "returns neither classes nor features that vitscope recognises" in message or "has no classifier" in message
    if kind == "segformer":  # it has fewer keys than queries
        with pytest.raises(UnsupportedModelError, match="is among image tokens alone"):
            vs.capture(model, images(1))
    else:
        assert vs.capture(model, images(1)).num_layers == 2
