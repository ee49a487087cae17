"""Sources of pictures and of palette ids, for fuzz.py: a sound example of each, read as encode reads it."""

import gzip
import pickle
import zipfile

import numpy as np
from pictures import drawn, pngs, write_parquet, write_tar
from PIL import Image

LIMIT = "--size 2 --limit 20"


def reading(path, line=None):
    """What reads the source at `path` of a folder, and the command lines that do."""

    def read(folder):
        from pixseq.data.images import Reader
        from pixseq.data.preparation import Preparation
        from pixseq.data.sources import TokenSource, open_any
        from pixseq.data.token_files import TokenReader

        found = open_any(str(folder / path))
        if isinstance(found, TokenSource):
            for _ in TokenReader(found, 16, limit=20):
                pass
            return
        for _ in Reader(found, Preparation(size=2), limit=20):
            pass

    return read, line or f"encode HERE/{path} --scheme gray --on-error skip {LIMIT} -o OUT"


def npy(folder, kept):
    np.save(folder / "x.npy", drawn(4))
    np.save(folder / "y.npy", np.arange(4))
    return reading("x.npy")


def npz(folder, kept):
    np.savez_compressed(folder / "a.npz", x_train=drawn(4), y_train=np.array(["a", "b", "a", "c"]))
    return reading("a.npz")


def idx(folder, kept):
    for name, values in (("train-images-idx3-ubyte", drawn(3)[..., 0]), ("train-labels-idx1-ubyte", np.arange(3))):
        sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
        (folder / name).write_bytes(bytes((0, 0, 8, values.ndim)) + sizes + values.astype(np.uint8).tobytes())
    return reading(".")


def idx_gz(folder, kept):
    idx(folder, kept)
    for path in list(folder.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return reading(".")


def webdataset(folder, kept):
    members = [(f"{i}.{end}", data) for i, png in enumerate(pngs(3)) for end, data in (("png", png), ("cls", b"1"))]
    write_tar(folder / "a.tar", [*members, ("3.json", b'{"label": 2, "x": [1]}'), ("3.png", pngs(1)[0])])
    return reading("a.tar")


def webdataset_json(folder, kept):
    """With a table of contents beside the shards, and labels by a column of JSON."""
    for shard in range(2):
        members = [
            (f"{i}.{end}", data)
            for i, png in enumerate(pngs(2))
            for end, data in (("png", png), ("json", b'{"label": "%d"}' % i))
        ]
        write_tar(folder / f"train-{shard:04d}.tar", members)
    return reading(".")


def webdataset_gz(folder, kept):
    write_tar(folder / "a.tar.gz", [(f"{i}.png", png) for i, png in enumerate(pngs(3))], "w:gz")
    return reading("a.tar.gz")


def parquet(folder, kept):
    write_parquet(folder / "a.parquet", {"image": pngs(3), "label": ["a", "b", "a"]})
    return reading("a.parquet")


def parquet_of_a_hub(folder, kept):
    """With a struct of bytes and path, and what Hugging Face's datasets tell of it."""
    import json

    names = {"names": ["a", "b"], "_type": "ClassLabel"}
    told = {"info": {"features": {"image": {"_type": "Image"}, "label": names}}}
    images = [{"bytes": png, "path": f"{i}.png"} for i, png in enumerate(pngs(3))]
    metadata = {"huggingface": json.dumps(told)}
    (folder / "data").mkdir()
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", {"image": images, "label": [0, 1, 0]}, metadata)
    return reading(".")


def zipped(folder, kept):
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, png in enumerate(pngs(3)):
            archive.writestr(f"{'ab'[i % 2]}/{i}.png", png)
    return reading("a.zip")


def pictures(folder, kept):
    """A folder of class folders of several formats, depths and orientations."""
    for i, end in enumerate(("png", "jpg", "gif", "webp", "bmp", "tiff", "ppm")):
        path = folder / "ab"[i % 2] / f"{i}.{end}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(drawn(9)[i]).save(path)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "a" / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(drawn(2)[1]).save(folder / "b" / "turned.jpg", exif=exif)
    line = f"palette fit HERE --colors 2 --on-error skip {LIMIT.replace('limit', 'max-images')} -o OUT"
    return *reading("."), line


def cifar(folder, kept):
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2], "filenames": ["a", "b"]}
        (folder / name).write_bytes(pickle.dumps(batch, 2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}, 2))
    return reading(".")


def cifar_binary(folder, kept):
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (folder / name).write_bytes(bytes(3073 * 2))
    (folder / "batches.meta.txt").write_text("\n".join(f"c{i}" for i in range(10)) + "\n")
    return reading(".")


def cifar_tar(folder, kept):
    inside = kept / "cifar"
    inside.mkdir()
    cifar(inside, kept)
    members = [(f"cifar-10-batches-py/{path.name}", path.read_bytes()) for path in sorted(inside.iterdir())]
    write_tar(folder / "cifar-10-python.tar.gz", members, "w:gz")
    return reading("cifar-10-python.tar.gz")


def downsampled(folder, kept):
    rows = drawn(22, side=4).transpose(0, 3, 1, 2).reshape(22, -1)
    for i in range(11):
        name = f"train_data_batch_{i + 1}" if i < 10 else "val_data"
        part = slice(2 * i, 2 * i + 2)
        content = {"data": rows[part], "labels": [i + 1, 1000], "mean": rows.mean(0)}
        (folder / name).write_bytes(pickle.dumps(content, 2 + i % 3))
    return reading(".")


def stl10(folder, kept):
    for split in ("train", "test"):
        (folder / f"{split}_X.bin").write_bytes(bytes(2 * 3 * 96 * 96))
        (folder / f"{split}_y.bin").write_bytes(bytes((1, 10)))
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    (folder / "fold_indices.txt").write_text("0 1")
    return reading(".")


def palette_ids(folder, kept):
    np.save(folder / "cifar10_trX.npy", np.random.default_rng(0).integers(0, 16, (6, 16)))
    np.save(folder / "cifar10_trY.npy", np.eye(10, dtype=np.float32)[np.arange(6)])
    return reading(".", "encode HERE --size 4 -o OUT")


def palette_ids_in_one_file(folder, kept):
    from pixseq.artifacts.palette import save_palette

    save_palette(kept / "p.json", np.random.default_rng(0).uniform(-1, 1, (16, 3)), "palette fit", {}, {}, {})
    np.save(folder / "x.npy", np.asfortranarray(np.random.default_rng(0).integers(0, 16, (6, 16), np.int32)))
    return reading("x.npy", "encode HERE/x.npy --palette KEPT/p.json --size 4 -o OUT")


KINDS = (
    npy, npz, idx, idx_gz, webdataset, webdataset_json, webdataset_gz, parquet, parquet_of_a_hub, zipped, pictures,
    cifar, cifar_binary, cifar_tar, downsampled, stl10, palette_ids, palette_ids_in_one_file,
)  # fmt: skip
