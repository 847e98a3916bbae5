import hashlib
import json
import random
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tether.errors import CheckpointError, ShapeError
from tether.store.hashing import sha256_file
from tether.store.reader import CheckpointReader
from tether.store.writer import ShardWriter, write_safetensors


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(7)
    wide = torch.randn(6, 5, generator=generator)
    return {
        "embed.weight": wide.bfloat16(),
        "layer.0.weight": wide * 3,
        "layer.1.weight": wide.double() + 1,
        "layer.1.half": wide[:, :2].half(),
        "ids": torch.arange(11),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 3),
        "quantised": wide.to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
    }


def write_shards(folder, tensors, shard_bytes, metadata=None):
    folder.mkdir()
    with ShardWriter(folder, shard_bytes=shard_bytes, metadata=metadata) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return folder


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = [tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (actual, expected)]
    torch.testing.assert_close(*bits, rtol=0, atol=0)


def test_reads_what_safetensors_itself_reads(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "note": "x"})
    reader = CheckpointReader(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert reader.names == tuple(sorted(expected))
    assert reader.files == (tmp_path / "model.safetensors",)
    assert reader.metadata() == {"format": "pt", "note": "x"}
    for name, tensor in expected.items():
        assert_same_bits(reader.tensor(name), tensor)
        assert reader.shape(name) == tuple(tensor.shape)
    assert [
        reader.dtype(name) for name in ("embed.weight", "layer.0.weight", "ids", "flag", "quantised")
    ] == [
        "BF16",
        "F32",
        "I64",
        "BOOL",
        "F8_E4M3",
    ]


@pytest.mark.parametrize("shard_bytes", [1, 100, 250])
def test_reads_shards_as_one(tmp_path, tensors, shard_bytes):
    reader = CheckpointReader(write_shards(tmp_path / "m", tensors, shard_bytes, {"by": "test"}))
    assert len(reader.files) > 1
    assert reader.names == tuple(sorted(tensors))
    assert reader.metadata() == {"format": "pt", "by": "test"}
    for name, tensor in tensors.items():
        assert_same_bits(reader.tensor(name), tensor)


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (2, 3), (4, 4), (5, 6)])
def test_slice_is_the_rows_of_the_tensor(tmp_path, tensors, start, stop):
    reader = CheckpointReader(write_shards(tmp_path / "m", tensors, 100))
    for name in ("embed.weight", "layer.1.weight", "quantised"):
        assert_same_bits(reader.slice(name, start, stop), tensors[name][start:stop])


@pytest.mark.parametrize(
    ("name", "start", "stop"),
    [("ids", -1, 3), ("ids", 3, 12), ("ids", 4, 3), ("scalar", 0, 1), ("empty", 0, 1)],
)
def test_rows_that_are_not_there_are_refused(tmp_path, tensors, name, start, stop):
    reader = CheckpointReader(write_shards(tmp_path / "m", tensors, 100))
    with pytest.raises(ShapeError, match=rf"{name}.*expected.*shape\[0\]"):
        reader.slice(name, start, stop)


def test_tensors_do_not_depend_on_the_file_afterwards(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(1000), "v": torch.ones(1000)}, path)
    reader = CheckpointReader(path)
    whole, rows = reader.tensor("w"), reader.slice("v", 0, 10)
    with path.open("r+b") as file:
        file.seek(200)
        file.write(bytes(7800))
    torch.testing.assert_close(whole, torch.ones(1000))
    torch.testing.assert_close(rows, torch.ones(10))


def test_unknown_name_offers_similar_ones(tmp_path, tensors):
    reader = CheckpointReader(write_shards(tmp_path / "m", tensors, 10**6))
    for call in (reader.tensor, reader.shape, reader.dtype):
        with pytest.raises(CheckpointError, match=r"layer\.0\.wieght.*layer\.0\.weight"):
            call("layer.0.wieght")


def test_single_file_comes_before_an_index(tmp_path, tensors):
    folder = write_shards(tmp_path / "m", tensors, 1)
    save_file({"only": torch.zeros(1)}, folder / "model.safetensors")
    assert CheckpointReader(folder).names == ("only",)


def test_missing_file_and_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"does not exist.*Check the path"):
        CheckpointReader(tmp_path / "nothing.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"expected model\.safetensors or model\.safetensors\.index\.json"
    ):
        CheckpointReader(tmp_path)


def test_every_missing_shard_and_tensor_is_named_at_once(tmp_path, tensors):
    folder = write_shards(tmp_path / "m", tensors, 1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first, second, third = sorted(set(index["weight_map"].values()))[:3]
    (folder / first).unlink()
    (folder / second).unlink()
    (folder / third).write_bytes((folder / third).read_bytes()[:-1])
    whole = sorted(set(index["weight_map"].values()))[3]
    index["weight_map"] |= {"ghost.a": whole, "ghost.b": whole}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(folder)
    for part in (first, second, third, "ghost.a", "ghost.b", "Copy or download"):
        assert part in str(caught.value)


@pytest.mark.parametrize("absolute", [False, True])
def test_index_that_leads_out_of_the_folder(tmp_path, tensors, absolute):
    outside = tmp_path / "outside.safetensors"
    save_file(tensors, outside)
    (tmp_path / "m").mkdir()
    index = {"weight_map": {"ids": str(outside) if absolute else "../outside.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"shard \S*outside.safetensors lies outside the folder"):
        CheckpointReader(tmp_path / "m")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "b.s',
        "[" * 10**5,
    ],
)
def test_damaged_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="not the index of a sharded checkpoint"):
        CheckpointReader(tmp_path)


