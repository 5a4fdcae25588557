"""Saved results that contradict themselves, and wrong arguments of a result, are refused in one line."""

import dataclasses
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
from vitscope.results.samples import Samples
from vitscope.results.segment_attribution import SegmentAttribution
from vitscope.results.segmented_image import LinearFit, SegmentedImage

pytestmark = pytest.mark.usefixtures("unchecked")
CPU = torch.device("cpu")
NAN = float("nan")
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog")


def tensor(values: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=CPU)


def photo(size: tuple[int, int]) -> vs.InputImage:
    return vs.InputImage(Image.new("RGB", size, (200, 80, 20)), (0.0, 0.0, float(size[0]), float(size[1])))


def plain(count: int = 2) -> vs.Attribution:
    values = tensor(np.linspace(0, 1, count * 6).reshape(count, 2, 3))
    provenance = {"method": "rollout", "model": "m"}
    return vs.Attribution(values, vs.Grid(2, 3, 1), [photo((30, 20))] * count, provenance, "cat")


def segmented() -> SegmentAttribution:
    index = tensor([[0, 0, 1, -1], [2, 2, 1, 1]], torch.int64)
    intervals = tensor([[0.0, 1.0]] * 3, torch.float64)
    fits = [
        LinearFit("cat", 3, 0.7, tensor([0.5, -0.25, 0.1], torch.float64), intervals, 0.1, 0.9),
        LinearFit("dog", 5, 0.2, tensor([0.1, 0.2, 0.3], torch.float64), None, 0.1, 0.8),
    ]
    image = SegmentedImage(index + 10, index, fits)
    provenance = {"method": "lime", "model": "m"}
    return SegmentAttribution(
        image.values(), vs.Grid(2, 4), [photo((4, 2))], provenance, "cat", True, segmented_images=[image]
    )


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Change the tensors and metadata of a file; a list that ``change`` returns holds the new metadata."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = json.loads(file.metadata()["about"])
    replaced = change(tensors, metadata)
    save_file(tensors, path, {"about": json.dumps(replaced[0] if isinstance(replaced, list) else metadata)})


def put(mapping: Any, *keys: Any) -> None:
    """Set an entry of nested mappings: the last argument is the value, the others are the keys that lead to it."""
    *steps, last, value = keys
    for step in steps:
        mapping = mapping[step]
    mapping[last] = value


Change = Callable[[dict[str, Any], dict[str, Any]], Any]


def replaced_by(value: Any) -> Change:
    return lambda _, __: [value]


def height(value: Any) -> Change:
    return lambda _, metadata: put(metadata, "grid", "height", value)


