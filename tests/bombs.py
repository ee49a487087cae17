"""Small files that ask for gigabytes, and what must refuse them: run under a hard limit of the address space.

    python tests/bombs.py FOLDER      all of them, a line of JSON each

`BOMBS` maps a name to a function that makes the files in a folder and returns the call that meets them.
"""

import json
import resource
import sys
from pathlib import Path

from pixseq.errors import PixseqError

MOST = 1 << 30  # bytes beside what the program itself takes
BOMBS = {}


def bomb(make):
    BOMBS[make.__name__] = make
    return make


def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def store(folder, **options):
    from conftest import write_tokens

    return write_tokens(folder / "t.zarr", count=8, **options)


def model(folder, **changes):
    """A checkpoint of a tiny Image GPT, untrained."""
    import dataclasses

    from pixseq.artifacts.checkpoint import finish_checkpoint
    from pixseq.artifacts.codec import Codec
    from pixseq.models.family import build
    from pixseq.models.igpt import IgptShape

    shape = IgptShape(n_layer=2, n_head=2, d_model=8, n_vocab=16, n_ctx=36)
    palette = [[0.0, 0.0, x / 16] for x in range(16)]
    codec = Codec("palette", 6, 6, 16, palette, "sha256:one", class_names=list("abcd"))
    weights = {name: x.clone().fill_(0.01) for name, x in build(shape).state_dict().items()}
    folder.mkdir(parents=True)
    finish_checkpoint(folder, {"model": weights}, dataclasses.asdict(shape), codec, "pretrain", {}, {}, {}, {})
    return folder


def opened(path):
    from pixseq.engine.image_store import open_images, read_all

    return lambda: read_all(open_images(path, "tokens"))


# ---- artifacts


@bomb
def rows_without_chunks(folder):
    path = store(folder)
    for name in ("tokens", "labels"):
        edit(path / name / "zarr.json", lambda found: found["shape"].__setitem__(0, 10**9))
    return opened(path)


@bomb
def rows_without_chunks_verified(folder):
    from pixseq.stages import show

    opened_path = rows_without_chunks(folder)
    del opened_path
    return lambda: show.run(folder / "t.zarr", verify=True)


@bomb
def a_chunk_of_gigabytes(folder):
    path = store(folder)
    for name in ("tokens", "labels"):
        edit(
            path / name / "zarr.json",
            lambda found: found["chunk_grid"]["configuration"]["chunk_shape"].__setitem__(0, 10**9),
        )
    return opened(path)


@bomb
def a_chunk_that_unfolds(folder):
    from numcodecs import Zstd

    path = store(folder)
    chunk = path / "tokens" / "c" / "0" / "0"
    run = b"\x02\x00\x10" + b"\0"  # 128 KiB of one byte, of Zstandard
    chunk.write_bytes(Zstd().encode(b"")[:4] + b"\x00\x38" + run * 40_000 + b"\x03\x00\x10\0")
    return opened(path)


@bomb
def a_chunk_that_declares_gigabytes(folder):
    path = store(folder)
    chunk = path / "tokens" / "c" / "0" / "0"
    chunk.write_bytes(b"\x28\xb5\x2f\xfd\xe0" + (8 << 30).to_bytes(8, "little") + b"\x03\x00\x10\0")
    return opened(path)