def test_shards_that_disagree_on_metadata(tmp_path):
    for name, by in (("a", "one"), ("b", "two")):
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors", metadata={"by": by})
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"by = 'two'.*'one'"):
        CheckpointReader(tmp_path).metadata()


def test_truncated_anywhere(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    data = path.read_bytes()
    lengths = random.Random(0).sample(range(len(data)), 60)
    for length in [0, 1, 7, 8, 9, len(data) - 1, *lengths]:
        path.write_bytes(data[:length])
        with pytest.raises(
            CheckpointError, match=r"a\.safetensors cannot be read.*Expected.*copy or download"
        ):
            CheckpointReader(path)


def test_flipped_bits_are_an_error_or_another_fingerprint(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    fingerprint = CheckpointReader(path).fingerprint()
    padding = len(data[8:header]) - len(data[8:header].rstrip())
    choose = random.Random(1)
    offsets = [
        *range(8),
        *choose.sample(range(8, header - padding), 150),
        *choose.sample(range(header, len(data)), 30),
    ]
    refused = 0
    for offset in offsets:
        broken = bytearray(data)
        broken[offset] ^= 1 << choose.randrange(8)
        path.write_bytes(broken)
        try:
            reader = CheckpointReader(path)
        except CheckpointError:
            refused += 1
        else:
            assert reader.fingerprint() != fingerprint, f"bit at {offset} went unnoticed"
    assert refused > 50


@pytest.mark.parametrize(
    "head", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x05\0\0\0\0\0\0\0hello", b"pickle" * 9]
)
def test_files_that_are_no_safetensors(tmp_path, head):
    path = tmp_path / "a.safetensors"
    path.write_bytes(head)
    with pytest.raises(CheckpointError):
        CheckpointReader(path)


def test_damage_after_opening_is_found_by_the_calls(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    reader = CheckpointReader(path)
    path.write_bytes(path.read_bytes()[:-5])
    for call in (lambda: reader.tensor("ids"), lambda: reader.slice("ids", 0, 1), reader.fingerprint):
        with pytest.raises(CheckpointError):
            call()
    path.unlink()
    for call in (lambda: reader.tensor("ids"), lambda: reader.slice("ids", 0, 1), reader.fingerprint):
        with pytest.raises(CheckpointError, match="does not exist"):
            call()


def test_fingerprint_does_not_depend_on_the_cut_order_or_metadata(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors", metadata={"some": "text"})
    expected = CheckpointReader(tmp_path / "a.safetensors").fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", expected)
    backwards = dict(reversed(tensors.items()))
    for number, (order, shard_bytes) in enumerate(
        [(tensors, 1), (backwards, 1), (tensors, 200), (backwards, 10**6)]
    ):
        folder = write_shards(tmp_path / f"m{number}", order, shard_bytes)
        assert CheckpointReader(folder).fingerprint() == expected


def test_fingerprint_is_the_documented_hash(tmp_path):
    write_safetensors(
        tmp_path / "a.safetensors", {"b": torch.tensor([1, 2], dtype=torch.int8), "a": torch.zeros(1, 2)}
    )
    text = b'tether fingerprint 1\n["a", "F32", [1, 2]]\n' + bytes(8) + b'["b", "I8", [2]]\n\x01\x02'
    assert CheckpointReader(tmp_path / "a.safetensors").fingerprint() == hashlib.sha256(text).hexdigest()


def test_fingerprint_sees_name_type_shape_and_content(tmp_path):
    variants = [
        {"w": torch.zeros(2, 3)},
        {"v": torch.zeros(2, 3)},
        {"w": torch.zeros(3, 2)},
        {"w": torch.zeros(2, 3, dtype=torch.int32)},
        {"w": torch.zeros(2, 3), "x": torch.zeros(0)},
        {"w": torch.tensor([[0.0, 0, 0], [0, 0, -0.0]])},
    ]
    seen = set()
    for number, tensors in enumerate(variants):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        seen.add(CheckpointReader(tmp_path / f"{number}.safetensors").fingerprint())
    assert len(seen) == len(variants)


def test_fingerprint_reads_in_chunks(tmp_path, monkeypatch):
    tensors = {"a": torch.arange(1000), "b": torch.arange(77.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    reader = CheckpointReader(tmp_path / "a.safetensors")
    expected = reader.fingerprint()
    monkeypatch.setattr("tether.store.hashing.CHUNK", 97)
    assert reader.fingerprint() == expected


def test_no_file_stays_open(tmp_path, tensors):
    from pathlib import Path

    reader = CheckpointReader(write_shards(tmp_path / "m", tensors, 100))
    held = [reader.tensor("ids"), reader.slice("embed.weight", 1, 2)]
    reader.fingerprint()
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    maps = Path("/proc/self/maps").read_text()
    assert not [link for link in links if str(tmp_path) in link]
    assert str(tmp_path) not in maps
    assert held


def test_hashes_of_files(tmp_path):
    content = {"a": b"", "b": b"abc", "c": bytes(5_000_000)}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    assert sha256_file(tmp_path / "b") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    expected = {tmp_path / name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    assert {path: sha256_file(str(path)) for path in expected} == expected
    with pytest.raises(CheckpointError, match="does not exist"):
        sha256_file(tmp_path / "x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        sha256_file(tmp_path)


@pytest.mark.parametrize("dimensions", [64, 65, 4000])
def test_a_tensor_of_more_dimensions_than_any_library_has_is_damage(tmp_path, dimensions):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1] * dimensions, "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    if dimensions > 64:
        with pytest.raises(CheckpointError, match=f"'a' has {dimensions} dimensions, expected 64 at most"):
            CheckpointReader(tmp_path / "a.safetensors")
    else:
        assert CheckpointReader(tmp_path / "a.safetensors").tensor("a").dim() == dimensions
