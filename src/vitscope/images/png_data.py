"""PNG files whose image data end early, though the file itself is whole."""

import struct
import zlib
from io import BufferedIOBase

import numpy as np
from PIL import Image


def rows_missing(image: Image.Image, stream: BufferedIOBase) -> bool:
    """Return whether a PNG's data end before its last row: Pillow fills such rows with zeros and says nothing.

    The data are only counted if the last row is blank, or if the file is interlaced.
    """
    if image.format != "PNG":
        return False
    last = image.crop((0, image.height - 1, image.width, image.height))
    if not image.info.get("interlace") and np.asarray(last).any():
        return False
    return _png_data(stream)


def _png_data(stream: BufferedIOBase) -> bool:
    """Count the bytes of a PNG's image data against those that its header promises."""
    stream.seek(8)
    inflate, found, expected = zlib.decompressobj(), 0, 0
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        data = stream.read(length)
        stream.read(4)
        if kind == b"IHDR":
            expected = _promised(data)
        elif kind == b"IDAT":
            while data and not inflate.eof and found < expected:
                found += len(inflate.decompress(data, 1 << 20))
                data = inflate.unconsumed_tail
        elif kind == b"IEND" or found >= expected > 0:
            break
    return found < expected


def _promised(header: bytes) -> int:
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header[:13])
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    # (first column, first row, step across, step down) of each pass of Adam7.
    adam7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    total = 0
    for left, top, across, down in adam7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        total += rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
    return total
