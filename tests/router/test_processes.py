"""Two processes with gloo and FSDP2 read the costs and take the steps that one process takes."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

import tiny_moe
from processes import run_two
from tether.router import RoutingShaper

FORMS = ("tax", "balance", "prior", "switch", "bias")
SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import test_processes as here
here.process(sys.argv[1])
"""


def run(model, form, rows):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    record = {"losses": [], "costs": []}
    with RoutingShaper(model, optimizer, form=form, lam=0.1, every=1, rate=0.01) as shaper:
        for step in range(4):
            ids = tiny_moe.tokens(batch=4, seed=step)[rows]
            # Padding only in the second half: a mean of means would show.
            mask = torch.ones(4, 12, dtype=torch.int64)
            mask[2:, 5:] = 0
            mask = mask[rows]
            output = model(input_ids=ids, attention_mask=mask)
            flat = torch.nn.functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            )
            # Per process the mean over its own sequences, all of one length: data parallelism averages these.
            loss = flat / ids[:, 1:].numel() + shaper.loss(mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if form == "tax":
                record["costs"].append([cost.tolist() for cost in shaper.costs().values()])
            else:
                record["costs"].append([])
        weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
        record["weights"] = [float(w.detach().double().sum()) for w in weights]
        record["routers"] = [
            w.detach().tolist()
            for (name, _), w in zip(model.named_parameters(), weights, strict=True)
            if "gate.weight" in name
        ]
    return record


def process(path):
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    records = {}
    for form in FORMS:
        model = tiny_moe.build("qwen3_moe")
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        records[form] = run(model, form, slice(2 * rank, 2 * rank + 2))
    if rank == 0:
        Path(path).write_text(json.dumps(records))
    distributed.barrier()  # the store lives in rank 0
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_sharded_experts_are_one(tmp_path):
    out = tmp_path / "record.json"
    run_two(SCRIPT.format(here=str(Path(__file__).parent)), tmp_path, out, timeout=500)
    records = json.loads(out.read_text())
    for form in FORMS:
        both = records[form]
        one = run(tiny_moe.build("qwen3_moe"), form, slice(None))
        assert_close(torch.tensor(both["costs"][0]), torch.tensor(one["costs"][0]), rtol=0, atol=1e-6)
        # Steps of Adam divide by roots of squares of tiny gradients, so later ones only agree to rounding times that.
        assert_close(torch.tensor(both["costs"]), torch.tensor(one["costs"]), rtol=0, atol=2e-5)
        assert_close(torch.tensor(both["routers"]), torch.tensor(one["routers"]), rtol=0, atol=2e-5)
        assert_close(torch.tensor(both["weights"]), torch.tensor(one["weights"]), rtol=1e-4, atol=1e-4)
