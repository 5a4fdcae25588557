"""Image files: which files are opened, and which formats are decoded."""

import errno
import importlib.util
import io
import os
import re
import stat
import zlib
from pathlib import Path
from typing import Any

from PIL import features

from vitscope.errors import CallError, ImageError, ImageNotFoundError, first_line

# The formats that are decoded, and how their files begin ("?" is any byte). Nothing else reaches a decoder, because
# Pillow on its own would also run Ghostscript, whatever the suffix of the file.
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
# Medical formats, decoded by the packages of the extra "medical". A DICOM file may begin as any other file.
_MEDICAL: dict[str, tuple[bytes, ...]] = {
    "DICOM": (b"?" * 128 + b"DICM",),
    "NIfTI": (
        *(size + b"?" * 340 + b"n+1\0" for size in (b"\x5c\x01\0\0", b"\0\0\x01\x5c")),
        *(size + b"n+2\0\r\n\x1a\n" for size in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")),
    ),
}
_PACKAGES = {"DICOM": "pydicom", "NIfTI": "nibabel"}
_GZIP = b"\x1f\x8b"
_PILLOW_NAMES = {"PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"}
_OPTIONAL = {"WebP": "webp", "JPEG 2000": "jpg_2000", "AVIF": "avif"}

# Other formats that users may pass, by their name in the message.
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
PREFIX = 512  # bytes that are searched for a signature
NPY = b"\x93NUMPY"

# A pathlib.Path drops one of a URL's slashes. With a single slash, only common schemes count as a URL.
_URL = re.compile(
    r"\s*([a-z][a-z0-9+.-]+://|(https?|ftps?|sftp|s3a?|gs|gcs|hf|az|abfss?|hdfs|ssh|git|file):/|data:|blob:)",
    re.IGNORECASE,
)
MAX_QUOTE = 255  # characters of a path in a message
MAX_URL_QUOTE = 2000  # characters of a URL in a message: signed URLs are long
MAX_BYTES = 1 << 30  # bytes read from an open file, which may decompress its content
CHUNK = 1 << 24  # bytes per read

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_regular_file(path: str | Path) -> Path:
    """Return the path of a regular file. No other file is opened, because reading a pipe or device may never end.

    Raises:
        ImageNotFoundError: ``path`` does not exist, or is a folder, pipe, socket, device or URL.
    """
    name = quoted_path(path)
    try:
        mode = Path(path).stat().st_mode
    except ValueError:
        raise ImageNotFoundError(f"{name} contains a NUL character: no file has such a name") from None
    except OSError as error:
        raise ImageNotFoundError(_missing_message(path, name, error)) from None
    if stat.S_ISDIR(mode):
        raise ImageNotFoundError(f"{name} is a folder: pass the images in it")
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "not a regular file")
        raise ImageNotFoundError(f"{name} is {kind}: only regular files are opened, save its content to one first")
    return Path(path)


def _missing_message(path: str | Path, name: str, error: OSError) -> str:
    if _is_url(path):
        return f"{_quoted_url(path)} is a URL: download it first, then pass the path of the file or its bytes"
    if error.errno == errno.ELOOP:
        return f"{name} is a symbolic link that leads back to itself"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if Path(path).is_symlink():
            return f"{name} is a symbolic link to {quoted_path(Path(path).readlink())}, which does not exist"
        return f"{name} does not exist"
    return f"{name} cannot be reached: {error.strerror or error}"


def quoted_path(path: str | Path, limit: int = MAX_QUOTE) -> str:
    """Return a path for a message, escaped if it is not printable, shortened if it exceeds ``limit`` characters."""
    text = str(path)
    if not text.isprintable():
        text = ascii(text)
    return text if len(text) <= limit else f"{text[:40]}…{text[-20:]} ({len(text):,} characters)"


def check_no_url(text: str) -> None:
    """Refuse a URL, because the path of a file is expected.

    Raises:
        ImageNotFoundError: ``text`` is a URL.
    """
    if _is_url(text):
        require_regular_file(text)


def _is_url(path: str | Path) -> bool:
    return _URL.match(str(path)) is not None


def _quoted_url(path: str | Path) -> str:
    """Return a URL for a message, as it was typed."""
    text = str(path)
    if re.match(r"\s*(data|blob):", text, re.IGNORECASE):
        return quoted_path(text)
    if isinstance(path, Path):
        scheme, rest = text.split(":/", 1)
        text = f"{scheme}://{'/' if scheme.lower() == 'file' else ''}{rest.removeprefix('/')}"
    return quoted_path(text, MAX_URL_QUOTE)


