"""The GGUF reader: against the gguf package on sound files, and on 500 damaged ones."""

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGUFValueType

from tessera.errors import FileFormatError, NotFoundError
from tessera.formats.gguf import open_gguf

from .mutations import guarded, mutations


@pytest.fixture
def sound(tmp_path):
    """A small file with every kind of metadata value, and tensors of several types."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "sound.gguf", "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int16("a.i16", -5)
    writer.add_uint64("a.u64", 2**63)
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 1e300)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "grüße")
    writer.add_array("a.strings", ["", "ab", "日本"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_key_value("a.nested", [[1, 2], [3]], GGUFValueType.ARRAY, GGUFValueType.ARRAY)
    values = {"x": rng.normal(size=(3, 5)).astype(np.float32), "y": rng.normal(size=(7,)).astype(np.float16)}
    for name, value in values.items():
        writer.add_tensor(name, value)
    rows = rng.normal(size=(4, 64)).astype(np.float32)
    packed = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("z", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "sound.gguf", values | {"z": gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)}


def test_metadata_and_tensors_of_a_sound_file(sound):
    path, values = sound
    with open_gguf(path) as file:
        metadata = dict(file.metadata)
        assert metadata.pop("a.nested") == [[1, 2], [3]]
        assert metadata == {
            "general.architecture": "llama", "a.u8": 200, "a.i16": -5, "a.u64": 2**63, "a.f32": 0.5, "a.f64": 1e300,
            "a.bool": True, "a.text": "grüße", "a.strings": ["", "ab", "日本"], "a.numbers": [1, -2, 3]}
        assert {name: info.shape for name, info in file.tensors.items()} == {"x": (3, 5), "y": (7,), "z": (4, 64)}
        for name, value in values.items():
            assert torch.equal(file.tensor(name), torch.from_numpy(value.astype(np.float32)))
        with pytest.raises(NotFoundError, match="no tensor 'w' among 3"):
            file.tensor("w")


@pytest.mark.parametrize("seed", [1])
def test_damaged_files_load_intact_or_are_refused(sound, tmp_path, seed):
    path, values = sound
    data = path.read_bytes()
    with open_gguf(path) as file:
        infos = dict(file.tensors)
    start = min(info.offset for info in infos.values())
    refused = 0
    with guarded():
        for i, damaged in enumerate(mutations(data, start, 500, seed)):
            (tmp_path / "damaged.gguf").write_bytes(damaged)
            try:
                with open_gguf(tmp_path / "damaged.gguf") as file:
                    read = {name: file.tensor(name) for name in file.tensors}
                    same = [n for n in read if n in infos and (file.tensors[n].shape, file.tensors[n].type)
                            == (infos[n].shape, infos[n].type)]
            except FileFormatError:
                refused += 1
                continue
            for name in same:
                info = infos[name]
                if damaged[info.offset : info.offset + info.nbytes] == data[info.offset : info.offset + info.nbytes]:
                    expected = torch.from_numpy(values[name].astype(np.float32))
                    assert torch.equal(read[name], expected), (i, name)
    assert refused > 250


def header(tensors=0, keys=0, version=3, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value):
    return struct.pack("<Q", len(value)) + value


def entry(name=b"t", dims=(32,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize("data, names", [
    (b"", "at least 24"),
    (b"GGML" + bytes(40), "starts with"),
    (header(version=1), "version 1 given"),
    (header(version=3 << 24), "big-endian"),
    (header(tensors=2**63), "needs"),
    (header(keys=10**6), "needs"),
    (header(keys=1, rest=struct.pack("<Q", 2**62) + bytes(40)), "at most 65535"),
    (header(keys=1, rest=text(b"k") + struct.pack("<IQ", 8, 2**40)), "needs|allowed"),
    (header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 0, 2**50)), "needs"),
    (header(keys=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 2**50)), "needs"),
    (header(keys=1, rest=text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 40), "deeper than 4"),
    (header(keys=1, rest=text(b"k") + struct.pack("<IB", 7, 2)), "neither 0 nor 1"),
    (header(keys=1, rest=text(b"k") + struct.pack("<I", 77) + bytes(8)), "value type 77"),
    (header(keys=1, rest=text(b"\xff") + struct.pack("<IB", 0, 2)), "not UTF-8"),
    (header(keys=2, rest=(text(b"k") + struct.pack("<IB", 0, 2)) * 2), "stands twice"),
    (header(keys=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 48)), "power of two"),
    (header(tensors=2, rest=entry() * 2 + bytes(600)), "stands twice"),
    (header(tensors=1, rest=entry(dims=(2,) * 9) + bytes(600)), "at most 4"),
    (header(tensors=1, rest=entry(dims=(2**32, 2**32, 2**32)) + bytes(600)), "past the end"),
    (header(tensors=1, rest=entry(dims=(0,)) + bytes(600)), "dims"),
    (header(tensors=1, rest=entry(dims=(33,), kind=8) + bytes(600)), "multiple of 32"),
    (header(tensors=1, rest=entry(kind=999) + bytes(600)), "unknown type 999"),
    (header(tensors=1, rest=entry(offset=32) + bytes(600)), "expected 0"),
    (header(tensors=2, rest=entry() + entry(b"u", offset=64) + bytes(600)), "expected 128"),
    (header(tensors=1, rest=entry() + bytes(100)), "cut short"),
])
def test_each_check(tmp_path, data, names):
    (tmp_path / "x.gguf").write_bytes(data)
    with guarded(), pytest.raises(FileFormatError, match=names):
        open_gguf(tmp_path / "x.gguf")


def test_a_file_that_shrinks_after_it_was_opened(sound):
    path, _ = sound
    with open_gguf(path) as file:
        with open(path, "r+b") as stream:
            stream.truncate(file.tensors["z"].offset + 10)
        with pytest.raises(FileFormatError, match="ends at byte"):
            file.tensor("z")
