"""A saved result is what it says, or one line; wrong arguments of a result are one line too."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import vitscope as vs
from vitscope.results.segment_attribution import LinearFit, SegmentAttribution, SegmentedImage

pytestmark = pytest.mark.usefixtures("unchecked")
CPU = torch.device("cpu")
NAN = float("nan")


def tensor(values: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=CPU)


def photo(size: tuple[int, int]) -> vs.InputImage:
    return vs.InputImage(Image.new("RGB", size, (200, 80, 20)), (0.0, 0.0, float(size[0]), float(size[1])))


def plain(count: int = 2) -> vs.Attribution:
    values = tensor(np.linspace(0, 1, count * 6).reshape(count, 2, 3))
    about = {"method": "rollout", "model": "m"}
    return vs.Attribution(values, vs.Grid(2, 3, 1), [photo((30, 20))] * count, about, "cat")


def segmented() -> SegmentAttribution:
    index = tensor([[0, 0, 1, -1], [2, 2, 1, 1]], torch.int64)
    intervals = tensor([[0.0, 1.0]] * 3, torch.float64)
    fits = [
        LinearFit("cat", 3, 0.7, tensor([0.5, -0.25, 0.1], torch.float64), intervals, 0.1, 0.9),
        LinearFit("dog", 5, 0.2, tensor([0.1, 0.2, 0.3], torch.float64), None, 0.1, 0.8),
    ]
    part = SegmentedImage(index + 10, index, fits)
    about = {"method": "lime", "model": "m"}
    return SegmentAttribution(part.values(), vs.Grid(2, 4), [photo((4, 2))], about, "cat", True, parts=[part])


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """The file with its tensors and what it says of them changed, in place or to what ``change`` returns."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        about = json.loads(file.metadata()["about"])
    replaced = change(tensors, about)
    save_file(tensors, path, {"about": json.dumps(replaced[0] if isinstance(replaced, list) else about)})


def put(mapping: Any, *keys: Any) -> None:
    """The last of ``keys`` becomes the value under the others."""
    *steps, last, value = keys
    for step in steps:
        mapping = mapping[step]
    mapping[last] = value


Change = Callable[[dict[str, Any], dict[str, Any]], Any]


def said(value: Any) -> Change:
    return lambda _, __: [value]


def height(value: Any) -> Change:
    return lambda _, about: put(about, "grid", "height", value)


