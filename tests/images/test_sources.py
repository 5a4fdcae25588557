"""Sources: one image or several, and everything that an image can be read from."""

import gzip
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitscope.errors import CallError, ImageError, ImageNotFoundError, VitscopeError
from vitscope.images.preprocessing import Preprocessing
from vitscope.images.reading import photos, read_photo
from vitscope.images.sources import require_regular_file

PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)

SINGLE: list[Any] = [
    "cat.png",
    Path("cat.png"),
    Image.fromarray(PIXELS),
    PIXELS,
    PIXELS[..., 0],
    b"bytes",
    bytearray(b"bytes"),
    memoryview(b"bytes"),
    io.BytesIO(b"bytes"),
    None,
]


@pytest.mark.parametrize("source", SINGLE, ids=lambda source: type(source).__name__)
def test_a_single_source_becomes_a_list(source: Any) -> None:
    assert len(photos(source)) == 1
    assert photos(source)[0] is source


@pytest.mark.parametrize("sequence", [list, tuple])
def test_a_sequence_is_several_sources(sequence: Any) -> None:
    sources = photos(sequence(SINGLE))
    assert len(sources) == len(SINGLE)
    assert all(source is item for source, item in zip(sources, SINGLE, strict=True))


def test_an_array_of_four_dimensions_is_a_batch() -> None:
    batch = np.stack([PIXELS, 255 - PIXELS])
    sources = photos(batch)
    assert [source.shape for source in sources] == [(5, 7, 3)] * 2
    assert np.array_equal(sources[1], 255 - PIXELS)


@pytest.mark.parametrize("images", [[], (), np.zeros((0, 5, 7, 3), dtype=np.uint8)], ids=str)
def test_an_empty_list_is_refused(images: Any) -> None:
    with pytest.raises(CallError, match=r"^no image was given$"):
        photos(images)


def test_the_source_of_a_preprocessing_is_kept_and_not_compared() -> None:
    preprocessing = Preprocessing(
        (224, 224), fit="crop", resize_to=(256, 256), round_half_even=True, source="config.json"
    )
    larger = preprocessing.resized((448, 448))
    assert larger.source == "config.json"
    assert larger == Preprocessing((448, 448), fit="crop", resize_to=(512, 512), round_half_even=True)


# Sources


def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, format="PNG")
    return stream.getvalue()


def refusal(source: Any, error: type[VitscopeError] = CallError) -> str:
    with pytest.raises(error) as caught:
        read_photo(source)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 900
    return message


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail after this time instead of waiting forever."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def opened(tmp_path: Path) -> dict[str, Any]:
    """Return the same PNG as a source of every kind."""
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(path, "photo.png")
    (tmp_path / "photo.png.gz").write_bytes(gzip.compress(png()))
    spooled = tempfile.SpooledTemporaryFile()  # noqa: SIM115
    spooled.write(png())
    spooled.seek(0)
    return {
        "path": path,
        "text": str(path),
        "bytes": png(),
        "bytearray": bytearray(png()),
        "memoryview": memoryview(png()),
        "BytesIO": io.BytesIO(png()),
        "file": path.open("rb"),
        "unbuffered file": path.open("rb", buffering=0),
        "file in an archive": zipfile.ZipFile(tmp_path / "photos.zip").open("photo.png"),
        "gzip": gzip.open(tmp_path / "photo.png.gz"),
        "spooled": spooled,
    }


SOURCES = [
    *("path", "text", "bytes", "bytearray", "memoryview", "BytesIO"),
    *("file", "unbuffered file", "file in an archive", "gzip", "spooled"),
]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_the_same_photo_twice(tmp_path: Path, kind: str) -> None:
    sources = opened(tmp_path)
    assert list(sources) == SOURCES
    try:
        for _ in range(2):
            (source,) = photos(sources[kind])
            assert np.array_equal(np.asarray(read_photo(source)[0]), PIXELS)
    finally:
        for source in sources.values():
            if hasattr(source, "close"):
                source.close()


