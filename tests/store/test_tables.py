"""Texts in tables, compressed files, folders and data sets: the same documents as in JSON lines, or one clear error."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tether.errors import ConfigError
from tether.store import several
from tether.store.documents import documents_of, read_documents, source_hash, text_hash, write_documents
from tether.store.marked import Marked
from tether.store.rows import FieldError


def talks(count):
    return [
        {
            "messages": [
                {"role": "user", "content": f"How much is {n} and {n}?"},
                {"role": "assistant", "content": f'{2 * n}, "of course"\n– né {n}.'},
            ],
            "source": n,
        }
        for n in range(count)
    ]


ROWS = {
    "text": [{"text": f'Line {n},\n"quoted" é', "n": n} for n in range(150)],
    "pairs": [{"prompt": f"{n}\t+", "completion": f" {n}\nx", "n": n} for n in range(150)],
    "talks": talks(150),
}


def lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def packed(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def table(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=40)


def cells(path, rows):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def saved(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)


def folder(path, rows):
    path.mkdir()
    lines(path / "a.jsonl", rows[:50])
    table(path / "b.parquet", rows[50:120])
    (path / "c").mkdir()
    packed(path / "c" / "d.jsonl.gz", rows[120:])


FORMS = {
    "rows.jsonl": lines, "rows.jsonl.gz": packed, "rows.parquet": table, "rows.csv": cells, "rows.tsv": cells,
    "saved": saved, "folder": folder,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ROWS)
def test_every_form_gives_the_documents_of_json_lines(tmp_path, kind, form):
    if kind == "talks" and FORMS[form] is cells:
        pytest.skip("a cell of a CSV file holds a text")
    lines(tmp_path / "expected.jsonl", ROWS[kind])
    expected = read_documents(tmp_path / "expected.jsonl")
    FORMS[form](tmp_path / form, ROWS[kind])
    text = read_documents(tmp_path / form)
    assert list(text) == list(expected)
    assert [type(document) for document in text] == [type(document) for document in expected]
    assert text_hash(text) == text_hash(expected)
    assert text_hash(text[7:90:3]) == text_hash(expected[7:90:3])
    assert text.kind == expected.kind
    assert text.sha256 == source_hash(tmp_path / form)
    assert text[-1] == expected[-1]
    assert text.recognised.startswith(f"{form}: 150 ")


def test_a_field_may_have_any_name(tmp_path):
    rows = [{"id": n, "body": f"text {n}", "turns": talks(1)[0]["messages"]} for n in range(9)]
    for form in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet", "saved", "folder"):
        FORMS[form](tmp_path / form, rows * 10)
        assert list(read_documents(tmp_path / form, field="body")) == [row["body"] for row in rows * 10]
        of_turns = read_documents(tmp_path / form, field="turns")
        assert of_turns.kind == "messages"
        assert all(isinstance(document, Marked) for document in of_turns)
        for wrong in (None, "bodies"):
            with pytest.raises(FieldError, match=r"the fields there are id, body, turns: name the one"):
                read_documents(tmp_path / form, field=wrong)
    cells(tmp_path / "rows.csv", [{"id": 1, "body": "one"}])
    assert list(read_documents(tmp_path / "rows.csv", field="body")) == ["one"]
    assert "1 document in `body`" in read_documents(tmp_path / "rows.csv", field="body").recognised
    with pytest.raises(FieldError, match="fields there are id, body"):
        read_documents(tmp_path / "rows.csv")
    (tmp_path / "plain.txt").write_text("one")
    with pytest.raises(FieldError, match="plain text has no field 'body'"):
        read_documents(tmp_path / "plain.txt", field="body")


def test_a_folder_is_its_files_in_order_and_says_what_it_passes_over(tmp_path):
    top = tmp_path / "texts"
    (top / "sub").mkdir(parents=True)
    (top / "b.md").write_text("second")
    (top / "a.txt").write_text("first")
    (top / "c.py").write_text("third")
    write_documents(top / "sub" / "d.jsonl", ["fourth", "fifth"])
    (top / "empty.txt").write_text("")
    (top / "picture.png").write_bytes(b"\x89PNG\xff\x00")
    (top / ".hidden").write_text("not read")
    text = read_documents(top)
    assert list(text) == ["first", "second", "third", "fourth", "fifth"]
    assert (
        text.recognised
        == "texts: 5 documents, of 4 files; passed over, as empty or no text: empty.txt, picture.png"
    )
    assert text_hash(text) == text_hash(list(text))
    (top / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"a\.txt: not UTF-8"):
        read_documents(top)
    (top / "a.txt").unlink()
    lines(top / "talks.jsonl", talks(2))
    with pytest.raises(ConfigError, match="expected one kind in a folder"):
        read_documents(top)
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="holds no text"):
        read_documents(tmp_path / "none")


def test_a_folder_of_everything_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(several, "MOST_FILES", 3)
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("x")
    with pytest.raises(ConfigError, match="more than 3 files"):
        read_documents(tmp_path)


def test_splits_of_a_saved_data_set(tmp_path):
    rows = datasets.Dataset.from_list(talks(30))
    datasets.DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(tmp_path / "both")
    assert len(read_documents(f"{tmp_path}/both:test")) == 5
    assert list(read_documents(f"{tmp_path}/both:train[4:7]")) == documents_of(talks(30))[4:7]
    with pytest.raises(
        ConfigError, match=r"no split was named; it has train, test: name one, as .*both:train"
    ):
        read_documents(tmp_path / "both")
    with pytest.raises(ConfigError, match="no split val; it has train, test"):
        read_documents(f"{tmp_path}/both:val")
    datasets.DatasetDict({"only": rows}).save_to_disk(tmp_path / "one")
    assert len(read_documents(tmp_path / "one")) == 30


def test_a_folder_of_data_files_with_a_split_is_read_by_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    lines(data / "train.jsonl", talks(40))
    lines(data / "test.jsonl", talks(3))
    expected = documents_of(talks(40))
    assert list(read_documents(f"{data}:train")) == expected
    # A split that ends somewhere is streamed: nothing is put into the library's cache.
    before = sorted((tmp_path / "cache").rglob("*"))
    assert list(read_documents(f"{data}:train[5:9]")) == expected[5:9]
    assert list(read_documents(f"{data}:train[:4]")) == expected[:4]
    assert sorted((tmp_path / "cache").rglob("*")) == before
    with pytest.raises(ConfigError, match="cannot be read"):
        read_documents(f"{data}:validation")
    # What a file says is no reason to ask that library, which may fetch what the folder's description names.
    with pytest.raises(ConfigError, match="no such text file or folder"):
        read_documents(f"{data}:train", fetch=False)


def test_rows_of_python_are_a_text_too():
    rows = talks(20)
    expected = documents_of(rows)
    made = datasets.Dataset.from_list(rows)
    for given in (made, made.to_iterable_dataset(), iter(rows)):
        text = documents_of(given)
        assert list(text) == expected
        assert text.path is None
    assert list(documents_of(iter(["one", "two"]))) == ["one", "two"]
    with pytest.raises(ConfigError, match=r"row 1: .*no turn of the assistant"):
        documents_of(iter([rows[0], {"messages": []}]))


def test_names_that_nobody_has(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for name in ("nobody/has-this", "nobody/has-this:train", "nobody:train", "nobody/has/this:train[:10]"):
        with pytest.raises(ConfigError, match="no such file or folder here, and datasets cannot load it"):
            read_documents(name)
    # What looks like a path is asked of nobody.
    for name in (
        "absent",
        "absent.jsonl",
        "a/b/c/d",
        "../absent",
        "absent.txt:train",
        "texts/absent",
        "texts/law:train",
    ):
        with pytest.raises(ConfigError, match="no such text file or folder"):
            read_documents(name)


def test_the_library_that_is_not_there_is_named(tmp_path, monkeypatch):
    table(tmp_path / "rows.parquet", ROWS["text"])
    saved(tmp_path / "saved", ROWS["text"])
    for module in ("pyarrow.parquet", "datasets"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    for name in ("rows.parquet", "saved"):
        with pytest.raises(ConfigError, match=r"pip install 'tether\[data\]'"):
            read_documents(tmp_path / name)


def cut_parquet(path):
    table(path, ROWS["text"])
    path.write_bytes(path.read_bytes()[:-40])


DAMAGED = {
    "cut.parquet": (cut_parquet, "damaged, or no parquet file"),
    "no.parquet": (b"a text", "damaged, or no parquet file"),
    "ragged.csv": (b"text,n\na,1\nb\nc,2\n", r"line 3: 1 cells, and the header has 2"),
    "open.csv": (b'text,n\n"a,1\nb,2\n', "line 3: no row of a table"),
    "latin.csv": (b"text,n\ncaf\xe9,1\n", "not UTF-8"),
    "twice.csv": (b"text,text\na,b\n", "several columns are called 'text'"),
    "header.csv": (b"text,n\n", "holds no text"),
    "messages.csv": (b"messages\nhello\n", 'line 2: expected "messages", a list of turns'),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "damaged, or not compressed"),
    "no.jsonl.gz": (b'{"text": "a"}\n', "damaged, or not compressed"),
    "row.jsonl.gz": (gzip.compress(b'{"text": "a"}\n{"txt": "b"}\n'), 'line 2: expected a text "text"'),
    "json.jsonl.gz": (gzip.compress(b'{"text": "a"}\n{"text": \n'), "line 2: expected a JSON object"),
    "latin.txt.gz": (gzip.compress(b"caf\xe9"), "not UTF-8"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_end_in_one_clear_error(tmp_path, name):
    make, message = DAMAGED[name]
    if callable(make):
        make(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(make)
    with pytest.raises(ConfigError, match=message) as error:
        read_documents(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("form", ["rows.parquet", "saved"])
def test_rows_of_other_types_are_named_by_their_number(tmp_path, form):
    FORMS[form](tmp_path / form, [{"text": "a"}, {"text": None}])
    with pytest.raises(ConfigError, match='row 2: expected a text "text"'):
        read_documents(tmp_path / form)
    FORMS[form](tmp_path / f"numbers-{form}", [{"text": 3}])
    with pytest.raises(ConfigError, match='row 1: expected a text "text"'):
        read_documents(tmp_path / f"numbers-{form}")


def test_a_saved_data_set_opens_no_file_elsewhere(tmp_path):
    saved(tmp_path / "saved", ROWS["text"])
    saved(tmp_path / "other", ROWS["pairs"])
    about = json.loads((tmp_path / "saved" / "state.json").read_text())
    about["_data_files"] = [{"filename": f"../other/{Path(about['_data_files'][0]['filename']).name}"}]
    (tmp_path / "saved" / "state.json").write_text(json.dumps(about))
    with pytest.raises(Exception, match="leads out of it"):
        read_documents(tmp_path / "saved")


def test_a_document_larger_than_a_line_may_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tether.store.spooled.LINE_BYTES", 1000)
    monkeypatch.setattr("tether.store.tables.LINE_BYTES", 1000)
    table(tmp_path / "rows.parquet", [{"text": "x" * 1001}])
    with pytest.raises(ConfigError, match="a document of 1,001 bytes"):
        read_documents(tmp_path / "rows.parquet")
    with gzip.open(tmp_path / "a.txt.gz", "wb") as stream:
        stream.write(b"x" * 1001)
    with pytest.raises(ConfigError, match="more than 1,000 bytes when it is unpacked"):
        read_documents(tmp_path / "a.txt.gz")


def test_rows_that_were_written_are_read_again(tmp_path):
    for rows in ROWS.values():
        documents = documents_of(rows)
        write_documents(tmp_path / "again.jsonl", documents)
        assert list(read_documents(tmp_path / "again.jsonl")) == documents
