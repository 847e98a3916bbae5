"""Prompts with completions, and conversations: what is learnt of them, from a file or as rows."""

import json

import pytest
import torch
from tokenizers import AddedToken

import tiny
from tether.causal.dataset import make_examples
from tether.causal.losses import IGNORE
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.pairs import Pair
from tether.delta.delta import Delta
from tether.delta.fare import fare
from tether.delta.fusion import fuse
from tether.delta.learning import learn_delta
from tether.delta.windows import window_text
from tether.errors import ConfigError
from tether.store.documents import documents_of, read_documents, text_hash, write_documents
from tether.store.marked import Controlled, Marked, document_of

TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And <|end|> three?"},
    {"role": "assistant", "content": "Seven, I think."},
]


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny.tokenizer()
    made.add_special_tokens(
        {"additional_special_tokens": [AddedToken(name, special=True) for name in ("<|turn|>", "<|end|>")]}
    )
    made.chat_template = TEMPLATE
    return made


def spelt(tokenizer, windows, kept):
    return tokenizer.decode(windows.input_ids[kept], skip_special_tokens=False)


def test_the_assistants_turns_are_learnt_with_their_ends(tokenizer):
    (talk,) = documents_of([{"messages": TALK, "id": 7}])
    windows = window_text([talk], tokenizer, length=512, short=True)
    assert spelt(tokenizer, windows, slice(None)) == tokenizer.apply_chat_template(TALK, tokenize=False)
    learnt = torch.cat([torch.tensor([False]), windows.targets[:-1] != IGNORE])
    assert torch.equal(windows.targets[:-1][learnt[1:]], windows.input_ids[learnt])
    assert spelt(tokenizer, windows, learnt) == "Four.<|end|>Seven, I think.<|end|>"


def test_control_tokens_in_what_a_turn_says_are_text(tokenizer):
    windows = window_text(documents_of([{"messages": TALK}]), tokenizer, length=512, short=True)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    # One at the end of each turn; what the user has typed is spelt in letters.
    assert int((windows.input_ids == end).sum()) == len(TALK)


def test_without_control_tokens_it_is_the_templates_own_tokens(tokenizer):
    talk = [turn for turn in TALK if "<|end|>" not in turn["content"]]
    windows = window_text(documents_of([{"messages": talk}]), tokenizer, length=512, short=True)
    assert windows.input_ids.tolist() == tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]


def test_a_prompt_with_its_completion_is_read_as_training_reads_it(tokenizer):
    rows = [{"prompt": f"Count to {n}:", "completion": " one, two"} for n in range(3)]
    windows = window_text(documents_of(rows), tokenizer, length=64, short=True)
    examples = make_examples([Pair(**row) for row in rows], tokenizer, window=64)
    assert torch.equal(windows.input_ids, examples.input_ids)
    shifted = torch.where(windows.targets == IGNORE, IGNORE, windows.targets)
    expected = torch.cat([examples.labels[1:], torch.tensor([IGNORE])])
    expected[windows.starts[1:] - 1] = IGNORE
    assert torch.equal(shifted, expected)
    again = make_examples([document_of(row, "prompt") for row in rows], tokenizer, window=64)
    assert torch.equal(again.labels, examples.labels)


def test_rows_and_their_file_are_one_text(tokenizer, tmp_path):
    rows = [{"messages": TALK}, {"messages": TALK[1:3], "extra": None}]
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    opened, given = read_documents(path), documents_of(rows)
    assert list(opened) == given
    assert all(isinstance(document, Marked) for document in opened)
    assert text_hash(opened) == text_hash(given)
    assert opened[1:][0] == given[1]
    one, other = (window_text(each, tokenizer, length=32, tokens=60) for each in (opened, given))
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.targets, other.targets)
    # Another split of the same words is another text.
    split = [{"prompt": "a b", "completion": " c"}], [{"prompt": "a", "completion": " b c"}]
    assert text_hash(documents_of(split[0])) != text_hash(documents_of(split[1]))


@pytest.fixture(scope="module")
def model(tokenizer):
    backbone = tiny.backbone()
    backbone.resize_token_embeddings(len(tokenizer))
    return CausalQwenForCausalLM.from_backbone(backbone.eval())


def talks(count, seed):
    return [
        {"messages": [{"role": "user", "content": "Numbers?"}, {"role": "assistant", "content": text[:120]}]}
        for text in tiny.documents("digits", count, seed)
    ]


