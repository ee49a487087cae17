"""Small drawn pictures, and sources of them, as tests write them."""

import io
import tarfile
import zipfile

import numpy as np
from PIL import Image


def drawn(count, side=8):
    """Pictures [count, side, side, 3] of one grey each, so that the first pixel tells which one it is."""
    return np.repeat(np.arange(count, dtype=np.uint8), side * side * 3).reshape(count, side, side, 3)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pngs(count):
    return [png(pixels) for pixels in drawn(count)]


def write_tar(file, members, mode="w"):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_zip(file, members):
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members:
            archive.writestr(name, data)


def write_parquet(file, columns, metadata=None):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns)
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=3)