BOTH: dict[str, Change] = {
    **{f"about {value!r}": replaced_by(value) for value in ([], {}, 5, None, "text", [[1]])},
    **{f"grid height {value!r}": height(value) for value in (-2, 0, 3, 1.5, "2", None, True, [2])},
    "grid prefix -1": lambda _, metadata: put(metadata, "grid", "prefix", -1),
    "grid width missing": lambda _, metadata: metadata["grid"].pop("width"),
    "grid with more": lambda _, metadata: put(metadata, "grid", "depth", 2),
    "grid a list": lambda _, metadata: put(metadata, "grid", [2, 3]),
    "provenance a number": lambda _, metadata: put(metadata, "provenance", 5),
    "provenance a list": lambda _, metadata: put(metadata, "provenance", []),
    "provenance missing": lambda _, metadata: metadata.pop("provenance"),
    "provenance of other images": lambda _, metadata: put(metadata, "provenance", "images", [{}, {}, {}]),
    "provenance of images a number": lambda _, metadata: put(metadata, "provenance", "images", 5),
    "target a number": lambda _, metadata: put(metadata, "target", 3),
    "target missing": lambda _, metadata: metadata.pop("target"),
    "signed text": lambda _, metadata: put(metadata, "signed", "yes"),
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
    "segmented images a number": lambda _, metadata: put(metadata, "segmented_images", 5),
    "segmented images missing": lambda _, metadata: metadata.pop("segmented_images"),
    "segmented images empty": lambda _, metadata: put(metadata, "segmented_images", []),
    "no classes": lambda _, metadata: put(metadata, "segmented_images", 0, []),
    "a class is text": lambda _, metadata: put(metadata, "segmented_images", 0, 0, "cat"),
    "a class without a label": lambda _, metadata: metadata["segmented_images"][0][0].pop("label"),
    "a label is a number": lambda _, metadata: put(metadata, "segmented_images", 0, 0, "label", 5),
    "an output is text": lambda _, metadata: put(metadata, "segmented_images", 0, 0, "output", "much"),
    "an output is NaN": lambda _, metadata: put(metadata, "segmented_images", 0, 0, "output", NAN),
    "an index is negative": lambda _, metadata: put(metadata, "segmented_images", 0, 1, "index", -1),
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


def sampled(name: str) -> vs.Attribution:
    """Return a result with samples: of LIME, of KernelSHAP, of RISE or of occlusion."""
    weights, shifts = np.ones(5), np.full((5, 2), 0.5)
    masks = np.arange(5)[:, None] >> np.arange(4) & 1 > 0
    outputs, original = np.linspace(0, 1, 10).reshape(5, 2).astype(np.float32), np.array([1.0, 0.0], np.float32)
    numbers: dict[str, Any] = {
        "lime": {"weights": weights, "groups": np.arange(5)},
        "kernel_shap": {"weights": weights},
        "rise": {"shifts": shifts},
        "occlusion": {},
    }[name]
    columns = slice(0, 3) if name in ("lime", "kernel_shap") else slice(None)
    samples = Samples(masks[:, columns], outputs, np.array([3, 5]), original, LABELS, **numbers)
    parameters = {"alpha": 1.0, "confidence": 0.95, "keep_probability": 0.5}
    provenance = {"method": name, "model": "m", "parameters": parameters}
    if name in ("lime", "kernel_shap"):
        image = dataclasses.replace(segmented().segmented_images[0], samples=samples)
        return dataclasses.replace(segmented(), provenance=provenance, segmented_images=[image])
    values = tensor(np.linspace(0, 1, 4).reshape(1, 2, 2))
    return vs.SampledAttribution(values, vs.Grid(2, 2), [photo((4, 2))], provenance, "cat", samples=[samples])


def cut(name: str) -> Change:
    """Return a change that takes the last row of a tensor."""
    return lambda tensors, _: put(tensors, name, tensors[name][:-1].clone())


def cast(name: str, dtype: torch.dtype) -> Change:
    return lambda tensors, _: put(tensors, name, tensors[name].to(dtype))


SAMPLES: dict[str, tuple[str, Change]] = {
    "samples a number": ("rise", lambda _, metadata: put(metadata, "samples", 5)),
    "samples missing": ("rise", lambda _, metadata: metadata.pop("samples")),
    "samples of more images": ("lime", lambda _, metadata: put(metadata, "samples", [None, None])),
    "samples text": ("occlusion", lambda _, metadata: put(metadata, "samples", 0, "text")),
    "labels missing": ("lime", lambda _, metadata: metadata["samples"][0].pop("labels")),
    "labels numbers": ("lime", lambda _, metadata: put(metadata, "samples", 0, "labels", [1, 2])),
    "fewer labels": ("rise", lambda _, metadata: put(metadata, "samples", 0, "labels", ["a"])),
    "no mask size": ("lime", lambda _, metadata: metadata["samples"][0].pop("mask_size")),
    "another mask size": ("lime", lambda _, metadata: put(metadata, "samples", 0, "mask_size", 4)),
    "a huge mask size": ("lime", lambda _, metadata: put(metadata, "samples", 0, "mask_size", 10**12)),
    "a mask size of text": ("rise", lambda _, metadata: put(metadata, "samples", 0, "mask_size", "4")),
    "no masks": ("lime", lambda tensors, _: tensors.pop("masks.0")),
    "fewer masks": ("occlusion", cut("masks.0")),
    "masks of floats": ("occlusion", cast("masks.0", torch.float32)),
    "fewer outputs": ("lime", cut("outputs.0")),
    "outputs of float64": ("lime", cast("outputs.0", torch.float64)),
    "outputs with NaN": ("rise", lambda tensors, _: put(tensors["outputs.0"], (0, 0), NAN)),
    "fewer classes": ("lime", cut("output_classes.0")),
    "classes beyond": ("lime", lambda tensors, _: put(tensors["output_classes.0"], 0, 7)),
    "classes below": ("lime", lambda tensors, _: put(tensors["output_classes.0"], 0, -1)),
    "fewer originals": ("occlusion", cut("original.0")),
    "no weights of masks": ("kernel_shap", lambda tensors, _: tensors.pop("mask_weights.0")),
    "weights of fewer masks": ("lime", cut("mask_weights.0")),
    "groups of floats": ("lime", cast("mask_groups.0", torch.float64)),
    "groups below": ("lime", lambda tensors, _: put(tensors["mask_groups.0"], 0, -1)),
    "groups beyond": ("lime", lambda tensors, _: put(tensors["mask_groups.0"], 0, 10**12)),
    "weights below": ("lime", lambda tensors, _: put(tensors["mask_weights.0"], 0, -1.0)),
    "no alpha": ("lime", lambda _, metadata: metadata["provenance"]["parameters"].pop("alpha")),
    "confidence of text": ("lime", lambda _, metadata: put(metadata, "provenance", "parameters", "confidence", "x")),
    "no parameters": ("lime", lambda _, metadata: metadata["provenance"].pop("parameters")),
    "parameters a list": ("rise", lambda _, metadata: put(metadata, "provenance", "parameters", [])),
    "shifts beyond": ("rise", lambda tensors, _: put(tensors["mask_shifts.0"], (0, 0), 2.0)),
    "no shifts, another grid": ("occlusion", lambda _, metadata: put(metadata, "samples", 0, "mask_size", 3)),
    "a rise without probability": (
        "rise",
        lambda _, metadata: metadata["provenance"]["parameters"].pop("keep_probability"),
    ),
    "a rise of no square": ("rise", lambda _, metadata: put(metadata, "samples", 0, "mask_size", 3)),
    "sizes a number": ("rise", lambda _, metadata: put(metadata, "sizes", 5)),
    "sizes of more images": ("rise", lambda _, metadata: put(metadata, "sizes", [[2, 2], [2, 2]])),
    "sizes of text": ("rise", lambda _, metadata: put(metadata, "sizes", [["2", "2"]])),
    "sizes that do not fit": ("rise", lambda _, metadata: put(metadata, "sizes", [[1, 2]])),
    "sizes below": ("rise", lambda _, metadata: put(metadata, "sizes", [[0, 2]])),
}


@pytest.mark.parametrize("name", ["lime", "kernel_shap", "rise", "occlusion"])
def test_samples_read_back(tmp_path: Path, name: str) -> None:
    result = sampled(name)
    loaded = type(result).load(result.save(tmp_path / "map.safetensors"))
    assert loaded.labels == ["cat", "dog"]
    assert loaded.of("dog").target == loaded.of(5).target == "dog"


@pytest.mark.parametrize(("name", "change"), SAMPLES.values(), ids=SAMPLES)
def test_saved_samples_that_contradict_themselves_are_refused_in_one_line(
    tmp_path: Path, name: str, change: Change
) -> None:
    result = sampled(name)
    path = result.save(tmp_path / "map.safetensors")
    rewrite(path, change)
    assert "map.safetensors is not a saved result: " in one_line(lambda: type(result).load(path), vs.WorkError)


def test_maps_of_other_sizes_than_recorded_are_refused(tmp_path: Path) -> None:
    wide, high = (
        dataclasses.replace(sampled("rise"), values=tensor(np.arange(8).reshape(1, *size)), grid=vs.Grid(*size))
        for size in ((2, 4), (4, 2))
    )
    path = vs.SampledAttribution.join([wide, high]).save(tmp_path / "map.safetensors")
    assert vs.SampledAttribution.load(path).sizes == [(2, 4), (4, 2)]
    rewrite(path, lambda tensors, _: put(tensors["values"], (0, 0, 0), 7.0))
    assert "is not a saved result: a map is not" in one_line(lambda: vs.SampledAttribution.load(path), vs.WorkError)


def one_line(call: Callable[[], Any], error: type[vs.VitscopeError]) -> str:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.slow
@pytest.mark.parametrize("make", [plain, segmented])
@pytest.mark.parametrize("change", BOTH.values(), ids=BOTH)
def test_a_saved_result_that_contradicts_itself_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[], vs.Attribution], change: Change
) -> None:
    path = make().save(tmp_path / "map.safetensors")
    type(make()).load(path)
    rewrite(path, change)
    assert "map.safetensors is not a saved result: " in one_line(lambda: type(make()).load(path), vs.WorkError)