@bomb
def aliases(folder):
    from pixseq.config import PretrainFile, effective

    lines = ["about:", "  a: &a [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"  {chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]" for i in range(8)]
    (folder / "c.yaml").write_text("\n".join([*lines, "train:", "  lr: *i", ""]))
    return lambda: effective(PretrainFile, file=folder / "c.yaml")


@bomb
def a_manifest_that_has_no_end(folder):
    from pixseq.artifacts import manifest

    with (folder / "manifest.json").open("wb") as file:
        file.write(b'{"kind": "')
        file.truncate(8 << 30)  # a hole: nothing on the disk
    return lambda: manifest.read(folder)


@bomb
def a_log_that_has_no_end(folder):
    from pixseq.artifacts.metrics import read_log

    with (folder / "log.jsonl").open("wb") as file:
        file.truncate(8 << 30)
    return lambda: read_log(folder / "log.jsonl")


@bomb
def a_palette_that_promises(folder):
    from pixseq.artifacts.palette import load_palette

    (folder / "p.npy").write_bytes(npy_header((10**10, 3), "<f8") + bytes(48))
    return lambda: load_palette(folder / "p.npy")


def npy_header(shape, dtype, fortran=False):
    text = repr({"descr": dtype, "fortran_order": fortran, "shape": tuple(shape)}).encode()
    text += b" " * (-(11 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


# ---- sources of pictures


def encoded(path, limit=5, **options):
    """All pictures of a source, as encode reads them."""
    from pixseq.data.images import Reader
    from pixseq.data.preparation import Preparation
    from pixseq.data.sources import open_source

    def read():
        source = open_source(str(path), **options)
        return [len(batch.images) for batch in Reader(source, Preparation(size=2), limit=limit)]

    return read


def npz(path, **members):
    """Of each member its first bytes and how many zeros follow."""
    import zipfile

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, (head, zeros) in members.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                file.write(head)
                for _ in range(zeros >> 20):
                    file.write(bytes(1 << 20))
                file.write(bytes(zeros % (1 << 20)))
    return path


SMALL = (2, 8, 8)
LARGE = 72 << 20  # bytes: gigabytes would take seconds to write, and the caps lie below


@bomb
def npz_class_names(folder):
    names = (npy_header((1,), f"<U{LARGE >> 2}"), LARGE)
    pictures = (npy_header(SMALL, "|u1"), 128)
    return encoded(npz(folder / "a.npz", x=pictures, y=(npy_header((2,), "|u1"), 2), class_names=names))


@bomb
def npz_header(folder):
    head = b"\x93NUMPY\x02\x00" + (1 << 31).to_bytes(4, "little")
    return encoded(npz(folder / "a.npz", x=(head, 1 << 20)))


@bomb
def npz_labels(folder):
    count = 17 << 20
    pictures = (npy_header((count, 2, 2), "|u1"), 4 * count)
    return encoded(npz(folder / "a.npz", x=pictures, y=(npy_header((count,), "<i8"), 8 * count)))


@bomb
def npz_texts(folder):
    count = 6 << 20
    pictures = (npy_header((count, 2, 2), "|u1"), 4 * count)
    return encoded(npz(folder / "a.npz", x=pictures, y=(npy_header((count,), "<U2"), 8 * count)))


@bomb
def npz_in_fortran_order(folder):
    count = 110_000
    return encoded(npz(folder / "a.npz", x=(npy_header((count, 50, 50), "|u1", fortran=True), 2500 * count)))


@bomb
def npz_that_declares(folder):
    import zipfile

    path = npz(folder / "a.npz", x=(npy_header(SMALL, "|u1"), 128))
    with zipfile.ZipFile(path) as archive:
        real = archive.getinfo("x.npy").file_size
    data, declared = path.read_bytes(), (4 << 30) - 2
    path.write_bytes(data.replace(real.to_bytes(4, "little"), declared.to_bytes(4, "little")))
    return encoded(path)


@bomb
def a_picture_beyond_the_cap(folder):
    with (folder / "a.npy").open("wb") as file:
        file.write(npy_header((1, 11_000, 11_000), "<u2"))
        file.truncate(file.tell() + 2 * 11_000**2)
    return encoded(folder / "a.npy")


@bomb
def idx_labels(folder):
    import gzip

    count = (1 << 31) - 1
    head = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (count, 2, 2))
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(1 << 20)))
    head = bytes((0, 0, 8, 1)) + count.to_bytes(4, "big")
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + bytes(1 << 20)))
    return encoded(folder)


def tar_header(name, size, kind=b"0"):
    import tarfile

    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def tar_gz(path, *parts):
    """Of bytes, and of numbers of zeros."""
    import zlib

    packed = zlib.compressobj(1, zlib.DEFLATED, 31)
    with path.open("wb") as file:
        for part in parts:
            if isinstance(part, int):
                for _ in range(part >> 20):
                    file.write(packed.compress(bytes(1 << 20)))
                part = bytes(part % (1 << 20))
            file.write(packed.compress(part))
        file.write(packed.flush())
    return path


@bomb
def tar_records(folder):
    return encoded(tar_gz(folder / "a.tar.gz", tar_header("PaxHeader", 2 << 30, b"x"), 1 << 20))


@bomb
def tar_long_name(folder):
    return encoded(tar_gz(folder / "a.tar.gz", tar_header("././@LongLink", 2 << 30, b"L"), 1 << 20))


