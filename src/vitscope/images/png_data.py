"""Detection of PNG files whose image data end before the last row, although the file itself is complete."""

import struct
import zlib
from io import BufferedIOBase

import numpy as np
from PIL import Image

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type

# (first column, first row, step across, step down) of each pass.
SEQUENTIAL = ((0, 0, 1, 1),)
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def rows_missing(image: Image.Image, stream: BufferedIOBase) -> bool:
    """Return whether a PNG's data end before the last row. Pillow fills missing rows with zeros, without an error.

    The data are counted only if the last row is blank or the file is interlaced: any other last row was in the file.
    """
    if image.format != "PNG":
        return False
    last = image.crop((0, image.height - 1, image.width, image.height))
    if not image.info.get("interlace") and np.asarray(last).any():
        return False
    return _data_end_early(stream)


def _data_end_early(stream: BufferedIOBase) -> bool:
    """Return whether a PNG holds fewer bytes of image data than its header requires."""
    stream.seek(8)
    decompressor, count, expected = zlib.decompressobj(), 0, 0
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        data = stream.read(length)
        stream.read(4)  # the checksum
        if kind == b"IHDR":
            expected = _data_length(data)
        elif kind == b"IDAT":
            while data and not decompressor.eof and count < expected:
                count += len(decompressor.decompress(data, 1 << 20))
                data = decompressor.unconsumed_tail
        elif kind == b"IEND" or count >= expected > 0:
            break
    return count < expected


def _data_length(header: bytes) -> int:
    """Return the number of bytes of decompressed image data that a PNG header requires."""
    width, height, depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", header[:13])
    bits = depth * CHANNELS[colour_type]
    total = 0
    for left, top, across, down in ADAM7 if interlaced else SEQUENTIAL:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        total += rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
    return total