BOTH: dict[str, Change] = {
    **{f"about {value!r}": said(value) for value in ([], {}, 5, None, "text", [[1]])},
    **{f"grid height {value!r}": height(value) for value in (-2, 0, 3, 1.5, "2", None, True, [2])},
    "grid prefix -1": lambda _, about: put(about, "grid", "prefix", -1),
    "grid width missing": lambda _, about: about["grid"].pop("width"),
    "grid with more": lambda _, about: put(about, "grid", "depth", 2),
    "grid a list": lambda _, about: put(about, "grid", [2, 3]),
    "provenance a number": lambda _, about: put(about, "provenance", 5),
    "provenance a list": lambda _, about: put(about, "provenance", []),
    "provenance missing": lambda _, about: about.pop("provenance"),
    "provenance of other images": lambda _, about: put(about, "provenance", "images", [{}, {}, {}]),
    "provenance of images a number": lambda _, about: put(about, "provenance", "images", 5),
    "target a number": lambda _, about: put(about, "target", 3),
    "target missing": lambda _, about: about.pop("target"),
    "signed text": lambda _, about: put(about, "signed", "yes"),
    "no values": lambda tensors, _: tensors.pop("values"),
    "values of one dimension": lambda tensors, _: put(tensors, "values", tensor([1.0, 2.0])),
    "values a number": lambda tensors, _: put(tensors, "values", tensor(1.0)),
    "no images": lambda tensors, _: put(tensors, "values", tensors["values"][:0].clone()),
    "values turned": lambda tensors, _: put(tensors, "values", tensors["values"].mT.contiguous()),
    "values with NaN": lambda tensors, _: put(tensors["values"], (0, 0, 0), NAN),
    "values with infinity": lambda tensors, _: put(tensors["values"], (0, 1, 1), float("inf")),
    "values of integers": lambda tensors, _: put(tensors, "values", tensors["values"].long()),
    "values of float64": lambda tensors, _: put(tensors, "values", tensors["values"].double()),
    "values of float16": lambda tensors, _: put(tensors, "values", tensors["values"].half()),
}
SEGMENTS: dict[str, Change] = {
    "other values": lambda tensors, _: put(tensors["values"], (0, 0, 0), 9.0),
    "more images": lambda tensors, _: put(tensors, "values", tensors["values"].repeat(2, 1, 1)),
    "parts a number": lambda _, about: put(about, "parts", 5),
    "parts missing": lambda _, about: about.pop("parts"),
    "parts empty": lambda _, about: put(about, "parts", []),
    "no classes": lambda _, about: put(about, "parts", 0, []),
    "a class is text": lambda _, about: put(about, "parts", 0, 0, "cat"),
    "a class without a label": lambda _, about: about["parts"][0][0].pop("label"),
    "a label is a number": lambda _, about: put(about, "parts", 0, 0, "label", 5),
    "an answer is text": lambda _, about: put(about, "parts", 0, 0, "answer", "much"),
    "an answer is NaN": lambda _, about: put(about, "parts", 0, 0, "answer", NAN),
    "an index is negative": lambda _, about: put(about, "parts", 0, 1, "index", -1),
    "no segments": lambda tensors, _: tensors.pop("segments.0"),
    "no index": lambda tensors, _: tensors.pop("index.0"),
    "no weights": lambda tensors, _: tensors.pop("weights.0.1"),
    "segments of another size": lambda tensors, _: put(tensors, "segments.0", tensors["segments.0"][:1].clone()),
    "segments of floats": lambda tensors, _: put(tensors, "segments.0", tensors["segments.0"].float()),
    "index of floats": lambda tensors, _: put(tensors, "index.0", tensors["index.0"].double()),
    "index beyond": lambda tensors, _: put(tensors["index.0"], (0, 0), 3),
    "index below": lambda tensors, _: put(tensors["index.0"], (0, 0), -2),
    "weights of float32": lambda tensors, _: put(tensors, "weights.0.0", tensors["weights.0.0"].float()),
    "weights with NaN": lambda tensors, _: put(tensors["weights.0.1"], 0, NAN),
    "fewer weights": lambda tensors, _: put(tensors, "weights.0.1", tensors["weights.0.1"][:2].clone()),
    "intervals of one end": lambda tensors, _: put(tensors, "intervals.0.0", tensors["weights.0.0"].clone()),
    "intervals with NaN": lambda tensors, _: put(tensors["intervals.0.0"], (0, 0), NAN),
}


def one_line(call: Callable[[], Any], error: type[vs.VitscopeError]) -> str:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize("make", [plain, segmented])
@pytest.mark.parametrize("change", BOTH.values(), ids=BOTH)
def test_a_saved_result_with_a_contradiction_is_one_line(
    tmp_path: Path, make: Callable[[], vs.Attribution], change: Change
) -> None:
    path = make().save(tmp_path / "map.safetensors")
    type(make()).load(path)
    changed(path, change)
    assert "map.safetensors is no saved result: " in one_line(lambda: type(make()).load(path), vs.WorkError)


@pytest.mark.parametrize("change", SEGMENTS.values(), ids=SEGMENTS)
def test_saved_segments_with_a_contradiction_are_one_line(tmp_path: Path, change: Change) -> None:
    path = segmented().save(tmp_path / "map.safetensors")
    changed(path, change)
    assert "map.safetensors is no saved result: " in one_line(lambda: SegmentAttribution.load(path), vs.WorkError)


def test_what_is_no_result_of_segments_is_one_line(tmp_path: Path) -> None:
    path = plain().save(tmp_path / "map.safetensors")
    assert "'parts' is missing" in one_line(lambda: SegmentAttribution.load(path), vs.WorkError)


def test_deep_json_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "map.safetensors"
    save_file({"values": tensor([[[1.0]]])}, path, {"about": "[" * 100_000})
    one_line(lambda: vs.Attribution.load(path), vs.WorkError)