@pytest.mark.parametrize("change", SEGMENTS.values(), ids=SEGMENTS)
def test_saved_segments_that_contradict_themselves_are_refused_in_one_line(tmp_path: Path, change: Change) -> None:
    path = segmented().save(tmp_path / "map.safetensors")
    rewrite(path, change)
    assert "map.safetensors is not a saved result: " in one_line(lambda: SegmentAttribution.load(path), vs.WorkError)


def test_a_result_without_segments_is_refused_in_one_line(tmp_path: Path) -> None:
    path = plain().save(tmp_path / "map.safetensors")
    assert "'segmented_images' is missing" in one_line(lambda: SegmentAttribution.load(path), vs.WorkError)


def test_deeply_nested_json_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "map.safetensors"
    save_file({"values": tensor([[[1.0]]])}, path, {"about": "[" * 100_000})
    one_line(lambda: vs.Attribution.load(path), vs.WorkError)


@pytest.mark.parametrize("cls", [vs.Attribution, SegmentAttribution])
def test_a_path_that_is_not_a_regular_file_is_refused_in_one_line(tmp_path: Path, cls: type[vs.Attribution]) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe.safetensors", ".", "loop"):
        assert "is not a saved result" in one_line(lambda name=name: cls.load(tmp_path / name), vs.WorkError)


