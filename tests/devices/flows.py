"""What users do, with the model on a device; figures as JSON, to be compared with the CPU's.

`python flows.py DEVICE [NAME ...]` with the folder of the tests on the path; `emu` is the emulated device.
"""

import json
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
import transformers

import foreign_adapters
import tiny
from tether.causal.calibration import calibrate
from tether.causal.checkpoint import save_checkpoint
from tether.causal.counterfactual import abduct, replay
from tether.causal.dataset import make_examples
from tether.causal.evaluation import evaluate
from tether.causal.fingerprint import fingerprint
from tether.causal.loading import load
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.noise import Noise
from tether.causal.offloading import is_offloaded
from tether.causal.pairs import Pair
from tether.causal.readout import fit_values
from tether.delta.account import account
from tether.delta.adapter_learning import learn_adapter
from tether.delta.adapter_serving import save_adapted, serve
from tether.delta.adapter_training import AdapterFit
from tether.delta.budget import Budget
from tether.delta.cache import cache_states
from tether.delta.certificate import certify
from tether.delta.fisher import align_latent, fisher_axes
from tether.delta.fusion import fuse
from tether.delta.learning import learn_delta
from tether.delta.leashing import leash_adapter
from tether.delta.ledger import keep_ledger
from tether.delta.measure import Variant, measure
from tether.delta.output_head import output_head
from tether.delta.verification import verify
from tether.delta.windows import window_text
from tether.merge.alignment import record
from tether.merge.gram import load_grams
from tether.merge.observation import observe
from tether.merge.probes import Probe, encode_probes
from tether.merge.tefm.observed import parse_encoding
from tether.router.deltas import DeltaRouterFit, route_deltas
from tether.store.documents import write_documents

DIGITS, WORDS, HELD = (
    tiny.documents(*kind) for kind in (("digits", 16, 1), ("words", 16, 2), ("words", 12, 3))
)
DEVICE = sys.argv[1] if __name__ == "__main__" else "cpu"
FIT = {"epochs": 1, "probe": 200}
FOLDER = Path(tempfile.mkdtemp(prefix="flows-"))


@cache
def model():
    return CausalQwenForCausalLM.from_backbone(tiny.backbone()).to(DEVICE)


@cache
def delta(name="digits", **options):
    texts = {"digits": DIGITS, "words": HELD}[name]
    options = {"budget": 0.05, "window": 64} | options
    return learn_delta(model(), tiny.tokenizer(), texts, base_texts=WORDS, name=name, **FIT, **options)


@cache
def adapter():
    fit = AdapterFit(budget=Budget(value=0.05), epochs=1, batch=4, lr=5e-3, probe=200)
    return learn_adapter(
        model(), tiny.tokenizer(), DIGITS, base_texts=WORDS, name="digits", window=64, fit=fit
    )


def fused(**options):
    return fuse(model(), {delta(): 1.0, delta("words"): 0.5}, **options)


def mean(values):
    return float(values.double().mean())


def learnt(**options):
    made = delta(**options)
    assert all(tensor is None or tensor.device.type == "cpu" for tensor in (made.first, made.second))
    return {"norm": float(made.second.norm()), "drift": made.record["base_text"]}


def learnt_adapter():
    made = adapter()
    return {"norm": float(sum(tensor.float().norm() for tensor in made.tensors.values()))}


def certified(make, seed):
    path = FOLDER / f"words-{seed}.jsonl"
    write_documents(path, HELD[:2])
    served = make()
    certificate = certify(model(), served, tiny.tokenizer(), {"words": path}, window=64)
    row = certificate.figures["words"]
    return {"nll": row["nll"], "kl": row["softmax_kl"]["mean"]}


def verified():
    path = FOLDER / "verified.jsonl"
    write_documents(path, HELD[:2])
    save_checkpoint(fused(), tiny.tokenizer(), FOLDER / "fused")
    served, tokenizer = load(str(FOLDER / "fused"), device=DEVICE)
    certify(model(), served, tokenizer, {"words": path}, window=64).save(FOLDER / "cert.json")
    return {"wrong": len(verify(FOLDER / "cert.json", device=DEVICE))}


def measured():
    windows = window_text(HELD[:3], tiny.tokenizer(), length=64)
    variants = [Variant((1.0, 0.5), "symmetric", True), Variant((1.0, 0.5), "linear", False, 0.01)]
    summed = fused(by="sum").fusion
    found = measure(model(), summed, windows, variants)
    (weighed,) = account([fused()], windows)
    return {
        "nll": found.nll.double().mean(1).tolist(), "kl": found.softmax_kl.double().mean(1).tolist(),
        "evidence": mean(weighed.nll), "weights": weighed.log_weights.exp().mean(0).tolist(),
    }  # fmt: skip


def kept(**options):
    figures = keep_ledger(fused(**options), tiny.tokenizer(), HELD[:2], window=48)
    return {"kl": figures["softmax_kl"] if "total" in figures else figures["softmax_kl"]["mean"]}


