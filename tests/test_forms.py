"""Forms of data as users have them: read where they are the field's own, else refused by what they are."""

import gzip
import io
import pickle
import struct
import sys
import zlib

import numpy as np
import pytest
from pictures import drawn, png, pngs, write_parquet, write_tar, write_zip
from PIL import Image

from pixseq import progress
from pixseq.data.decode import to_bytes
from pixseq.data.images import Reader
from pixseq.data.preparation import Preparation
from pixseq.data.sources import open_source
from pixseq.errors import PixseqError, UsageError
from pixseq.stages import encode, palette


def read(path, split="train", size=8, **asked):
    """First pixels, labels and class names."""
    source = open_source(str(path), split, bit_depth=asked.get("bit_depth"), on_error=asked.get("on_error", "fail"))
    batches = list(Reader(source, Preparation(size=size, **asked)))
    labels = np.concatenate([b.labels for b in batches]).tolist() if source.has_labels else None
    return np.concatenate([b.images[:, 0, 0, 0] for b in batches]).tolist(), labels, source.class_names


def refuses(path, match, hint="", split="train", **asked):
    with pytest.raises(PixseqError, match=match) as caught:
        read(path, split, **asked)
    assert hint in (caught.value.hint or ""), caught.value.hint


# --------------------------------------------------------------------------------------------------------------- zip


def test_a_zip_of_pictures_is_read_like_a_folder(tmp_path):
    names = ["photos/dog/b.png", "photos/cat/a.png", "photos/cat/c.png", "__MACOSX/photos/cat/._a.png"]
    write_zip(tmp_path / "x.zip", zip([*names, "photos/read.me"], [*pngs(4), b"x"]))
    assert read(tmp_path / "x.zip") == ([1, 2, 0], [0, 0, 1], ["cat", "dog"])
    assert "passed over 1 name " in "\n".join(open_source(str(tmp_path / "x.zip")).notes)
    (tmp_path / "sub").mkdir()
    (tmp_path / "x.zip").rename(tmp_path / "sub/x.zip")
    assert read(tmp_path / "sub") == ([1, 2, 0], [0, 0, 1], ["cat", "dog"])
    of_windows = [f"{split}\\{name}\\a.png" for split in ("train", "dev") for name in ("cat", "dog")]
    write_zip(tmp_path / "y.zip", zip(of_windows, pngs(4)))
    assert read(tmp_path / "y.zip", "dev") == ([2, 3], [0, 1], ["cat", "dog"])
    write_zip(tmp_path / "z.zip", zip(["../../a.png", "/b.png"], pngs(2)))
    assert read(tmp_path / "z.zip") == ([0, 1], None, None)


def test_zips_that_cannot_be_read_are_named(tmp_path):
    file = tmp_path / "x.zip"
    write_zip(file, [("train_data_batch_1", b"x")])
    refuses(file, "holds no pictures, but train_data_batch_1", "unpack it")
    write_zip(file, [("a.docx", b"x")])
    refuses(file, "holds no pictures, but a.docx")
    write_zip(file, zip(["a.png"], pngs(1)))
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    refuses(file, "is damaged")
    place = whole.index(b"IDAT")
    file.write_bytes(whole[: place + 6] + bytes([whole[place + 6] ^ 1]) + whole[place + 7 :])
    refuses(file, r"x\.zip: a\.png is damaged: Bad CRC-32")
    (tmp_path / "two").mkdir()
    for name in "ab":
        write_zip(tmp_path / f"two/{name}.zip", zip(["a.png"], pngs(1)))
    refuses(tmp_path / "two", r"holds 2 zips: a\.zip, b\.zip", "name one")


def test_a_member_of_a_zip_may_not_declare_more_than_a_picture(tmp_path, monkeypatch):
    from pixseq.data import zips

    write_zip(tmp_path / "x.zip", [("a.png", bytes(3000))])
    monkeypatch.setattr(zips, "MAX_MEMBER_BYTES", 2000)
    refuses(tmp_path / "x.zip", r"a\.png declares 3000 bytes")