@pytest.mark.parametrize("cls", [vs.Attribution, SegmentAttribution])
def test_what_is_no_file_is_one_line(tmp_path: Path, cls: type[vs.Attribution]) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe.safetensors", ".", "loop"):
        assert "is no saved result" in one_line(lambda name=name: cls.load(tmp_path / name), vs.WorkError)


PATHS = (None, 5, b"map.png", "a\0.png", f"{'a' * 300}.png", f"{'ä' * 130}.safetensors", ["map.png"], 1.5)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: repr(path)[:12])
def test_a_path_that_is_none_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert one_line(lambda: plain().save(path), vs.CallError).startswith("a path is ")
    assert one_line(lambda: vs.Attribution.load(path), vs.CallError).startswith("a path is ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alpha", ["x", None, NAN, "0.5", [0.5], True, 1j, np.array([0.1, 0.2]), -1, "a\nb"], ids=repr)
def test_an_alpha_that_is_none_is_one_line(alpha: Any) -> None:
    message = one_line(lambda: plain().overlay(alpha), vs.CallError)
    assert message.startswith("alpha is ")
    assert message.endswith(", an opacity between 0 and 1 is expected")


@pytest.mark.parametrize("index", ["x", 1.5, None, True, slice(0, 1), (0,), 2, -3], ids=repr)
def test_an_index_that_is_none_is_one_line(index: Any) -> None:
    for call in (lambda: plain().overlay(index=index), lambda: plain()[index]):
        assert one_line(call, vs.CallError).startswith("image ")


def test_numbers_of_numpy_are_numbers() -> None:
    result = plain()
    assert torch.equal(result[np.int64(-1)].values, result.values[1:])
    assert result.overlay(np.float32(0.5), index=np.int64(1)).tobytes() == result.overlay(0.5, index=1).tobytes()


@pytest.mark.parametrize("results", [[], (), None, 5, "ab", [1], [None], {}], ids=repr)
def test_results_that_are_none_make_no_batch(results: Any) -> None:
    assert one_line(lambda: vs.Attribution.joined(results), vs.CallError).startswith("joined takes a list")


@pytest.mark.parametrize(
    "sides", [(-1, 2), (2, -1), (0, 3), ("x", 2), (2, None), (1.5, 2), (True, 2), (2, 2, -1), (2, 2, "x")], ids=repr
)
def test_a_grid_that_is_none_is_one_line(sides: tuple[Any, ...]) -> None:
    assert " of a grid is " in one_line(lambda: vs.Grid(*sides), vs.CallError)


def test_a_grid_of_numpys_numbers_is_one_of_numbers() -> None:
    assert repr(vs.Grid(np.int64(2), np.int32(3))) == "Grid(height=2, width=3, prefix=0)"


@pytest.fixture(params=["meta", "float64", "float16"])
def other_defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@pytest.mark.usefixtures("other_defaults")
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".json"])
@pytest.mark.parametrize("make", [plain, segmented])
def test_defaults_of_torch_do_not_matter(tmp_path: Path, make: Callable[[], vs.Attribution], suffix: str) -> None:
    result = make()
    path = result.save(tmp_path / f"map{suffix}")
    if suffix == ".safetensors":
        back = type(result).load(path)
        assert back.values.device == CPU
        assert torch.equal(back.values, result.values)
        assert repr(back)
    joined = result.joined([result[0], result[-1]])
    assert joined.values.dtype == torch.float32
    if isinstance(result, SegmentAttribution):
        other = result.of("dog")
        assert other.values.dtype == torch.float32
        assert other.values[0, 0].tolist() == pytest.approx([0.1, 0.1, 0.2, 0.0])
        assert result.regions(1).tolist() == [[True, True, False, False], [False] * 4]
        centres = [segment["centre"] for segment in result.as_json()["images"][0]["segments"]]
        assert centres == [[0.0, 0.5], [0.7, 2.3], [1.0, 0.5]]
        assert [segment["label"] for segment in result.as_json()["images"][0]["segments"]] == [10, 11, 12]