@bomb
def tar_json_label(folder):
    from pictures import pngs

    picture = pngs(1)[0]
    padded = picture + bytes(-len(picture) % 512)
    label = b"[" + b"[]," * (2 << 20) + b"0]"
    label += bytes(-len(label) % 512)
    parts = tar_header("a.png", len(picture)), padded, tar_header("a.json", len(label)), label, 1024
    return encoded(tar_gz(folder / "a.tar.gz", *parts))


@bomb
def tar_of_reversed_batches(folder):
    size, parts = 3073 * 30_000, []
    for number in (3, 2, 1):
        parts += [tar_header(f"data_batch_{number}.bin", size), size + -size % 512]
    return encoded(tar_gz(folder / "a.tar.gz", *parts, 1024), None, on_error="skip")


@bomb
def cifar_memo(folder):
    import pickle

    (folder / "data_batch_1").write_bytes(b"\x80\x02}r" + (1 << 29).to_bytes(4, "little") + b".")
    (folder / "test_batch").write_bytes(pickle.dumps({}, 2))
    return encoded(folder)


@bomb
def cifar_calls(folder):
    """One list of a megabyte, made over and over from the same bytes."""
    made = b"\x80\x02](cbuiltins\nlist\nq\x01" + b"B" + (1 << 20).to_bytes(4, "little") + bytes(1 << 20)
    made += b"\x85q\x02R" + b"h\x01h\x02R" * 1000 + b"e."
    (folder / "data_batch_1").write_bytes(made)
    return encoded(folder)