# ------------------------------------------------------------------------------------------------ what is named only

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    "name, content, said, hint",
    [
        ("x.parquet", POINTER, "is a Git LFS pointer", "git lfs pull"),
        ("x.tar", POINTER, "is a Git LFS pointer", "git lfs pull"),
        ("x.npz", b"/annex/objects/MD5E-s1--0.npz\n", "is a git-annex pointer", "git annex get"),
        ("x.zip", b"<html><body>", "is a web page", "login"),
        ("x.7z", b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "unpack"),
        ("x.h5", b"\x89HDF\r\n\x1a\n", "is HDF5", "npz"),
        ("x.tfrecord-00000-of-00002", b"\x10\x00\x00", "is TFRecord", "parquet"),
        ("x-train.arrow", b"\xff\xff\xff\xff\x10", "is an Arrow file", r"x-train.arrow').to_parquet('x-train.parquet"),
        ("x.npy.gz", gzip.compress(b"\x93NUMPY"), "is compressed with gzip", "unpack"),
        ("x.pkl", pickle.dumps({}, 2), "is a pickle, which is not read", "npz"),
        ("list.txt", b"a.png\n", "is a table or text", "SOURCE -"),
        ("list.TSV", b"a.png\t1\n", "is a table or text", "SOURCE -"),
        ("x.npz", b"", "it is empty", "again"),
    ],
)
def test_a_file_is_refused_by_what_it_is(tmp_path, name, content, said, hint):
    file = tmp_path / "data" / name
    file.parent.mkdir()
    file.write_bytes(content)
    refuses(file, said, hint)
    if not name.startswith("list."):
        refuses(tmp_path, said, hint)


def test_pictures_that_are_pointers_are_named(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        (tmp_path / label / "0.jpg").write_bytes(POINTER)
    refuses(tmp_path, r"0\.jpg: it is a Git LFS pointer.*git lfs pull")


def test_what_datasets_saved_to_disk(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / "train" / name).write_text("{}")
    (tmp_path / "train/data-00000-of-00001.arrow").write_bytes(b"x")
    refuses(tmp_path, "save_to_disk", "load_from_disk")
    refuses(tmp_path / "train", "save_to_disk", "to_parquet")


def test_a_folder_of_other_files_holds_no_pictures_whether_or_not_one_is_empty(tmp_path):
    (tmp_path / "__init__.py").touch()
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    refuses(tmp_path, "holds no pictures")


def test_a_cache_of_downloads_is_read_by_its_names(tmp_path):
    cache = tmp_path / "datasets--x--y"
    write_parquet(cache / "blobs/0", {"image": pngs(2)})
    (cache / "snapshots/abc/data").mkdir(parents=True)
    (cache / "snapshots/abc/data/test-0-of-1.parquet").symlink_to(cache / "blobs/0")
    source = open_source(str(tmp_path), "test")
    assert (source.name, source.split, source.count) == ("parquet", "test", 2)


def test_a_file_of_torch_save(tmp_path):
    write_zip(tmp_path / "x.pt", [("x/data.pkl", b""), ("x/version", b"3")])
    refuses(tmp_path / "x.pt", "is a file of torch.save, which is not read", "npz")


def test_several_configurations_or_sources_in_a_folder(tmp_path):
    for name in ("small", "big"):
        write_parquet(tmp_path / f"hub/{name}/train-00000-of-00001.parquet", {"image": pngs(2)})
    refuses(tmp_path / "hub", "holds 2 configurations of a data set: big, small", "hub/big")
    write_tar(tmp_path / "all/shards/0.tar", zip(["a.png"], pngs(1)))
    write_parquet(tmp_path / "all/table/x.parquet", {"image": pngs(2)})
    refuses(tmp_path / "all", r"holds 2 sources: shards \(tar\), table \(parquet\)", "all/shards")


def test_a_torchvision_root(tmp_path):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for split, first in (("train", 0), ("t10k", 2)):
        images = drawn(4)[first : first + 2, :, :, 0]
        head = bytes((0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 8, 0, 0, 0, 8))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 2, 1, 0)))
    assert read(tmp_path)[:2] == ([0, 1], [1, 0]) and read(tmp_path, "test")[:2] == ([2, 3], [1, 0])


# ------------------------------------------------------------------------------------------------- its own published


