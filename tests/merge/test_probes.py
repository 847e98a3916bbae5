import json

import datasets
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

import tiny
from tether.errors import ConfigError
from tether.merge.probes import Probe, encode_probes, probes_hash, read_probes, tokenizers_agree


def write(path, *lines):
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


def picture(path, size=8):
    Image.new("RGB", (size, size), (200, 30, 30)).save(path)
    return path


def processor():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        image_processor=image, tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>",
    )  # fmt: skip


def test_lines_with_and_without_images(tmp_path):
    picture(tmp_path / "red.png")
    file = write(tmp_path / "probes.jsonl", {"text": "What colour?", "image": "red.png"}, {"text": "Go on"})
    found = read_probes(file)
    assert found == [Probe(text="What colour?", image=tmp_path / "red.png"), Probe(text="Go on")]


def test_image_folder_of_datasets(tmp_path):
    picture(tmp_path / "a.png")
    write(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "Say"})
    assert read_probes(tmp_path) == [Probe(text="Say", image=tmp_path / "a.png")]


def test_all_problems_are_named_before_anything_runs(tmp_path):
    file = tmp_path / "probes.jsonl"
    file.write_text('{"text": "a", "image": "no.png"}\n{"txt": "b"}\nnot json\n{"text": " "}\n')
    with pytest.raises(ConfigError) as error:
        read_probes(file)
    message = str(error.value)
    for part in ("line 1: no image", "line 2", "line 3", "line 4: the text is empty"):
        assert part in message


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a", "image": "../a.png"}', b'{"text": "a", "image": "/etc/hostname"}',
        b'{"text": "a", "image": 3}', b'{"text": "\\ud800"}', b'{"text": "a", "text": "b"}', b"[" * 10**5,
        b'{"text": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_lines_that_lead_out_of_the_folder_or_are_out_of_bounds(tmp_path, line):
    (tmp_path / "in").mkdir()
    picture(tmp_path / "a.png")
    (tmp_path / "in" / "probes.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ConfigError, match="line 2: "):
        read_probes(tmp_path / "in" / "probes.jsonl")


def test_probes_that_are_not_utf8(tmp_path):
    (tmp_path / "probes.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ConfigError, match="JSON lines in UTF-8"):
        read_probes(tmp_path / "probes.jsonl")


def test_tables_and_saved_data_sets_are_probes_of_text(tmp_path):
    rows = [{"text": "Go on", "n": 1}, {"text": "And then?", "n": 2}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for name in ("saved", "rows.parquet"):
        assert read_probes(tmp_path / name) == [Probe(text="Go on"), Probe(text="And then?")]
    datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}]).to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(ConfigError, match="expected probes with a field 'text'"):
        read_probes(tmp_path / "pairs.parquet")


def test_missing_files_and_other_folders(tmp_path):
    with pytest.raises(ConfigError, match="no such probe file"):
        read_probes(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"expected metadata\.jsonl in the folder"):
        read_probes(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no probes in it"):
        read_probes(tmp_path / "empty.jsonl")


def test_text_is_cut_and_images_are_not(tmp_path):
    maker = processor()
    image = picture(tmp_path / "red.png")
    long = "word " * 40
    probes = [Probe(text=long), Probe(text=long, image=image)]
    text, shown = encode_probes(probes, maker.tokenizer, longest=16, processor=maker)
    assert text.input_ids.tolist() == maker.tokenizer(long)["input_ids"][:16]
    assert text.extras == {}
    token = maker.tokenizer.convert_tokens_to_ids("<image>")
    assert int((shown.input_ids == token).sum()) == 4
    assert len(shown.input_ids) > 16
    assert shown.extras["pixel_values"].shape == (1, 3, 8, 8)
    assert probes_hash([text, shown]) != probes_hash([text, text])


def test_images_that_cannot_be_used(tmp_path):
    maker = processor()
    image = picture(tmp_path / "red.png")
    with pytest.raises(ConfigError, match="has no processor"):
        encode_probes([Probe(text="a", image=image)], maker.tokenizer)
    with pytest.raises(ConfigError, match="ends in an image token"):
        encode_probes([Probe(text="a <image>", image=image)], maker.tokenizer, processor=maker)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match="not an image that Pillow reads"):
        encode_probes([Probe(text="a", image=tmp_path / "bad.png")], maker.tokenizer, processor=maker)
    with pytest.raises(ConfigError, match="at least one token"):
        encode_probes([Probe(text="a")], maker.tokenizer, longest=0)


def test_tokenizers_agree_only_where_tokens_do():
    assert tokenizers_agree(tiny.tokenizer(), tiny.tokenizer())
    other = tiny.tokenizer()
    other.add_tokens(["<new>"])
    assert not tokenizers_agree(tiny.tokenizer(), other)
    vocabulary = tiny.tokenizer().get_vocab()
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<eos>")),
        eos_token="<eos>", bos_token="<eos>", pad_token="<pad>",
    )  # fmt: skip
    assert words.get_vocab() == vocabulary
    assert not tokenizers_agree(tiny.tokenizer(), words)
    assert torch.equal(*[encode_probes([Probe(text="ab")], tiny.tokenizer())[0].input_ids for _ in range(2)])