def written(**options):
    ids = torch.tensor([tiny.tokenizer()(DIGITS[0])["input_ids"][:40]], device=DEVICE)
    served = fused()
    made = served.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **options
    )
    drawn = served.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, mode="causal",
        noise=Noise.draw(1, 32, seed=3),
    )  # fmt: skip
    assert made.device.type == torch.device(DEVICE).type
    return {"ids": made.tolist(), "drawn": drawn.tolist()}


def aligned():
    states = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    return {"scale": float(fisher_axes(output_head(model()), states.to(DEVICE)).scale.norm())} | {
        "logits": float(
            align_latent(model(), fisher_axes(output_head(model()), states.to(DEVICE)))(
                input_ids=torch.arange(12, device=DEVICE)[None]
            ).logits.norm()
        )
    }


def calibrated():
    full = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"), latent_scale=0.3).to(DEVICE)
    ids = [torch.tensor(tiny.tokenizer()(text)["input_ids"]) for text in DIGITS[:6]]
    found = calibrate(full, ids, tokens=100)
    return {"found": repr(type(found)), "scale": mean(full.abduction.log_scale.bias)}


def served_adapter():
    served = serve(model(), {adapter(): 1.0})
    (found,) = account([served], window_text(HELD[:3], tiny.tokenizer(), length=64))
    for part in (tiny.backbone(), tiny.tokenizer()):
        part.save_pretrained(FOLDER / "base")
    found_again = {"nll": mean(found.nll), "kl": mean(found.softmax_kl)}
    for by in ("evidence", "sum"):
        served = serve(model(), {adapter(): 1.0}, by=by)
        folder = FOLDER / f"adapted-{by}"
        save_adapted(served, {adapter(): 1.0}, tiny.tokenizer(), folder, base=str(FOLDER / "base"))
        again, _ = load(str(folder), device=DEVICE)
        assert again.device.type == torch.device(DEVICE).type
        ids = torch.arange(20, device=DEVICE)[None]
        with torch.no_grad():
            found_again[by] = float((again(input_ids=ids).logits - served(input_ids=ids).logits).abs().max())
    return found_again


def leashed():
    """Adapters that PEFT made, and a model that was fine-tuned whole."""
    found = {}
    for kind in ("DoRA", "PiSSA", "rsLoRA"):
        folder = foreign_adapters.write(foreign_adapters.TAKEN[kind], FOLDER / f"theirs-{kind}", base="llama")
        if kind == "rsLoRA":
            folder = FOLDER / "tuned"
            for part in (foreign_adapters.merged(FOLDER / "theirs-rsLoRA", "llama"), tiny.tokenizer()):
                part.save_pretrained(folder)
        made = leash_adapter(
            model(), tiny.tokenizer(), folder, base_texts=WORDS, texts=DIGITS, budget=0.02, name="theirs", window=64,
            rank=4,
        )  # fmt: skip
        record = made.record
        served = serve(model(), {made: 1.0}, by="evidence")
        (account_,) = account([served], window_text(DIGITS[:4], tiny.tokenizer(), length=64))
        found[kind] = {
            "factor": record["factor"], "drift": record["drift_base"], "softmax_kl": record["softmax_kl"],
            "nll": [record["held_out"][f"nll_{when}"] for when in ("before", "after")], "served": mean(account_.nll),
        }  # fmt: skip
    return found


@cache
def numeric():
    made = CausalQwenForCausalLM.from_backbone(tiny.backbone()).to(DEVICE)
    return made, made.add_numbers(tiny.tokenizer())


def with_numbers():
    made, tokenizer = numeric()
    other, _ = numeric.__wrapped__()
    examples = make_examples([Pair(text[:60], f" {len(text)}") for text in DIGITS], tokenizer)
    error = fit_values(other, examples)
    learnt = learn_delta(
        made, tiny.tokenizer(), DIGITS, base_texts=WORDS, name="digits", window=64, budget=0.05, **FIT
    )
    fit = AdapterFit(budget=Budget(value=0.05, metric="fisher"), epochs=1, batch=4, lr=5e-3, probe=200)
    adapted = learn_adapter(
        made, tiny.tokenizer(), DIGITS, base_texts=WORDS, name="digits", window=64, fit=fit
    )
    ledger = keep_ledger(fuse(made, {learnt: 1.0}), tiny.tokenizer(), DIGITS[:2], window=64)
    return {"fit": error, **learnt.record["values"], "adapter": adapted.record["values"], **ledger["values"]}


def budgets():
    made = delta("words", quantile=0.9, penalty=None)
    path = FOLDER / "base.jsonl"
    write_documents(path, WORDS)
    found = certify(model(), fuse(model(), {made: 1.0}), tiny.tokenizer(), {"base": path}, window=64)
    kept_values = delta("digits", chart="matrix", location_only=True)
    return {
        "alone": found.figures["base"]["alone"]["words"]["budget"]["mean"],
        "matrix": float(kept_values.second.norm()),
        "penalty": float(delta("words", budget=None, penalty=0.1).second.norm()),
    }  # fmt: skip