@pytest.mark.parametrize("nested", [False, True])
def test_downsampled_imagenet_in_pickles(tmp_path, nested):
    rows = drawn(22).transpose(0, 3, 1, 2).reshape(22, -1)
    folders = [tmp_path / name if nested else tmp_path for name in ("Imagenet8_train", "Imagenet8_val")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    for i in range(11):
        name = f"train_data_batch_{i + 1}" if i < 10 else "val_data"
        part = slice(2 * i, 2 * i + 2)
        content = {"data": rows[part], "labels": [i + 1, 1000], "mean": rows.mean(0)}
        (folders[i == 10] / name).write_bytes(pickle.dumps(content, 2 + i % 3))
    labels = [label for i in range(10) for label in (i, 999)]
    assert read(tmp_path) == (list(range(20)), labels, None)
    assert read(tmp_path, "val") == ([20, 21], [10, 999], None)
    source = open_source(str(tmp_path))
    assert [list(p.labels) for p in source.read(3, 6)] == [[999], [2, 999]]
    (folders[0] / "train_data_batch_4").unlink()
    refuses(tmp_path, "it lacks train_data_batch_4")
    assert len(read(tmp_path, on_error="skip")[0]) == 18
    (folders[1] / "val_data").write_bytes(pickle.dumps({"data": rows[:2], "labels": [0, 1]}))
    refuses(tmp_path, "val_data has 2 images, but labels .* from 0", split="val")


def test_downsampled_imagenet_of_few_images_counts_from_1_in_npz_too(tmp_path):
    np.savez(tmp_path / "val_data.npz", data=drawn(2).transpose(0, 3, 1, 2).reshape(2, -1), labels=np.array([1, 7]))
    assert read(tmp_path, "val")[1] == [0, 6]


def test_paths_in_parquet_are_relative_to_the_file(tmp_path):
    file = tmp_path / "set/train.parquet"
    for i, data in enumerate(pngs(3)):
        (tmp_path / "set/imgs").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"set/imgs/{i}.png").write_bytes(data)
    paths = ["imgs/2.png", "imgs/0.png"]
    write_parquet(file, {"image": [{"bytes": None, "path": path} for path in paths], "label": [1, 0]})
    assert read(file)[:2] == ([2, 0], [1, 0])
    write_parquet(file, {"image": [{"bytes": pngs(2)[1], "path": "gone.png"}, {"bytes": None, "path": paths[0]}]})
    assert read(file)[0] == [1, 2]
    write_parquet(file, {"file_name": paths, "label": [1, 0]})
    assert read(file)[:2] == ([2, 0], [1, 0])
    write_parquet(file, {"file_name": [*paths, "imgs/gone.png"]})
    refuses(file, r"row 2 \(imgs/gone\.png\): No such file")
    assert read(file, on_error="skip")[0] == [2, 0]
    for path in ("../secret.png", str(tmp_path / "set/imgs/0.png"), "https://example.org/a.png", "imgs/../../a.png"):
        write_parquet(file, {"image": [{"bytes": None, "path": path}]})
        refuses(file, "outside the parquet file's folder", "below that folder")


def test_lists_of_one_picture_in_parquet(tmp_path):
    file = tmp_path / "x.parquet"
    write_parquet(file, {"images": [[{"bytes": data, "path": None}] for data in pngs(2)], "label": [0, 1]})
    assert read(file)[:2] == ([0, 1], [0, 1])
    write_parquet(file, {"images": [[pngs(1)[0]], [*pngs(2)]]})
    refuses(file, "row 1 has 2 pictures, where one is meant", "--on-error skip")
    assert read(file, on_error="skip")[0] == [0]