def formats() -> list[str]:
    """Return the formats that are decoded on this machine; Pillow may be installed without some of them.

    DICOM and NIfTI need the extra ``medical``.

    Examples:
        >>> formats()[:3]
        ['PNG', 'JPEG', 'WebP']
    """
    decoded = [name for name in _SIGNATURES if name not in _OPTIONAL or features.check(_OPTIONAL[name])]
    return decoded + [name for name, package in _PACKAGES.items() if importlib.util.find_spec(package)]


def medical_format_or_none(prefix: bytes) -> str | None:
    """Return ``"DICOM"`` or ``"NIfTI"`` if a file that begins like this is one, also one compressed by gzip."""
    if prefix.startswith(_GZIP):
        try:
            prefix = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(prefix, PREFIX)
        except zlib.error:
            return None
        return _format_of(prefix, {"NIfTI": _MEDICAL["NIfTI"]})
    return _format_of(prefix, _MEDICAL)


def check_format(prefix: bytes, name: str, error: type[ImageError | CallError], advice: str = "") -> None:
    """Refuse a file that does not begin like a supported format, before any decoder sees it.

    Args:
        prefix: the first :data:`PREFIX` bytes of the file.
        name: name of the file, for the message.
        error: class of the error to raise.
        advice: end of the message, by default none.

    Raises:
        CallError, ImageError: the format is not supported; ``error`` chooses between the two.
    """
    if prefix[4:12] in (b"ftypmif1", b"ftypmsf1"):
        # This is a general container; the brands that follow name the format.
        prefix = prefix[:8] + (b"avif" if b"avif" in prefix[12:64] or b"avis" in prefix[12:64] else b"heic")
    decoded = {kind: _SIGNATURES[kind] for kind in formats() if kind in _SIGNATURES}
    if _format_of(prefix, decoded) is not None:
        return
    supported = f"supported formats are {', '.join(formats())}"
    # A decoder would skip a byte order mark and empty lines.
    kind = _format_of(prefix, _SIGNATURES) or _format_of(prefix.removeprefix(b"\xef\xbb\xbf").lstrip(), _OTHERS)
    if kind is None:
        kind = _format_of(prefix, _OTHERS)
    if not prefix:
        message = f"{name} is an empty file"
    elif kind is not None:
        message = f"{name} is a {kind} file: {supported}"
    elif _is_text(prefix):
        message = f"{name} is not an image in any format that Pillow reads"
    else:
        message = f"{name} is not an image in a known format: {supported}"
    raise error(message + advice)


def check_decoder(pillow_format: str | None, name: str) -> None:
    """Refuse an image that Pillow opened with the decoder of an unsupported format.

    Raises:
        ImageError: the decoder's format is not supported.
    """
    if pillow_format is not None and pillow_format not in _PILLOW_NAMES:
        raise ImageError(f"{name} is an image of format {pillow_format}: supported formats are {', '.join(formats())}")


def _format_of(prefix: bytes, signatures: dict[str, tuple[bytes, ...]]) -> str | None:
    """Return the format whose signature the bytes begin with."""
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
    """Return the rest of an open binary file, and restore its position.

    Raises:
        CallError: the file was opened as text, is closed, may never end, has nothing left, or is too large.
    """
    if isinstance(file, io.TextIOBase):
        raise CallError("the file is open as text: open it in binary mode, open(path, 'rb')")
    if _may_never_end(file):
        raise CallError("the open file is a pipe, socket or device, which may never end: pass the bytes you read")
    try:
        position = file.tell() if hasattr(file, "seekable") and file.seekable() else None
        chunks, total = [], 0
        while total <= MAX_BYTES and (chunk := _next_chunk(file)):
            chunks.append(chunk)
            total += len(chunk)
        if position is not None:
            file.seek(position)
    except Exception as error:
        raise CallError(f"the open file cannot be read ({first_line(error)}): pass its path or its bytes") from None
    if not chunks:
        raise CallError("the open file has nothing left to read: go back to its start with seek(0), or pass its path")
    if not all(isinstance(chunk, bytes | bytearray | memoryview) for chunk in chunks):
        raise CallError("the file is open as text: open it in binary mode, open(path, 'rb')")
    if total > MAX_BYTES:
        raise CallError(f"the open file holds more than {MAX_BYTES >> 30} GiB: pass the path of an image file")
    return b"".join(chunks)


def _next_chunk(file: Any) -> Any:
    try:
        return file.read(CHUNK)
    except TypeError:  # an object whose read() takes no size
        return file.read()


def _may_never_end(file: Any) -> bool:
    try:
        return not stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (AttributeError, OSError, ValueError, TypeError):
        return False  # a file in memory, or inside an archive