PATHS = (None, 5, b"map.png", "a\0.png", f"{'a' * 300}.png", f"{'ä' * 130}.safetensors", ["map.png"], 1.5)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: repr(path)[:12])
def test_an_impossible_path_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert one_line(lambda: plain().save(path), vs.CallError).startswith("path is ")
    assert one_line(lambda: vs.Attribution.load(path), vs.CallError).startswith("path is ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alpha", ["x", None, NAN, "0.5", [0.5], True, 1j, np.array([0.1, 0.2]), -1, "a\nb"], ids=repr)
def test_an_impossible_alpha_is_refused_in_one_line(alpha: Any) -> None:
    message = one_line(lambda: plain().overlay(alpha), vs.CallError)
    assert message.startswith("alpha is ")
    assert message.endswith(", a number between 0 and 1 is expected")


@pytest.mark.parametrize("index", ["x", 1.5, None, True, slice(0, 1), (0,), 2, -3], ids=repr)
def test_an_impossible_index_is_refused_in_one_line(index: Any) -> None:
    for call in (lambda: plain().overlay(index=index), lambda: plain()[index]):
        assert one_line(call, vs.CallError).startswith("image ")


def test_numpy_numbers_are_accepted() -> None:
    result = plain()
    assert torch.equal(result[np.int64(-1)].values, result.values[1:])
    assert result.overlay(np.float32(0.5), index=np.int64(1)).tobytes() == result.overlay(0.5, index=1).tobytes()


@pytest.mark.parametrize("results", [[], (), None, 5, "ab", [1], [None], {}], ids=repr)
def test_joined_refuses_other_values(results: Any) -> None:
    assert one_line(lambda: vs.Attribution.join(results), vs.CallError).startswith("join takes a list")


@pytest.mark.parametrize(
    "sides", [(-1, 2), (2, -1), (0, 3), ("x", 2), (2, None), (1.5, 2), (True, 2), (2, 2, -1), (2, 2, "x")], ids=repr
)
def test_an_impossible_grid_is_refused_in_one_line(sides: tuple[Any, ...]) -> None:
    assert " of a grid is " in one_line(lambda: vs.Grid(*sides), vs.CallError)


def test_a_grid_of_numpy_numbers_holds_ints() -> None:
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
def test_results_do_not_depend_on_the_defaults_of_torch(
    tmp_path: Path, make: Callable[[], vs.Attribution], suffix: str
) -> None:
    result = make()
    path = result.save(tmp_path / f"map{suffix}")
    if suffix == ".safetensors":
        loaded = type(result).load(path)
        assert loaded.values.device == CPU
        assert torch.equal(loaded.values, result.values)
        assert repr(loaded)
    joined = result.join([result[0], result[-1]])
    assert joined.values.dtype == torch.float32
    if isinstance(result, SegmentAttribution):
        dog = result.of("dog")
        assert dog.values.dtype == torch.float32
        assert dog.values[0, 0].tolist() == pytest.approx([0.1, 0.1, 0.2, 0.0])
        assert result.regions(1).tolist() == [[True, True, False, False], [False] * 4]
        centres = [segment["centre"] for segment in result.as_json()["images"][0]["segments"]]
        assert centres == [[0.0, 0.5], [0.7, 2.3], [1.0, 0.5]]
        assert [segment["label"] for segment in result.as_json()["images"][0]["segments"]] == [10, 11, 12]