@pytest.mark.parametrize("form", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_of_paths_as_windows_writes_them(tmp_path, monkeypatch, form, end):
    names = [str(tmp_path / name) for name in ("ä b.png", "c.png")]
    for name, data in zip(names, pngs(2)):
        with open(name, "wb") as file:
            file.write(data)
    data = "".join(name + end for name in names).encode(form)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read("-")[0] == [0, 1]


def test_what_systems_leave_is_no_path_on_stdin(tmp_path, monkeypatch):
    names = [".cache/0.png", "thumbs/1.png", "@eaDir/2.png", "._3.png"]
    for name, data in zip(names, pngs(4)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    data = "\n".join(str(tmp_path / name) for name in names).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    source = open_source("-")
    assert source.count == 2 and "passed over 2 names" in source.notes[0]


# ------------------------------------------------------------------------------------------------ HEIC, AVIF, ranges


def test_what_is_not_read_beside_pictures_is_passed_over(tmp_path):
    pictures = tmp_path / "images/cat"
    pictures.mkdir(parents=True)
    (pictures / "0.png").write_bytes(pngs(1)[0])
    (tmp_path / "boxes").mkdir()
    for name in ("labels.mat", "boxes/0.mat"):
        (tmp_path / name).write_bytes(b"MATLAB 5.0 MAT-file" + bytes(600))
    assert open_source(str(tmp_path)).count == 1
    (pictures / "0.png").unlink()
    refuses(tmp_path, "is a MATLAB file", "save its arrays")


def test_heic_names_its_extra_and_other_files_stay_a_note(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.png").write_bytes(png(drawn(1)[0]))
    (tmp_path / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50))
    (tmp_path / "c.MOV").write_bytes(b"\0\0\0\x14ftypqt  \0\0\0\0qt  " + bytes(50))
    refuses(tmp_path, r"b\.HEIC: it is HEIC.*pip install pillow-heif", "--on-error skip")
    assert read(tmp_path, on_error="skip")[0] == [0]
    assert "c.MOV" in open_source(str(tmp_path)).notes[0]


def test_heic_is_read_through_the_plugin(tmp_path):
    import pillow_heif

    pillow_heif.register_heif_opener()
    Image.new("RGB", (64, 64), (200, 200, 200)).save(tmp_path / "a.heic", quality=95)
    assert abs(read(tmp_path)[0][0] - 200) < 4


def test_avif_is_read(tmp_path):
    Image.new("RGB", (64, 64), (200, 200, 200)).save(tmp_path / "a.avif", quality=95)
    assert abs(read(tmp_path)[0][0] - 200) < 4


def wide(folder, bits, suffix=".png"):
    folder.mkdir()
    values = np.linspace(0, (1 << bits) - 1, 64).astype(np.uint16).reshape(8, 8)
    for i in range(2):
        Image.fromarray(values).save(folder / f"{i}{suffix}")
    return values


def test_to_bytes_rounds_the_range_to_255():
    for bits in (1, 8, 10, 12, 14, 16):
        values = np.unique(np.linspace(0, (1 << bits) - 1, 5000).astype(np.uint16))
        exact = values.astype(float) * 255 / ((1 << bits) - 1)
        np.testing.assert_allclose(to_bytes(values, bits), exact, atol=0.5001)


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_pictures_that_use_fewer_bits_are_noticed_and_scaled(tmp_path, capsys, monkeypatch, bits, suffix):
    monkeypatch.setattr(progress, "_enabled", True)
    values = wide(tmp_path / "x", bits, suffix)
    encode.run(str(tmp_path / "x"), tmp_path / "dark.zarr", scheme="gray", size=8)
    assert f"--bit-depth {bits} scales them right" in capsys.readouterr().err
    record = encode.run(str(tmp_path / "x"), tmp_path / "right.zarr", scheme="pixels", size=8, bit_depth=bits)
    assert "note" not in capsys.readouterr().err and record["config"]["bit_depth"] == bits
    rows = next(iter(Reader(open_source(str(tmp_path / "x")), Preparation(size=8, bit_depth=bits)))).images
    np.testing.assert_array_equal(rows[0, :, :, 0], np.rint(values.astype(float) * 255 / ((1 << bits) - 1)))
    refuses(tmp_path / "x", f"beyond --bit-depth {bits - 1}", bit_depth=bits - 1)
    palette.run_fit(str(tmp_path / "x"), tmp_path / "p.json", colors=2, size=8)
    assert f"--bit-depth {bits}" in capsys.readouterr().err


def test_16_bit_pictures_of_full_range_and_8_bit_ones_say_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_enabled", True)
    wide(tmp_path / "x", 16)
    (tmp_path / "x/8bit.png").write_bytes(png(drawn(1)[0]))
    encode.run(str(tmp_path / "x"), tmp_path / "t.zarr", scheme="gray", size=8)
    assert "note" not in capsys.readouterr().err


def test_colours_of_16_bits_keep_their_upper_byte_and_are_noticed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_enabled", True)
    values = np.full((8, 8, 3), 4000, ">u2")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/0.png").write_bytes(png_of_16_bits(values))
    encode.run(str(tmp_path / "x"), tmp_path / "t.zarr", scheme="gray", size=8)
    assert "--bit-depth 12" in capsys.readouterr().err
    refuses(tmp_path / "x", "of 16-bit colours", bit_depth=12)


def png_of_16_bits(values):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_the_bits_of_arrays(tmp_path):
    values = np.linspace(0, 4095, 128).astype(np.uint16).reshape(2, 8, 8)
    np.save(tmp_path / "x.npy", values)
    assert "--bit-depth 12" in open_source(str(tmp_path / "x.npy")).notes[0]
    source = open_source(str(tmp_path / "x.npy"), bit_depth=12)
    rows = next(iter(Reader(source, Preparation(size=8, bit_depth=12)))).images[..., 0]
    np.testing.assert_array_equal(rows, np.rint(values.astype(float) * 255 / 4095))
    refuses(tmp_path / "x.npy", "beyond --bit-depth 10", bit_depth=10)
    np.save(tmp_path / "x.npy", values // 16)
    refuses(tmp_path / "x.npy", "stay below 256", "--bit-depth 8")
    assert read(tmp_path / "x.npy", bit_depth=8)[0][0] == 0


def test_pictures_above_the_limit_need_a_flag(tmp_path):
    large = tmp_path / "large.pgm"
    with open(large, "wb") as file:
        file.write(b"P5 10000 9000 255\n")
        file.truncate(18 + 10000 * 9000)
    refuses(large, r"90,000,000|89,478,485|64,000,000", "with --max-pixels, or pass over")
    assert read(large, max_pixels=90_000_000)[0] == [0]
    with open(large, "wb") as file:
        file.write(b"P5 8000 9000 255\n")
        file.truncate(17 + 8000 * 9000)
    refuses(
        large, "8000 x 9000 pixels are more than the 64,000,000 allowed", "with --max-pixels 72000000, or pass over"
    )
    with pytest.raises(UsageError, match="--max-pixels"):
        Preparation(max_pixels=0)