def other_modes():
    full = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"), latent_scale=0.3).to(DEVICE)
    ids = torch.tensor([tiny.tokenizer()(DIGITS[0])["input_ids"][:30]], device=DEVICE)
    labels = ids.clone()
    found = {}
    for mode in ("softmax", "deterministic", "causal"):
        options = {"noise": Noise.draw(1, 32, seed=1)} if mode == "causal" else {}
        output = full(input_ids=ids, labels=None if options else labels, mode=mode, **options)
        found[mode] = (
            float(output.logits.float().norm()) if output.loss is None else float(output.loss.detach())
        )
    figures = evaluate(full, tiny.tokenizer(), DIGITS[:3])
    text = full.generate(
        ids, attention_mask=torch.ones_like(ids), mode="causal", noise=Noise.draw(1, 32, seed=2), max_new_tokens=4,
        min_new_tokens=4, pad_token_id=257,
    )  # fmt: skip
    people = abduct(full, text, ids.shape[1], samples=3, generator=torch.Generator().manual_seed(1))
    again = replay(full, people, ids, pad_token_id=257)["sequences"]
    return {
        **found,
        **figures,
        "replayed": bool((again == text).all()),
    }


def routed():
    caches = {
        name: cache_states(model(), window_text(texts, tiny.tokenizer(), length=64), FOLDER / f"{name}.st")
        for name, texts in (("digits", DIGITS), ("words", HELD), ("base", WORDS), ("other", WORDS[::-1]))
    }
    small = DeltaRouterFit(
        budget=0.05, tokens=600, epochs=1, batch=128, candidates=200, sampled=50, probe=200, window=8
    )
    made = route_deltas(model(), [delta(), delta("words")], caches, caches["base"], caches["other"], small)
    return {"weights": list(made.config.fusion["weights"])}


def beams():
    ids = torch.tensor([tiny.tokenizer()(text)["input_ids"][:20] for text in DIGITS[:2]], device=DEVICE)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 257,
    }
    return {
        "beams": fused().generate(ids, num_beams=3, **options).tolist(),
        "static": fused().generate(ids, cache_implementation="static", **options).tolist(),
        "adapter": serve(model(), {adapter(): 1.0}).generate(ids, **options).tolist(),
    }


def observed():
    plain = tiny.backbone().to(DEVICE)
    probes = encode_probes(
        [Probe(text=text) for text in ("12 and 13", "a few words", "7.5, 8.5")], tiny.tokenizer()
    )
    folder = observe(plain, probes, FOLDER / "seen", paths=2, longest=8, encodings=[parse_encoding("paper")])
    grams = load_grams(folder, 1).grams
    ids = torch.arange(24).reshape(2, 12)
    seen = [record(each, ids) for each in (plain, tiny.backbone(seed=1).to(DEVICE))]
    return {
        "grams": float(sum(gram.double().norm() for gram in grams.values())),
        "recorded": float(sum(values.double().norm() for each in seen for values in each.hidden)),
    }


def spread():
    """A layer that lies in memory and comes to the device when it runs."""
    for part in (tiny.backbone(layers=3), tiny.tokenizer()):
        part.save_pretrained(FOLDER / "spread")
    large, tokenizer = load(str(FOLDER / "spread"), device=DEVICE, device_map={"model.layers.1": "cpu"})
    assert is_offloaded(large) == (DEVICE != "cpu")
    learnt = learn_delta(
        large, tokenizer, DIGITS, base_texts=WORDS, name="digits", window=64, budget=0.05, **FIT
    )
    served = fuse(large, {learnt: 1.0})
    ids = torch.arange(40, device=DEVICE)[None]
    made = served.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=257)
    return {"norm": float(learnt.second.norm()), "print": fingerprint(large), "ids": made.tolist()}


FLOWS = {
    "learn": learnt,
    "learn latent, hard": partial(learnt, name="words", metric="latent", hard=True, budget=20.0),
    "learn from several layers": partial(learnt, features="multi"),
    "learn an adapter": learnt_adapter,
    "measure": measured,
    "ledger, evidence": kept,
    "ledger, sum": partial(kept, by="sum"),
    "certify, evidence": partial(certified, fused, 0),
    "certify, leash": partial(certified, partial(fused, by="sum", leash=0.02, gated=False), 1),
    "certify, adapter": partial(certified, lambda: serve(model(), {adapter(): 1.0}), 2),
    "verify": verified,
    "generate": written,
    "align the latent": aligned,
    "calibrate": calibrated,
    "serve an adapter": served_adapter,
    "leash adapters made elsewhere": leashed,
    "numbers": with_numbers,
    "other budgets and charts": budgets,
    "other modes": other_modes,
    "route": routed,
    "beams and caches": beams,
    "observe and record": observed,
    "a layer elsewhere": spread,
}


def main():
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    names = sys.argv[2:] or list(FLOWS)
    found = {}
    if DEVICE == "emu":
        import emulated

        emulated.install()
    for name in names:
        before = emulated.Counter.operations if DEVICE == "emu" else 0
        found[name] = FLOWS[name]()
        if (
            DEVICE == "emu"
            and emulated.Counter.operations - before < 20
            and name not in ("learn an adapter",)
        ):
            raise AssertionError(f"{name}: nothing was done on the device")
        print(name, file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
