"""What is read as text: documents, pairs, probes, options."""

import gzip
import json

import datasets
import pyarrow
import pytest
from pyarrow import parquet

import tiny
from fuzzing import Reader, devices, refuse_devices, survive
from tether.merge.probes import read_probes
from tether.reading import read_yaml
from tether.store.documents import read_documents, write_documents
from tether.store.marked import Marked


def _documents(folder):
    return [*read_documents(folder / "text.jsonl"), *read_documents(folder / "text.txt")]


def _pairs(folder):
    return list(read_documents(folder / "pairs.jsonl"))


def _whole(name, **options):
    return lambda folder: list(read_documents(folder / name, **options))


def _conversations(folder):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}"
    )
    opened = read_documents(folder / "talks.jsonl")
    return [talk.parts(tokenizer) if isinstance(talk, Marked) else talk for talk in opened]


def _probes(folder):
    return read_probes(folder / "probes.jsonl"), read_probes(folder)


READERS = {
    "documents": Reader(_documents, {"text.jsonl": "lines", "text.txt": "text"}, 0.3),
    "pairs": Reader(_pairs, {"pairs.jsonl": "lines"}, 0.3),
    "conversations": Reader(_conversations, {"talks.jsonl": "lines"}, 0.3),
    "parquet": Reader(_whole("talks.parquet"), {"talks.parquet": "text"}, 0.3),
    "csv": Reader(_whole("rows.csv", field="body"), {"rows.csv": "text"}, 0.1),
    "compressed": Reader(_whole("text.jsonl.gz"), {"text.jsonl.gz": "text"}, 0.5),
    "data set": Reader(
        _whole("saved"),
        {
            "saved/data-00000-of-00001.arrow": "text",
            "saved/state.json": "json",
            "saved/dataset_info.json": "json",
        },
        0.3,
    ),
    "folder": Reader(_whole("texts"), {"texts/a.jsonl": "lines", "texts/b.md": "text"}, 0.1),
    "probes": Reader(_probes, {"probes.jsonl": "lines", "metadata.jsonl": "lines"}, 0.5),
    "yaml": Reader(lambda folder: read_yaml(folder / "o.yaml"), {"o.yaml": "text"}, 0.1),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One folder a reader with undamaged files."""
    top = tmp_path_factory.mktemp("whole")
    folders = {name: top / name for name in READERS}
    for folder in folders.values():
        folder.mkdir()
    write_documents(folders["documents"] / "text.jsonl", tiny.documents("words", 4))
    (folders["documents"] / "text.txt").write_text("One text: café.\n" * 4, encoding="utf-8")
    pairs = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(4)]
    (folders["pairs"] / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    turns = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four: café."}]
    talks = [{"messages": turns * (1 + n), "source": n} for n in range(4)]
    (folders["conversations"] / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    table = [{"messages": turns * (1 + n), "source": n} for n in range(40)]
    parquet.write_table(
        pyarrow.Table.from_pylist(table), folders["parquet"] / "talks.parquet", row_group_size=16
    )
    datasets.Dataset.from_list(table).save_to_disk(folders["data set"] / "saved")
    (folders["csv"] / "rows.csv").write_text(
        'n,body\n1,"one, ""two"""\n2,café\n' + "3,x\n" * 9, encoding="utf-8"
    )
    with gzip.open(folders["compressed"] / "text.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in tiny.documents("words", 9))
    (folders["folder"] / "texts").mkdir()
    write_documents(folders["folder"] / "texts" / "a.jsonl", tiny.documents("words", 4))
    (folders["folder"] / "texts" / "b.md").write_text("One text: café.\n" * 4, encoding="utf-8")
    (folders["probes"] / "a.png").write_bytes(b"")
    for name, field in (("probes.jsonl", "image"), ("metadata.jsonl", "file_name")):
        lines = [{"text": "What colour?", field: "a.png"}, {"text": "Go on"}, {"text": "And then?"}]
        (folders["probes"] / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folders["yaml"] / "o.yaml").write_text(
        "epochs: 2\nlr: 1e-3\nparts:\n  - a\n  - {b: [1, 2.5]}\nmode: softmax\n"
    )
    return folders


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_read_and_never_a_fault(name, whole, tmp_path):
    survive(name, READERS[name], whole[name], tmp_path)


@devices
@pytest.mark.parametrize("name", READERS)
def test_devices_and_pipes_are_refused(name, whole, tmp_path):
    refuse_devices(READERS[name], whole[name], tmp_path)
