import errno
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from disk import nearly_full
from tether.errors import CheckpointError, ConfigError, ShapeError
from tether.store import writer
from tether.store.reader import CheckpointReader
from tether.store.writer import ShardWriter, publish_folder, write_safetensors

DTYPES = [getattr(torch, name) for name in writer._DTYPES]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = [tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (actual, expected)]
    torch.testing.assert_close(*bits, rtol=0, atol=0)


def test_safetensors_reads_back_every_type_and_layout(tmp_path, generator):
    base = torch.randn(5, 4, generator=generator) * 3
    tensors = {str(dtype): base.to(dtype) for dtype in DTYPES}
    tensors |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 7),
        "transposed": base.clone().T,
        "left": base[:, :2],
        "right": base[:, 2:],
        "expanded": torch.ones(1).expand(3),
        "parameter": torch.nn.Parameter(base.clone()),
        "名字": torch.arange(3),
    }
    write_safetensors(tmp_path / "a.safetensors", tensors, {"b": "1", "a": "é"})
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same_bits(loaded[name], tensor.detach())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"b": "1", "a": "é"}


def test_every_tensor_is_aligned(tmp_path):
    tensors = {f"{number}{dtype}": torch.ones(number).to(dtype) for number in (1, 3) for dtype in DTYPES}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    with (tmp_path / "a.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    assert length % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_equal_content_gives_equal_bytes(tmp_path):
    tensors = {name: torch.full((2,), float(number)) for number, name in enumerate("abc")}
    metadata = {key: key for key in "zyx"}
    orders = itertools.product(itertools.permutations(tensors), itertools.permutations(metadata))
    written = set()
    for tensor_order, key_order in orders:
        path = tmp_path / "a.safetensors"
        write_safetensors(
            path, {key: tensors[key] for key in tensor_order}, {key: metadata[key] for key in key_order}
        )
        written.add(path.read_bytes())
    assert len(written) == 1


def test_metadata_that_is_not_text_is_refused(tmp_path):
    check = getattr(write_safetensors, "__wrapped__", write_safetensors)  # without the run-time type check
    with pytest.raises(ConfigError, match=r"'a', 'c'; expected text.*json\.dumps"):
        check(tmp_path / "a.safetensors", {"w": torch.zeros(1)}, {"a": 1, "b": "x", "c": ["y"]})
    assert names(tmp_path) == []


def test_tensors_that_cannot_be_stored_are_all_named(tmp_path):
    tensors = {
        "good": torch.zeros(2),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "sparse": torch.zeros(2).to_sparse(),
        "meta": torch.zeros(2, device="meta"),
        "__metadata__": torch.zeros(2),
    }
    with pytest.raises(ShapeError) as caught:
        write_safetensors(tmp_path / "a.safetensors", tensors)
    message = str(caught.value)
    assert all(f"{name} (" in message for name in tensors if name != "good")
    assert "good (" not in message
    assert names(tmp_path) == []


def test_shared_memory_is_refused(tmp_path):
    base = torch.zeros(6)
    tied = torch.zeros(4)
    with pytest.raises(ShapeError, match=r"(a and b, c and d|c and d, a and b)\. .*clone"):
        write_safetensors(tmp_path / "a.safetensors", {"a": base, "b": base[2:4], "c": tied, "d": tied})
    assert names(tmp_path) == []
    write_safetensors(tmp_path / "a.safetensors", {"a": base[:3], "b": base[3:], "c": base[3:3]})


def test_full_disk_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": torch.ones(10)})
    message = r"File too large after \d+ bytes; 400\d{3} bytes were needed.*Nothing"
    with pytest.raises(CheckpointError, match=message), nearly_full(100_000):
        write_safetensors(path, {"w": torch.zeros(50_000), "v": torch.zeros(50_000)})
    torch.testing.assert_close(load_file(path)["w"], torch.ones(10))
    assert names(tmp_path) == ["a.safetensors"]


def stream(folder, count, **options):
    with ShardWriter(folder, **options) as shards:
        for number in range(count):
            shards.add(f"layer.{number}", torch.full((25,), float(number)))  # 100 bytes each


@pytest.mark.parametrize(
    ("shard_bytes", "sizes"),
    [(700, [7]), (699, [6, 1]), (300, [3, 3, 1]), (100, [1] * 7), (99, [1] * 7), (1, [1] * 7)],
)
def test_shards_are_filled_to_the_size(tmp_path, shard_bytes, sizes):
    stream(tmp_path, 7, shard_bytes=shard_bytes)
    if len(sizes) == 1:
        assert names(tmp_path) == ["model.safetensors"]
    else:
        count = len(sizes)
        shards = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        assert names(tmp_path) == [*shards, "model.safetensors.index.json"]
        assert [len(load_file(tmp_path / shard)) for shard in shards] == sizes
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": 700}
        for name, shard in index["weight_map"].items():
            assert name in load_file(tmp_path / shard)
    reader = CheckpointReader(tmp_path)
    assert reader.metadata() == {"format": "pt"}
    for number in range(7):
        torch.testing.assert_close(reader.tensor(f"layer.{number}"), torch.full((25,), float(number)))


def test_at_most_one_shard_is_held(tmp_path):
    alive = []
    with ShardWriter(tmp_path, shard_bytes=300) as shards:
        for number in range(9):
            shards.add(str(number), torch.zeros(25))
            alive.append(len(shards._pending))
    assert max(alive) == 3
    assert alive == [1, 2, 3] * 3


def test_exception_publishes_nothing_under_a_model_name(tmp_path):
    def broken(folder):
        with ShardWriter(folder, shard_bytes=100) as shards:
            for number in range(5):
                shards.add(str(number), torch.zeros(25 // (4 - number)))

    folder = tmp_path / "bare"
    folder.mkdir()
    with pytest.raises(ZeroDivisionError):
        broken(folder)
    assert not [name for name in names(folder) if name.startswith("model")]
    folder.rename(tmp_path / "gone")
    with pytest.raises(ZeroDivisionError), publish_folder(tmp_path / "model") as temporary:
        broken(temporary)
    assert names(tmp_path) == ["gone"]


def test_misuse_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="shard_bytes is 0"):
        ShardWriter(tmp_path, shard_bytes=0)
    with pytest.raises(ConfigError, match="no tensor was added"):
        stream(tmp_path, 0)
    with ShardWriter(tmp_path, shard_bytes=10) as shards:
        shards.add("a", torch.zeros(9))
        shards.add("b", torch.zeros(9))
        with pytest.raises(ConfigError, match="a was added twice"):
            shards.add("a", torch.zeros(9))


def test_full_disk_while_streaming_removes_all_of_it(tmp_path, monkeypatch):
    real, count = writer._bytes, itertools.count()

    def filling(tensor):
        if next(count) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(tensor)

    monkeypatch.setattr(writer, "_bytes", filling)
    with (
        pytest.raises(CheckpointError) as caught,
        publish_folder(tmp_path / "model", needed=700) as temporary,
    ):
        stream(temporary, 7, shard_bytes=100)
    assert str(caught.value).startswith(f"{tmp_path / 'model'} could not be written: No space left on device")
    assert "700 bytes were needed" in str(caught.value)
    assert names(tmp_path) == []


def test_importing_does_not_import_torch():
    modules = "tether.store.reader, tether.store.writer, tether.store.manifest, tether.runs, tether.stats"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
