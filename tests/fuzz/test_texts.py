"""What is read as text: documents, pairs, probes, options."""

import json

import pytest

import tiny
from fuzzing import Reader, devices, refuse_devices, survive
from tether.causal.pairs import holds_pairs, read_pairs
from tether.merge.probes import read_probes
from tether.reading import read_yaml
from tether.store.documents import read_documents, write_documents
from tether.store.marked import Marked


def _documents(folder):
    return [*read_documents(folder / "text.jsonl"), *read_documents(folder / "text.txt")]


def _pairs(folder):
    holds_pairs(folder / "pairs.jsonl")
    return read_pairs(folder / "pairs.jsonl")


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
