"""Two processes with gloo take the same steps as one with the same global batch."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import tiny
from processes import run_two
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.pairs import Pair
from tether.causal.training import TrainOptions, train

SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import test_processes as here
from pathlib import Path
record = here.two_process_run(Path(sys.argv[1]))
if record["rank"] == 0:
    Path(sys.argv[1], "curve.json").write_text(json.dumps(record))
"""


def two_process_run(folder):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    tokenizer = model.add_numbers(tiny.tokenizer())
    # Shares of a step differ in their labels and numbers: a mean of means would show.
    texts = [Pair("a" * 30, "b 1"), *tiny.documents("digits", 4), Pair("x", "no")]
    options = TrainOptions(
        part="all", mode="deterministic", steps=6, batch=4, accumulate=2, window=64, lr=3e-3, save_every=2
    )
    record = train(model, tokenizer, texts, options=options, folder=folder / "run")
    there = torch.distributed.is_initialized()
    record["rank"] = torch.distributed.get_rank() if there else 0
    record["world"] = torch.distributed.get_world_size() if there else 1
    if there:
        torch.distributed.barrier()  # the store lives in rank 0
        torch.distributed.destroy_process_group()
    return record


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path):
    run_two(SCRIPT.format(tests=str(Path(__file__).parent)), tmp_path, tmp_path)
    both = json.loads((tmp_path / "curve.json").read_text())
    (tmp_path / "alone").mkdir()
    one = two_process_run(tmp_path / "alone")
    assert (both["world"], one["world"]) == (2, 1)
    assert_close(torch.tensor(both["curve"]), torch.tensor(one["curve"]), rtol=1e-5, atol=1e-5)
