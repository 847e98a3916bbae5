"""What certifying costs in reading: every text is passed over once, and every document is read once after that."""

import sys
from collections import Counter

import torch

import tiny
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.certificate import certify
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.store.documents import write_documents

OPENED: Counter[str] = Counter()


def count(event, arguments):
    if event == "open":
        OPENED[str(arguments[0])] += 1


def test_certifying_opens_a_text_once_and_reads_each_document_once(tmp_path):
    base = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    second = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 32
    delta = Delta(
        name="a", chart="linear", first=None, second=second, gate=None, base=base.config.base_fingerprint
    )
    fused = fuse(base, {delta: 1.0}, by="sum")
    documents = tiny.documents("words", 6)
    write_documents(tmp_path / "lines.jsonl", documents)
    (tmp_path / "plain.txt").write_text("\n".join(documents), encoding="utf-8")
    texts = {name: tmp_path / name for name in ("lines.jsonl", "plain.txt")}
    sys.addaudithook(count)  # it stays for good, and costs nothing
    OPENED.clear()
    certify(base, fused, tiny.tokenizer(), texts, window=48)
    assert OPENED[str(texts["lines.jsonl"])] == 1 + len(documents)
    # A plain file is opened a second time to see that it has not changed.
    assert OPENED[str(texts["plain.txt"])] == 1 + 2
