"""Plain JPEG files, opened without taking their tables apart: Pillow does so in Python, and its decoder does it again.

Plain is one frame of 8 bits, grey or of three components, with nothing beside it that says how it is meant. Any other,
and any that is amiss, is left to Pillow's own reader (JFIF: ITU-T T.871; markers: ITU-T T.81, annex B).
"""

from __future__ import annotations

from typing import BinaryIO

from PIL import ImageFile

BEGIN = b"\xff\xd8\xff"
MOST_HEAD = 1 << 16  # bytes before the scan
FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, of Huffman's codes
SCAN, APP0 = 0xDA, 0xE0
PASSED = (0xC4, 0xDB, 0xDD, 0xFE, SCAN)  # tables, the interval of restarts, comments
MODES = {1: "L", 3: "RGB"}


class PlainJpeg(ImageFile.ImageFile):
    format = "JPEG"

    def _open(self) -> None:
        """Raises what Pillow takes for SyntaxError of any but a plain file."""
        assert self.fp is not None
        head, end, marker, frame = self.fp.read(MOST_HEAD), 2, 0, b""
        while marker != SCAN:
            marker, begin = head[end + 1], end + 4
            if head[end] != 0xFF:
                raise SyntaxError("no segment where one is due")
            end = begin - 2 + int.from_bytes(head[begin - 2 : begin])
            if not begin <= end <= len(head):
                raise SyntaxError("cut")
            if marker in FRAMES and not frame:
                frame = head[begin:end]
            elif marker not in PASSED and not (marker == APP0 and head.startswith(b"JFIF\0", begin, end - 9)):
                raise SyntaxError("a segment that may say more of the picture")
        precision, height, width = frame[0], int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
        if precision != 8:
            raise SyntaxError("not 8 bits")
        self._size, self._mode = (width, height), MODES[frame[5]]
        self.tile = [ImageFile._Tile("jpeg", (0, 0, width, height), 0, (self.mode, ""))]


def opened(file: BinaryIO) -> PlainJpeg | None:
    """A plain file from its beginning on; None, and it is there again: another."""
    try:
        return PlainJpeg(file)
    except SyntaxError:
        file.seek(0)
        return None