class Reader:
    """A minimal reader, without a size or a position."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self) -> bytes:
        data, self.data = self.data, b""
        return data


def test_a_minimal_reader_is_read() -> None:
    assert np.array_equal(np.asarray(read_photo(Reader(png()))[0]), PIXELS)
    assert "nothing left to read" in refusal(Reader(b""))


@pytest.mark.parametrize("mode", ["La", "RGBa", "LA", "RGBA"])
def test_premultiplied_transparent_pixels_become_white(mode: str) -> None:
    straight = Image.new("LA" if "L" in mode else "RGBA", (3, 3), (0, 0) if "L" in mode else (0, 0, 0, 0))
    image = straight if straight.mode == mode else straight.convert(mode)
    assert image.mode == mode
    assert (np.asarray(read_photo(image)[0]) == 255).all()


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_are_read_in_both_byte_orders(order: str) -> None:
    deep = (PIXELS.astype(np.uint16) << 8).astype(f"{order}u2")
    assert np.array_equal(np.asarray(read_photo(deep)[0]), PIXELS)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_an_array_in_a_file_is_read(tmp_path: Path, dtype: Any, version: tuple[int, int]) -> None:
    array = PIXELS.astype(dtype) * (257 if dtype is np.uint16 else 1)
    path = tmp_path / "photo.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, version=version)
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert np.array_equal(np.asarray(read_photo(source)[0]), PIXELS)


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array, allow_pickle=True)
    return path


class Trap:
    """An object whose pickle runs code when it is loaded."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("trap-was-sprung",))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4, 3)), "float64 has no defined range"),
        (np.zeros((4, 4, 3), dtype=np.float16), "float16 has no defined range"),
        (np.zeros((4, 4, 3), dtype=np.int32), "int32 has no defined range"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), "shape (2, 4, 4, 3)"),
        (np.array([[Trap()]], dtype=object), "holds objects"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_array_that_is_not_an_image_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: np.ndarray, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reason in refusal(saved(tmp_path / "photo.npy", array))
    assert reason in refusal(array)
    assert not (tmp_path / "trap-was-sprung").exists()


def test_an_array_file_that_claims_too_many_pixels_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6, 3)})
    path = tmp_path / "photo.npy"
    path.write_bytes(stream.getvalue())
    assert "more than the limit" in refusal(path, ImageError)
    path.write_bytes(saved(tmp_path / "complete.npy", PIXELS).read_bytes()[:-20])
    assert refusal(path, ImageError).startswith(f"{path} is damaged")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (PIXELS / 255, "float64 has no defined range: pass uint8 from 0 to 255"),
        (PIXELS.astype(object), "holds objects, not pixels"),
        (np.array([PIXELS, PIXELS[:2]], dtype=object), "holds objects, not pixels"),
        (np.array(["a.png", "b.png"]), "(2,)"),
        (PIXELS.tolist(), "nested lists are not supported"),
        (io.StringIO("text"), "open it in binary mode"),
        (io.BytesIO(), "nothing left to read"),
        (b"", "empty"),
        (bytearray(), "empty"),
        (b"photo.png", "pass a path, a PIL image"),
        (7, "cannot read an image from int"),
        (None, "cannot read an image from NoneType"),
        ({"bytes": b""}, "cannot read an image from dict"),
        ({"a.png"}, "cannot read an image from set"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_values_are_refused_in_one_line(source: Any, reason: str) -> None:
    assert reason in refusal(source)


def test_an_open_file_that_cannot_be_read_as_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    with path.open(encoding="latin-1") as text:
        assert "open it in binary mode" in refusal(text)
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        assert "seek(0)" in refusal(file)
    assert "closed file" in refusal(file)
    with path.open("ab") as writing:
        assert "cannot be read" in refusal(writing)


# Only regular files


def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def linked(path: Path, target: Any) -> Path:
    path.symlink_to(target)
    return path


def unix_socket(tmp_path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
    return tmp_path / "s"


SPECIAL: dict[str, tuple[Any, str]] = {
    "named pipe": (fifo, "is a named pipe"),
    "link to a named pipe": (lambda tmp: linked(tmp / "link.png", fifo(tmp)), "is a named pipe"),
    "socket": (unix_socket, "is a socket"),
    "device": (lambda _: Path("/dev/zero"), "/dev/zero is a device"),
    "random device": (lambda _: "/dev/urandom", "/dev/urandom is a device"),
    "null device": (lambda _: "/dev/null", "/dev/null is a device"),
    "folder": (lambda tmp: tmp, "is a folder"),
    "dangling link": (lambda tmp: linked(tmp / "a.png", tmp / "b.png"), "b.png, which does not exist"),
    "looping link": (lambda tmp: linked(tmp / "a.png", tmp / "a.png"), "leads back to itself"),
    "below a file": (lambda tmp: saved(tmp / "a.npy", PIXELS) / "b.png", "does not exist"),
    "NUL": (lambda tmp: f"{tmp}/a\0b.png", "NUL character"),
    "long name": (lambda tmp: tmp / f"{'n' * 256}.png", "File name too long"),
    "long path": (lambda _: "n/" * 5000, "File name too long"),
    "two lines": (lambda _: "a\nb.png", "'a\\nb.png' does not exist"),
    "escapes": (lambda _: "\x1b[31mred.png", "'\\x1b[31mred.png' does not exist"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    make, reason = SPECIAL[kind]
    source = make(tmp_path)
    with time_limit(10):
        assert reason in refusal(source, ImageNotFoundError)
        with pytest.raises(ImageNotFoundError) as caught:
            require_regular_file(source)
    assert reason in str(caught.value)


def test_a_link_to_an_image_is_read(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png())
    link = linked(tmp_path / "link", tmp_path / "photo.png")
    assert np.array_equal(np.asarray(read_photo(link)[0]), PIXELS)
    assert require_regular_file(str(link)) == link


def test_an_open_pipe_or_device_is_refused_without_waiting() -> None:
    read, write = os.pipe()
    with open(read, "rb") as pipe, open(write, "wb"), time_limit(10):  # noqa: PTH123
        assert "may never end" in refusal(pipe)
    with Path("/dev/zero").open("rb") as device, time_limit(10):
        assert "may never end" in refusal(device)


URLS = [
    "https://example.com/dog.jpg",
    "http://example.com/a/b/dog.jpg?size=3&x=1",
    "HTTPS://EXAMPLE.COM/DOG.JPG",
    "ftp://example.com/dog.jpg",
    "s3://bucket/dog.jpg",
    "gs://bucket/dog.jpg",
    "file:///home/dog.jpg",
    "hf://datasets/owner/name/dog.jpg",
    f"https://example.com/dog.jpg?signature={'a' * 500}",
]


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("url", URLS)
def test_the_message_for_a_url_quotes_it_as_typed(url: str, kind: Any) -> None:
    message = refusal(kind(url), ImageNotFoundError)
    assert message == f"{url} is a URL: download it first, then pass the path of the file or its bytes"


@pytest.mark.parametrize("kind", [str, Path])
def test_the_message_for_a_data_url_is_shortened(kind: Any) -> None:
    message = refusal(kind(f"data:image/png;base64,{'A' * 9000}"), ImageNotFoundError)
    assert message.startswith("data:image/png;base64,AAAA")
    assert "download it first" in message


@pytest.mark.parametrize("name", ["http:", "s3:", "data:x", "a:b"])
def test_a_file_with_a_name_like_a_url_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name
    folder.mkdir()
    (folder / "photo.png").write_bytes(png())
    assert np.array_equal(np.asarray(read_photo(f"{name}/photo.png")[0]), PIXELS)
    assert "does not exist" in refusal("a:c/photo.png", ImageNotFoundError)


MASKS = """
import os, sys, numpy as np, vitscope as vs
path = sys.argv[1]
os.mkfifo(path)
for call in (
    lambda: vs.object_mask(np.zeros((8, 8, 3), np.uint8), mask=path),
    lambda: __import__("vitscope.compositing.recipe").compositing.recipe.read_recipe(path),
):
    try:
        call()
    except vs.errors.VitscopeError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".png", ".npy", ".toml"])
def test_masks_and_recipes_must_be_regular_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pipe{suffix}"
    process = subprocess.run(
        [sys.executable, "-c", MASKS, str(path)], capture_output=True, text=True, timeout=120, check=True
    )
    assert process.stdout.count(f"{path} is a named pipe") == 2


@pytest.mark.parametrize("text", ['photo = "https://example.com/dog.png"', 'photo = "s3://bucket/dog.png"'])
def test_a_url_in_a_recipe_is_refused(tmp_path: Path, text: str) -> None:
    from vitscope.compositing.recipe import read_recipe

    path = tmp_path / "recipe.toml"
    path.write_text(f"[[image]]\n{text}\n")
    with pytest.raises(ImageNotFoundError, match="is a URL: download it first") as caught:
        read_recipe(path)
    assert text.split('"')[1] in str(caught.value)


def test_an_open_file_that_decompresses_to_too_many_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscope.images.sources.MAX_BYTES", 1000)
    with gzip.open(io.BytesIO(gzip.compress(bytes(5000)))) as file:
        assert "holds more than" in refusal(file)


def test_a_pillow_image_that_would_run_ghostscript_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, format="EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.EpsImageFile.load", lambda *_, **__: pytest.fail("loaded"))
    with Image.open(io.BytesIO(stream.getvalue())) as image:
        assert "is an image of format EPS" in refusal(image, ImageError)