def test_a_delta_learns_from_conversations_and_carries_them_as_text(model, tokenizer):
    delta = learn_delta(
        model, tokenizer, talks(30, 1), base_texts=tiny.documents("words", 20, 2), name="talks", window=64, epochs=2,
        gate=False,
    )  # fmt: skip
    held = delta.record["held_out"]
    assert held["nll_after"] < held["nll_before"] - 0.05
    windows = window_text(documents_of(talks(30, 1)), tokenizer, length=64)
    assert delta.record["tokens"] < int((windows.targets != IGNORE).sum())
    assert delta.sample
    assert all(text.startswith("<|turn|>user\nNumbers?<|end|>") for text in delta.sample)


def test_what_a_delta_carries_of_conversations_is_read_with_its_control_tokens(model, tokenizer):
    delta = learn_delta(
        model, tokenizer, talks(30, 1), base_texts=tiny.documents("words", 20, 2), name="talks", window=64, epochs=1,
        gate=False,
    )  # fmt: skip
    found = fare(fuse(model, {delta: 1.0}), tokenizer, samples={"talks": delta})["talks"]
    asked = window_text([*map(Controlled, delta.sample)], tokenizer, short=True)
    assert found.tokens == int((asked.targets != IGNORE).sum())
    letters = window_text(list(delta.sample), tokenizer, short=True)
    assert found.tokens < int((letters.targets != IGNORE).sum())


def test_a_file_of_conversations_on_the_command_line(model, tokenizer, tmp_path, monkeypatch):
    from tether.causal.checkpoint import save_checkpoint
    from tether.cli.app import main

    save_checkpoint(model, tokenizer, tmp_path / "base")
    write_documents(tmp_path / "words.jsonl", tiny.documents("words", 30, 2))
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, talks(40, 1))), encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["tether", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code

    text = ["--text", "talks.jsonl"]
    assert (
        run("learn", "base", *text, "--base-text", "words.jsonl", "--window", "64", "--out", "talks.delta")
        == 0
    )
    assert run("fuse", "base", "talks.delta", "--out", "fused") == 0
    assert run("certify", "base", "fused", *text, "--out", "cert.json") == 0
    assert run("verify", "cert.json") == 0
    assert Delta.load("talks.delta").record["texts"]["domain"] == text_hash(read_documents("talks.jsonl"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "no turn of the assistant"),
        ({"messages": TALK[:2]}, "no turn of the assistant"),
        ({"messages": [{"role": "tool", "content": "x"}, *TALK]}, "role 'tool'; expected system"),
        ({"messages": [{"role": "user"}]}, '"messages", a list of turns'),
        ({"messages": [{"role": "user", "content": 5}]}, '"messages", a list of turns'),
        ({"messages": "hello"}, '"messages", a list of turns'),
        ({"prompt": "a", "completion": " "}, "completion is empty"),
        ({"prompt": "a"}, '"prompt" and "completion"'),
        ({"prompt": "a", "completion": "\ud800"}, '"prompt" and "completion"'),
        ({"words": "a"}, 'a text "text"'),
    ],
)
def test_rows_that_cannot_be_used_are_refused(tmp_path, row, said):
    with pytest.raises(ConfigError, match=said):
        documents_of([row])
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"line 1: .*{said}"):
        read_documents(path)


def test_all_lines_are_of_the_first_ones_kind(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps({"text": "a"}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r'line 2: expected "messages".*as in the first row'):
        read_documents(path)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "needs the chat template"),
        ("{{ raise_exception('only two turns') }}", "does not take this conversation .*only two turns"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not write the turns"),
        ("{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "one after the other"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(template, said):
    plain = tiny.tokenizer()
    plain.chat_template = template
    with pytest.raises(ConfigError, match=said):
        window_text(documents_of([{"messages": TALK}]), plain, length=64)


def test_conversations_of_a_model_with_numbers(tokenizer):
    backbone = tiny.backbone()
    backbone.resize_token_embeddings(len(tokenizer))
    numeric = CausalQwenForCausalLM.from_backbone(backbone.eval()).add_numbers(tokenizer)
    talk = [
        {"role": "user", "content": "Add 12 and 30."},
        {"role": "assistant", "content": "That is 42, or 4.2e1."},
    ]
    windows = window_text(documents_of([{"messages": talk}]), numeric, length=512, short=True)
    here = windows.input_ids == numeric.num_token_id
    assert windows.numeric_values[here].tolist() == [12, 30, 42, 42]
    learnt = torch.cat([torch.tensor([False]), windows.targets[:-1] != IGNORE])
    assert windows.numeric_values[here & learnt].tolist() == [42, 42]