def hollow(path, size, head=b""):
    """A file that has its bytes in a hole: nothing on the disk."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


@bomb
def a_pickle_of_a_hole(folder):
    hollow(folder / "train_data_batch_1", 1_700_000_000, b"\x80\x02B" + (1_600_000_000).to_bytes(4, "little"))
    return encoded(folder, on_error="skip")


@bomb
def labels_of_a_hole(folder):
    hollow(folder / "train_X.bin", 27648 * (200 << 20))
    hollow(folder / "train_y.bin", 200 << 20)
    return encoded(folder)


@bomb
def a_list_of_lines(folder):
    (folder / "images").mkdir()
    (folder / "images.txt").write_bytes(b"1 a\n" * (3 << 20))
    (folder / "train_test_split.txt").write_bytes(b"1 1\n" * (3 << 20))
    return encoded(folder)


@bomb
def one_hot_labels_of_a_hole(folder):
    from pixseq.data.sources import open_source

    ids = npy_header((4096, 16), "<i4")
    hollow(folder / "cifar10_trX.npy", len(ids) + 4096 * 64, ids)
    labels = npy_header((4096, 1 << 20), "|u1")
    hollow(folder / "cifar10_trY.npy", len(labels) + (4096 << 20), labels)
    return lambda: open_source(str(folder)).classes()


@bomb
def ids_of_a_hole(folder):
    from pixseq.data.sources import open_source

    ids = npy_header((4, 1 << 30), "<i4")
    hollow(folder / "cifar10_trX.npy", len(ids) + (16 << 30), ids)
    return lambda: open_source(str(folder))


@bomb
def weights_of_a_hole(folder):
    from pixseq.artifacts.checkpoint import read_weights

    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 4 << 30]}}).encode()
    hollow(folder / "w.safetensors", 8 + len(header) + (4 << 30), len(header).to_bytes(8, "little") + header)
    return lambda: read_weights(folder / "w.safetensors")


@bomb
def parquet_dictionary(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    once = pa.array([bytes(16 << 20)], pa.binary())
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), once)
    table = pa.table({"image": rows, "label": pa.array([0] * 256)})
    whole = {"store_schema": False, "dictionary_pagesize_limit": 64 << 20}
    pq.write_table(table, folder / "a.parquet", compression="zstd", **whole)
    return encoded(folder / "a.parquet")


@bomb
def parquet_rows(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": pa.nulls(1 << 21, pa.binary())}), folder / "a.parquet")
    return encoded(folder / "a.parquet")


# ---- weights


def hf_config(folder, **changes):
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 1024, "n_positions": 64, "vocab_size": 1_000_001}
    (folder / "config.json").write_text(json.dumps({"model_type": "imagegpt", **sizes, **changes}))


@bomb
def torch_strides_of_zero(folder):
    import torch

    from pixseq.interop.huggingface import read_hf

    hf_config(folder)
    once = torch.zeros(1)
    shapes = {"wte.weight": (1_000_001, 1024), "wpe.weight": (64, 1024), "ln_f.weight": (1024,)}
    torch.save(
        {f"transformer.{name}": once.as_strided(shape, [0] * len(shape)) for name, shape in shapes.items()},
        folder / "pytorch_model.bin",
    )
    return lambda: read_hf(folder)


@bomb
def torch_views_of_one(folder):
    """Each within what is stored, and all of them together far beyond it."""
    import torch

    from pixseq.interop.huggingface import read_hf

    hf_config(folder)
    stored = torch.zeros(1 << 18)
    torch.save({f"h.{i}": stored.view(512, 512) for i in range(4000)}, folder / "pytorch_model.bin")
    return lambda: read_hf(folder)


@bomb
def torch_calls(folder):
    import pickle

    import torch

    from pixseq.interop.files import load_tensors

    class Bytes:
        def __reduce__(self):
            return bytearray, (8 << 30,)

    with (folder / "a.bin").open("wb") as file:
        pickle.dump({"a": Bytes()}, file, protocol=2)
    torch.save({"a": Bytes()}, folder / "b.bin")
    return lambda: load_tensors(folder / "b.bin")


@bomb
def a_state_of_strides(folder):
    import torch

    from pixseq.artifacts.checkpoint import load_state

    (folder / "resume").mkdir()
    once = torch.zeros(1).as_strided((40_000, 40_000), (0, 0))
    torch.save({"model": {"w": once}}, folder / "resume" / "state.pt")
    return lambda: load_state(folder)


@bomb
def a_state_that_calls(folder):
    import torch

    from pixseq.artifacts.checkpoint import load_state

    class Bytes:
        def __reduce__(self):
            return bytearray, (8 << 30,)

    (folder / "resume").mkdir()
    torch.save({"model": Bytes()}, folder / "resume" / "state.pt")
    return lambda: load_state(folder)


@bomb
def empty_tensors(folder):
    from pixseq.interop.huggingface import read_hf

    hf_config(folder)
    one = ",".join(f'"{i:x}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(120_000))
    header = f"{{{one}}}".encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return lambda: read_hf(folder)


@bomb
def a_shape_of_no_model(folder):
    from pixseq.engine.opening import open_model
    from pixseq.runtime import machine

    path = model(folder / "m")
    edit(path / "manifest.json", lambda found: found["summary"]["shape"].update(n_layer=1000, d_model=1 << 16))

    def read():
        with machine("cpu", "fp32") as where:
            open_model(path, where)

    return read


# ---- extractors of other programs


def extracted(folder, *nodes, **options):
    import torch
    from exports import write

    from pixseq.interop.torch_export import open_exported

    path = write(folder / "a.pt2", *nodes, **options)
    return lambda: open_exported(path).features(torch.rand(2, 3, 6, 6))


def export_bomb(make):
    """Of a function that returns the nodes of a graph."""

    def whole(folder):
        return extracted(folder, *make())

    whole.__name__ = make.__name__
    return bomb(whole)


def last(name):
    """Nodes that make of any tensor [B, D], so that nothing but its size is wrong."""
    from exports import call, ints, tensor

    small = call("sum.dim_IntList", "s", tensor("x"), ints(1, 2), False)
    return [call("sum.default", "z", tensor(name)), small, call("add.Tensor", "y", tensor("s"), tensor("z"))]


SIZES = {
    "zeros.default": ("zeros.default", [40_000, 40_000]),
    "full.default": ("full.default", [1 << 33], 0.5),
    "arange.default": ("arange.default", 10**10),
    "eye.default": ("eye.default", 60_000),
    "expand.default": ("expand.default", "one", [10**5, 10**5]),
    "repeat.default": ("repeat.default", "flat", [10**10]),
    "tile.default": ("tile.default", "flat", [10**10]),
    "constant_pad_nd.default": ("constant_pad_nd.default", "flat", [0, 10**10]),
    "pad.default": ("pad.default", "flat", [0, 10**10]),
    "one_hot.default": ("one_hot.default", "whole", 10**10),
    "repeat_interleave.self_int": ("repeat_interleave.self_int", "flat", 10**10),
    "repeat_interleave.Tensor": ("repeat_interleave.Tensor", "many"),
    "cat.default": ("cat.default", {"as_tensors": [{"name": "large"}] * 400}),
    "tril_indices.default": ("tril_indices.default", 60_000, 60_000),
    "upsample_nearest2d.default": ("upsample_nearest2d.default", "x", [60_000, 60_000]),
    "new_zeros.default": ("new_zeros.default", "x", [1 << 33]),
    "outer.default": ("outer.default", "line", "line"),
    "cosine_similarity.default": ("cosine_similarity.default", "rows", "columns", 2),
    "kron.default": ("kron.default", "line", "line"),
    "diag_embed.default": ("diag_embed.default", "line"),
    "unbind.int": ("unbind.int", "large"),
    "split.Tensor": ("split.Tensor", "large", 1),
}


def sized(name):
    def make(folder):
        from exports import call, tensor

        target, *args = SIZES[name]
        args = [tensor(each) if isinstance(each, str) else each for each in args]
        nodes = [
            call("reshape.default", "flat", tensor("x"), [-1]),
            call("sum.default", "one", tensor("x")),
            call("zeros.default", "line", [100_000]),
            call("zeros.default", "large", [10_000_000]),
            call("reshape.default", "rows", tensor("line"), [100_000, 1, 1]),
            call("reshape.default", "columns", tensor("line"), [1, 100_000, 1]),
            call("full.default", "many", [1], 10**10, dtype={"as_scalar_type": 5}),
            call("_to_copy.default", "whole", tensor("flat"), dtype={"as_scalar_type": 5}),
        ]
        made = ["v"] if target in ("unbind.int", "split.Tensor") else "v"
        return extracted(folder, *nodes, call(target, made, *args), *last("v"))

    make.__name__ = "an_export_of_" + name.removesuffix(".default").replace(".", "_")
    return bomb(make)


for name in SIZES:
    sized(name)


@export_bomb
def an_export_that_keeps_many():
    from exports import call, tensor

    nodes = [call("zeros.default", f"a{i}", [10_000_000]) for i in range(100)]
    nodes += [call("add.Tensor", "v" if i == 0 else f"b{i}", tensor("a0"), tensor(f"a{i}")) for i in range(100)]
    return [*nodes, *last("v")]


@export_bomb
def an_export_that_unfolds():
    """A convolution in float64, which torch writes out as a matrix."""
    from exports import call, tensor

    double = {"as_scalar_type": 8}
    return [
        call("zeros.default", "p", [1, 16, 256, 256], dtype=double),
        call("zeros.default", "w", [1, 16, 65, 65], dtype=double),
        call("conv2d.default", "v", tensor("p"), tensor("w"), {"as_none": True}, [1, 1], [32, 32]),
        *last("v"),
    ]


@export_bomb
def an_export_that_squares_a_number():
    from exports import call, tensor

    def number(name):
        return {"as_sym_int": {"as_name": name}}

    nodes = [call("sym_size.int", "n0", tensor("x"), 2)]
    nodes[0]["outputs"] = [number("n0")]
    nodes += [call("_operator.mul", f"n{i + 1}", number(f"n{i}"), number(f"n{i}")) for i in range(40)]
    return [*nodes, call("mul.Tensor", "v", tensor("x"), tensor("x")), *last("v")]


@export_bomb
def an_export_that_multiplies_a_text():
    from exports import call, tensor

    return [call("_operator.mul", "n", "x" * 100, 1 << 28), call("alias.default", "v", tensor("x")), *last("v")]


@export_bomb
def an_export_of_wide_rows():
    from exports import call

    return [call("zeros.default", "y", [2, 40_000_000])]


@bomb
def an_export_of_one_number(folder):
    return extracted(folder, *last("w"), weights=[("w", [40_000, 40_000], [0, 0], bytes(4))])


@bomb
def an_export_that_is_packed(folder):
    import zipfile

    data = bytes(256 << 20)
    return extracted(folder, *last("w"), weights=[("w", [64 << 20], [1], data)], compress=zipfile.ZIP_DEFLATED)


@bomb
def an_export_of_one_file_many_times(folder):
    import zipfile

    import torch
    from exports import write

    from pixseq.interop.torch_export import open_exported

    weights = [(f"w{i}", [1 << 20], [1], bytes(4 << 20) if not i else b"") for i in range(400)]
    path = write(folder / "a.pt2", *last("w0"), weights=weights)
    with zipfile.ZipFile(path) as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for each, data in members.items():
            archive.writestr(
                each, data.replace(b'"weight_', b'"weight_0", "was": "') if each.endswith("config.json") else data
            )

    def read():
        open_exported(path).features(torch.rand(2, 3, 6, 6))
        raise PixseqError("it is read, and held once")

    return read


# ---- features of other programs


def compared(path):
    from pixseq.stages import frechet

    return lambda: frechet.run(path, path)


def foreign(folder, **options):
    import zarr

    path = folder / "a.zarr"
    zarr.create_array(path, shape=(4, 64), dtype="float32", **options)[:] = 1
    return path


@bomb
def foreign_rows_without_chunks(folder):
    path = foreign(folder, chunks=(4, 64), zarr_format=2)
    edit(path / ".zarray", lambda found: found["shape"].__setitem__(0, 10**8))
    return compared(path)


@bomb
def a_foreign_chunk_of_gigabytes(folder):
    path = foreign(folder, chunks=(4, 64), zarr_format=2)
    edit(path / ".zarray", lambda found: found["chunks"].__setitem__(0, 10**8))
    return compared(path)


@bomb
def a_foreign_chunk_that_unfolds(folder):
    import zlib

    path = foreign(folder, chunks=(4, 64), zarr_format=2)
    edit(path / ".zarray", lambda found: found.update(compressor={"id": "zlib", "level": 1}, filters=None))
    packed = zlib.compressobj(1)
    data = b"".join(packed.compress(bytes(1 << 20)) for _ in range(2048)) + packed.flush()
    (path / "0.0").write_bytes(data)
    return compared(path)


@bomb
def a_foreign_chunk_that_declares(folder):
    path = foreign(folder, chunks=(4, 64), zarr_format=2)
    edit(path / ".zarray", lambda found: found.update(filters=None))
    edit(
        path / ".zarray",
        lambda found: found.update(
            compressor={"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 0, "blocksize": 0}
        ),
    )
    size = (2 << 30) - (1 << 20)
    head = bytes((2, 1, 0x13, 4)) + size.to_bytes(4, "little") + size.to_bytes(4, "little") + (20).to_bytes(4, "little")
    (path / "0.0").write_bytes(head + bytes(4))
    return compared(path)


@bomb
def a_foreign_shard_that_unfolds(folder):
    from numcodecs import Zstd

    path = foreign(folder, chunks=(2, 64), shards=(4, 64))
    run = b"\x02\x00\x10" + b"\0"
    inner = Zstd().encode(b"")[:4] + b"\x00\x38" + run * 20_000 + b"\x03\x00\x10\0"
    index = b"".join(n.to_bytes(8, "little") for n in (0, len(inner)) * 2)
    import google_crc32c

    (path / "c" / "0" / "0").write_bytes(inner + index + google_crc32c.value(index).to_bytes(4, "little"))
    return compared(path)


@bomb
def features_of_a_hole(folder):
    header = npy_header((1 << 18, 1024), "<f4")
    hollow(folder / "a.npy", len(header) + (1 << 30), header)
    return compared(folder / "a.npy")


# ---- the run under the limit


def said(call):
    """The message of the PixseqError that is raised, and whether memory ran out on the way."""
    try:
        call()
    except PixseqError as error:
        chain, each = [], error
        while each is not None:
            chain.append(each)
            each = each.__cause__ or each.__context__
        return error.message, any(isinstance(each, MemoryError) or "alloc" in str(each) for each in chain)
    except BaseException as error:
        return f"not refused in words: {error!r}", True
    return "taken as it is", True


def main(folder):
    import torch  # noqa: F401 (what the program itself takes is taken before the limit)

    import pixseq.artifacts.arrays
    import pixseq.data.sources
    import pixseq.engine.opening
    import pixseq.models.family
    import pixseq.stages.show  # noqa: F401

    calls = {}
    for name, make in BOMBS.items():
        (folder / name).mkdir()
        calls[name] = make(folder / name)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MOST, taken + MOST))
    for name, call in calls.items():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        message, burst = said(call)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps({"name": name, "message": message, "burst": burst, "megabytes": grown >> 10}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
