"""The safetensors reader: against the safetensors package on sound files, and on 500 damaged ones."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from tessera.errors import FileFormatError, NotFoundError
from tessera.formats.json import parse_json_object, read_json_object
from tessera.formats.safetensors import open_safetensors

from .mutations import guarded, mutations


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    floats = {f"f{i}": torch.randn(3 + i, 5, generator=generator).to(dtype)
              for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64))}
    return floats | {"ints": torch.arange(7), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}


def test_tensors_of_a_sound_file(tmp_path):
    expected = tensors(0)
    save_file(expected, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with open_safetensors(tmp_path / "x.safetensors") as file:
        assert set(file.tensors) == set(expected)
        for name, value in expected.items():
            assert file.tensor(name).dtype == value.dtype and torch.equal(file.tensor(name), value)
            if value.is_floating_point():
                assert torch.equal(file.tensor(name, "bf16"), value.to(torch.bfloat16))
        with pytest.raises(NotFoundError, match="no tensor 'w'"):
            file.tensor("w")


@pytest.mark.parametrize("seed", [1])
def test_damaged_files_load_intact_or_are_refused(tmp_path, seed):
    expected = tensors(seed)
    path = tmp_path / "x.safetensors"
    save_file(expected, path)
    data = path.read_bytes()
    with open_safetensors(path) as file:
        infos = dict(file.tensors)
    start = 8 + struct.unpack_from("<Q", data)[0]
    refused = 0
    with guarded():
        for i, damaged in enumerate(mutations(data, start, 500, seed)):
            path.write_bytes(damaged)
            try:
                with open_safetensors(path) as file:
                    found = dict(file.tensors)
                    read = {name: file.tensor(name) for name in found}
            except FileFormatError:
                refused += 1
                continue
            for name in found.keys() & infos.keys():
                info = infos[name]
                if (found[name].shape, found[name].dtype) != (info.shape, info.dtype):
                    continue
                at = slice(info.offset, info.offset + info.nbytes)
                if damaged[at] == data[at]:
                    assert torch.equal(read[name], expected[name]), (i, name)
    assert refused > 250


def file_of(header, data=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(**changes):
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


@pytest.mark.parametrize("data, names", [
    (b"123", "at least 8"),
    (struct.pack("<Q", 2**63) + bytes(16), "announced"),
    (struct.pack("<Q", 100) + bytes(16), "announced"),
    (file_of(b"[" * 100_000), "not valid JSON"),
    (file_of(b"[]"), "expected an object"),
    (file_of(b"\xff\xfe"), "not valid JSON"),
    (file_of(b'{"a": 1, "a": 2}'), "'a' stands twice"),
    (file_of({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    (file_of({"a": {"dtype": "F32"}}), "exactly"),
    (file_of(one(dtype="F33")), "dtype 'F33'"),
    (file_of(one(dtype=["F32"])), "dtype"),
    (file_of(one(shape=[-4])), "sizes"),
    (file_of(one(shape=[True, 4])), "sizes"),
    (file_of(one(shape=[2**62, 2**62])), "does not fill"),
    (file_of(one(shape=[3])), "does not fill"),
    (file_of(one(data_offsets=[16, 0])), "does not fill"),
    (file_of(one(data_offsets=[16, 32])), "expected"),
    (file_of(one() | {"b": one()["a"]}), "expected"),
    (file_of(one(), bytes(15)), "cut short"),
    (file_of(one(), bytes(17)), "tensors end at"),
])
def test_each_check(tmp_path, data, names):
    (tmp_path / "x.safetensors").write_bytes(data)
    with guarded(), pytest.raises(FileFormatError, match=names):
        open_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("weight_map, names", [
    ({"a": "../x.safetensors"}, "not a plain file name"),
    ({"a": "/etc/passwd"}, "not a plain file name"),
    ({"a": 3}, "not a plain file name"),
    ({"a": ".."}, "not a plain file name|does not hold|shards missing"),
    ({}, "weight_map"),
    ({"b": "x.safetensors"}, "which does not hold it"),
])
def test_an_index_cannot_reach_outside_or_contradict(tmp_path, weight_map, names):
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises((FileFormatError, NotFoundError), match=names):
        open_safetensors(tmp_path)


def test_json_is_bounded(tmp_path):
    (tmp_path / "x.json").write_text('{"a": "' + "x" * 100 + '"}')
    assert read_json_object(tmp_path / "x.json")["a"] == "x" * 100
    with pytest.raises(FileFormatError, match="larger than 50 bytes"):
        read_json_object(tmp_path / "x.json", 50)
    with pytest.raises(FileFormatError, match="not valid JSON"):
        parse_json_object('{"a": ' + "9" * 5000 + "}", "x")
