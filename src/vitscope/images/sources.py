"""Image files: which are opened, and which formats are decoded."""

import errno
import io
import os
import re
import stat
from pathlib import Path
from typing import Any

from PIL import features

from vitscope.errors import CallError, ImageError, ImageNotFoundError, first_line

# Every format that is decoded, and how its files begin ("?" is any byte). Nothing else reaches a decoder: Pillow alone
# would also run Ghostscript, whatever the file is called.
_SIGNATURES: dict[str, tuple[bytes, ...]] = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "WebP": (b"RIFF????WEBP",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "PPM/PGM": (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"),
    "JPEG 2000": (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"),
    "AVIF": (b"????ftypavif", b"????ftypavis"),
}
_PILLOW_NAMES = {"PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"}
_OPTIONAL = {"WebP": "webp", "JPEG 2000": "jpg_2000", "AVIF": "avif"}

# Files that people try, by what they are called in the refusal.
_OTHERS: dict[str, tuple[bytes, ...]] = {
    "PostScript": (b"%!PS", b"\xc5\xd0\xd3\xc6"),
    "PDF": (b"%PDF",),
    "HEIC": (b"????ftyphei", b"????ftyphev"),
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL "),
    "SVG": (b"<svg", b"<?xml"),
    "HTML": (b"<!DOCTYPE", b"<!doctype", b"<html"),
    "Photoshop": (b"8BPS",),
    "icon": (b"\0\0\1\0", b"icns"),
    "DDS": (b"DDS ",),
    "OpenEXR": (b"v/1\x01",),
    "PFM": (b"Pf", b"PF"),
    "FITS": (b"SIMPLE",),
    "HDF5": (b"\x89HDF",),
    "ZIP": (b"PK\3\4",),
    "gzip": (b"\x1f\x8b",),
    "X bitmap": (b"#define", b"/* XPM"),
    "QOI": (b"qoif",),
}
PREFIX = 256  # bytes that a signature is looked for in
NPY = b"\x93NUMPY"

# A Path has lost one of a URL's slashes; with one slash alone, only what is commonly a URL counts as one.
_URL = re.compile(
    r"\s*([a-z][a-z0-9+.-]+://|(https?|ftps?|sftp|s3a?|gs|gcs|hf|az|abfss?|hdfs|ssh|git|file):/|data:|blob:)",
    re.IGNORECASE,
)
MOST_QUOTED = 255
MOST_QUOTED_OF_URL = 2000  # signed ones are long
MOST_BYTES = 1 << 30  # of an open file, which may unpack what it holds
CHUNK = 1 << 24

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_regular_file(path: str | Path) -> Path:
    """Return the path of a regular file, the only kind that is ever opened: a pipe or a device may never end.

    Raises:
        ImageNotFoundError: nothing is there, or something else: a folder, pipe, socket, device, or a URL.
    """
    shown = quoted(path)
    try:
        mode = Path(path).stat().st_mode
    except ValueError:
        raise ImageNotFoundError(f"{shown} holds a NUL character: no file has such a name") from None
    except OSError as error:
        raise ImageNotFoundError(_unreachable(path, shown, error)) from None
    if stat.S_ISDIR(mode):
        raise ImageNotFoundError(f"{shown} is a folder: pass the images in it")
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "no file")
        raise ImageNotFoundError(f"{shown} is {kind}: only regular files are opened, save its content to one first")
    return Path(path)


def _unreachable(path: str | Path, shown: str, error: OSError) -> str:
    if _is_url(path):
        return f"{_url(path)} is a URL: download it first, then pass the path of the file or its bytes"
    if error.errno == errno.ELOOP:
        return f"{shown} is a symbolic link that leads back to itself"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if Path(path).is_symlink():
            return f"{shown} is a symbolic link to {quoted(Path(path).readlink())}, which does not exist"
        return f"{shown} does not exist"
    return f"{shown} cannot be reached: {error.strerror or error}"


def quoted(path: str | Path, most: int = MOST_QUOTED) -> str:
    """Return a path as one line of a message: escaped if it would not print, shortened if it is too long to read."""
    text = str(path)
    if not text.isprintable():
        text = ascii(text)
    return text if len(text) <= most else f"{text[:40]}…{text[-20:]} ({len(text):,} letters)"


def check_no_url(text: str) -> None:
    """Refuse a URL where the path of a file is expected.

    Raises:
        ImageNotFoundError: it is one.
    """
    if _is_url(text):
        require_regular_file(text)


def _is_url(path: str | Path) -> bool:
    return _URL.match(str(path)) is not None


def _url(path: str | Path) -> str:
    """The URL as it was typed."""
    text = str(path)
    if re.match(r"\s*(data|blob):", text, re.IGNORECASE):
        return quoted(text)
    if isinstance(path, Path):
        scheme, rest = text.split(":/", 1)
        text = f"{scheme}://{'/' if scheme.lower() == 'file' else ''}{rest.removeprefix('/')}"
    return quoted(text, MOST_QUOTED_OF_URL)


def formats() -> list[str]:
    """Return the formats that are decoded here: Pillow may come without the last of them."""
    return [name for name in _SIGNATURES if name not in _OPTIONAL or features.check(_OPTIONAL[name])]


def check_format(prefix: bytes, name: str, error: type[ImageError | CallError], advice: str = "") -> None:
    """Refuse a file by how it begins, before any decoder sees it.

    Args:
        prefix: the first :data:`PREFIX` bytes.
        name: of the file, in the message.
        error: what is raised.
        advice: the end of the message.
    """
    if prefix[4:12] in (b"ftypmif1", b"ftypmsf1"):
        # A general container: the brands that follow say what is in it.
        prefix = prefix[:8] + (b"avif" if b"avif" in prefix[12:64] or b"avis" in prefix[12:64] else b"heic")
    if _named(prefix, {known: _SIGNATURES[known] for known in formats()}) is not None:
        return
    decoded = f"the formats that are decoded are {', '.join(formats())}"
    # What follows the byte order mark or an empty line is what a decoder would look at.
    other = _named(prefix, _SIGNATURES) or _named(prefix.removeprefix(b"\xef\xbb\xbf").lstrip(), _OTHERS)
    if other is None:
        other = _named(prefix, _OTHERS)
    if not prefix:
        message = f"{name} is an empty file"
    elif other is not None:
        message = f"{name} is a {other} file: {decoded}"
    elif _is_text(prefix):
        message = f"{name} is not an image in any format that Pillow reads"
    else:
        message = f"{name} is not an image in a known format: {decoded}"
    raise error(message + advice)


def check_decoder(pillow_format: str | None, name: str) -> None:
    """Refuse a header that was read by a decoder of another format than the file's beginning announced."""
    if pillow_format is not None and pillow_format not in _PILLOW_NAMES:
        raise ImageError(
            f"{name} is an image of format {pillow_format}: the formats that are decoded are {', '.join(formats())}"
        )


def _named(prefix: bytes, signatures: dict[str, tuple[bytes, ...]]) -> str | None:
    for name, beginnings in signatures.items():
        for beginning in beginnings:
            start = prefix[: len(beginning)]
            if len(start) == len(beginning) and all(
                a == b or b == ord("?") for a, b in zip(start, beginning, strict=True)
            ):
                return name
    return None


def _is_text(prefix: bytes) -> bool:
    return all(32 <= byte < 127 or byte in b"\t\n\r\f" for byte in prefix)


def read_binary_file(file: Any) -> bytes:
    """Return what is left to read of an open binary file, which stands afterwards where it stood before.

    Raises:
        CallError: it was opened as text, is closed, may never end, or has nothing left.
    """
    if isinstance(file, io.TextIOBase):
        raise CallError("the file is open as text: open it in binary mode, open(path, 'rb')")
    if _may_never_end(file):
        raise CallError("the open file is a pipe, socket or device, which may never end: pass the bytes you read")
    try:
        start = file.tell() if hasattr(file, "seekable") and file.seekable() else None
        parts, total = [], 0
        while total <= MOST_BYTES and (part := _next_part(file)):
            parts.append(part)
            total += len(part)
        if start is not None:
            file.seek(start)
    except Exception as error:
        raise CallError(f"the open file cannot be read ({first_line(error)}): pass its path or its bytes") from None
    if not parts:
        raise CallError("the open file has nothing left to read: go back to its start with seek(0), or pass its path")
    if not all(isinstance(part, bytes | bytearray | memoryview) for part in parts):
        raise CallError("the file is open as text: open it in binary mode, open(path, 'rb')")
    if total > MOST_BYTES:
        raise CallError(f"the open file holds more than {MOST_BYTES >> 30} GiB: pass the path of an image file")
    return b"".join(parts)


def _next_part(file: Any) -> Any:
    try:
        return file.read(CHUNK)
    except TypeError:  # a reader of its own kind, which takes no size
        return file.read()


def _may_never_end(file: Any) -> bool:
    try:
        return not stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (AttributeError, OSError, ValueError, TypeError):
        return False  # in memory, or inside an archive
