"""What paths, signatures, clustering and a merge by Gram matrices cost, and how phi changes with the longest path."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

from benchmarks.finetune import BASE
from tether.causal.loading import load_backbone
from tether.demo.corpora import BASE_TEXTS, DOMAINS, documents
from tether.merge.encoding import encode
from tether.merge.ensembles import spectral_labels, split_half_agreement
from tether.merge.fusion import regression_mean
from tether.merge.gram import load_grams, save_grams, stream_grams
from tether.merge.packing import pack_bank
from tether.merge.paths import PathBank, sample_paths
from tether.merge.probes import EncodedProbe, Probe, encode_probes
from tether.merge.signatures import Signatures
from tether.merge.study import study_lengths
from tether.merge.towers import find_linears
from tether.store.reader import CheckpointReader
from tether.store.writer import ShardWriter

__all__ = ["rows"]

Row = dict[str, Any]

ENSEMBLES = 8
PATHS = 32
"""Paths of each of 12 samples in the study of lengths, so that its noise lies below what it is to see."""


def rows(*, fast: bool, on_step: Callable[[str], None] = lambda name: None) -> list[Row]:
    """Measure on one thread, so that CPU seconds count work and not waiting.

    Args:
        fast: a fraction of samples and layers, and no study of lengths.
        on_step: called between costly parts.

    Returns:
        Rows of case, metric, ours, baseline, ratio, runs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, tokenizer = load_backbone(BASE, dtype=torch.float32)
        texts = [text for recipe in DOMAINS.values() for text in documents(recipe)[:22]]
        probes = encode_probes([Probe(text=text) for text in texts], tokenizer)
        on_step("sampling")
        found = sampling(model, probes[: 2 if fast else 4])
        on_step("encoding")
        found += encoding(model, probes[: 4 if fast else 64])
        on_step("clustering")
        found += clustering(2000 if fast else 11008)
        on_step("merging")
        found += merging(model, probes[:4])
        if not fast:
            on_step("length study")
            found += lengths(model, tokenizer)
    finally:
        torch.set_num_threads(threads)
    return found


def _cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def sampling(model: Any, probes: list[EncodedProbe]) -> list[Row]:
    """Compare sampled paths with one `generate` a path, at equal lengths.

    Args:
        model: the base.
        probes: prompts of 32 tokens.

    Returns:
        One row a batch size.
    """

    def one_by_one() -> None:
        for probe in probes:
            for _ in range(8):
                model.generate(
                    input_ids=probe.input_ids[None],
                    attention_mask=torch.ones(1, len(probe.input_ids)).long(),
                    do_sample=True,
                    top_p=0.9,
                    top_k=0,
                    min_new_tokens=24,
                    max_new_tokens=24,
                )

    def ours(size: int) -> PathBank:
        return sample_paths(model, probes, paths=8, shortest=24, longest=24, batch_size=size)

    with torch.no_grad():
        ours(1)  # warms up
        baseline = [_cpu(one_by_one)[0] for _ in range(2)]
        found = []
        for size in (1, 4):
            mine = [_cpu(lambda s=size: ours(s))[0] for _ in range(2)]
            found.append(
                _row(
                    f"8 paths of 24 tokens a sample, prompts of 32, {size} samples side by side; baseline: one "
                    "generate a path",
                    "CPU seconds",
                    mine,
                    baseline,
                )
            )
    return found


def encoding(model: Any, probes: list[EncodedProbe]) -> list[Row]:
    """Time signatures of all layers and families, with and without gradients.

    Args:
        model: the base.
        probes: prompts.

    Returns:
        Rows; the baseline is the limit of 600 CPU seconds for 64 samples.
    """
    seconds, bank = _cpu(lambda: sample_paths(model, probes, paths=8))
    found = [_row(f"paths of {len(probes)} samples", "CPU seconds", [seconds], [600.0 * len(probes) / 64])]
    stable: list[Row] = []
    for gradients in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            used, read = _cpu(lambda f=folder, g=gradients: encode(model, bank, Path(f) / "s", gradients=g))
            if gradients:
                stable = agreement(model, read)
        kind = "with gradients and Fisher" if gradients else "activations only"
        found.append(
            _row(
                f"signatures, 30 layers x 7 families, {len(probes)} samples, {kind}; baseline: the limit",
                "CPU seconds",
                [used],
                [600.0 * len(probes) / 64],
            )
        )
    return found + stable


def agreement(model: Any, read: Signatures) -> list[Row]:
    """Cluster the neurons of a few layers from either half of the samples and compare the ensembles.

    Args:
        model: the base.
        read: its signatures.

    Returns:
        One row; the baseline is the agreement that ensembles must have to be worth a default.
    """
    linears = find_linears(model)
    layers = [linears[0], linears[len(linears) // 2], linears[-1]]
    each = {name: split_half_agreement(read.phi(name), ENSEMBLES) for layer in layers for name in layer}
    case = f"{ENSEMBLES} ensembles of one layer, two halves of {len(read.loss)} samples; baseline: the least wanted"
    row = _row(case, "adjusted Rand index, median over layers", list(each.values()), [0.6])
    return [row | {"modules": list(each)}]


def clustering(neurons: int) -> list[Row]:
    """Time the low-rank spectral clustering and compare labels with the dense one.

    Args:
        neurons: rows.

    Returns:
        Rows; the dense baseline runs on 2,000 rows only, since its matrix grows with the square.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(neurons, 192, generator=generator)
    features += 2 * torch.randn(8, 192, generator=generator)[torch.arange(neurons) % 8]
    used = [_cpu(lambda: spectral_labels(features, 8))[0] for _ in range(3)]
    part = features[:2000]
    unit = torch.nn.functional.normalize(part, dim=-1)

    def with_matrix() -> Any:
        model = SpectralClustering(8, affinity="precomputed", random_state=0)
        return model.fit_predict(((1 + unit @ unit.T) / 2).numpy())

    dense_seconds, dense = _cpu(with_matrix)
    mine_seconds, mine = _cpu(lambda: spectral_labels(part, 8))
    agreement = float(adjusted_rand_score(dense, mine.numpy()))
    return [
        _row(f"clustering {neurons} neurons of 192 features; baseline: the limit", "CPU seconds", used, [2.0]),
        _row("clustering 2000 neurons; baseline: dense matrix", "CPU seconds", [mine_seconds], [dense_seconds]),
        _row("labels of 2000 neurons; baseline: full agreement with dense", "adjusted Rand index", [agreement], [1.0]),
    ]  # fmt: skip


def merging(model: Any, probes: list[EncodedProbe]) -> list[Row]:
    """Time a whole merge from files to files with the Gram matrices already there.

    Args:
        model: the base; its weights, slightly moved, play the fine-tunes.
        probes: for the Gram matrices, whose number does not change the merge's cost.

    Returns:
        One row; the baseline is the limit of 60 CPU seconds.
    """
    bank = sample_paths(model, probes, paths=2)
    layers = [name for layer in find_linears(model) for name in layer]
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for name in ("a", "b"):
            model.save_pretrained(root / name)
        save_grams(root / "grams-a", stream_grams(model, pack_bank(bank, model), head=True))
        shutil.copytree(root / "grams-a", root / "grams-b")

        def merge() -> None:
            readers = [CheckpointReader(root / name) for name in ("a", "b")]
            held: dict[int, list[dict[str, torch.Tensor]]] = {}
            (root / "merged").mkdir()
            with ShardWriter(root / "merged") as writer:
                for name in readers[0].names:
                    weights = [reader.tensor(name) for reader in readers]
                    module = name.removesuffix(".weight")
                    if module in layers or module == "model.embed_tokens":
                        layer = len(layers) // 7 if module not in layers else layers.index(module) // 7
                        key = module if module in layers else "lm_head"
                        if layer not in held:
                            held.clear()
                            held[layer] = [load_grams(root / f"grams-{m}", layer).grams for m in "ab"]
                        writer.add(name, regression_mean(weights, [part[key] for part in held[layer]]))
                    else:
                        writer.add(name, (weights[0] + weights[1]) / 2)

        used, _ = _cpu(merge)
    case = "whole merge of 135M weights, Gram matrices kept; baseline: the limit"
    return [_row(case, "CPU seconds", [used], [60.0])]


def lengths(model: Any, tokenizer: Any) -> list[Row]:
    """Study the change of phi with the longest path.

    Args:
        model: the base.
        tokenizer: its tokenizer.

    Returns:
        One row a weighting and component; the baseline is the plain token mean.
    """
    texts = documents(BASE_TEXTS["wiki"])[:6] + documents(DOMAINS["code"])[:6]
    probes = encode_probes([Probe(text=text) for text in texts], tokenizer)
    bank = sample_paths(model, probes, paths=PATHS, shortest=64, longest=64, batch_size=2)
    study = study_lengths(model, bank)
    found = []
    for row in study.rows:
        plain = study.row("mean", row.component)
        for length, mine, theirs in zip(study.lengths, row.change, plain.change, strict=False):
            case = f"phi, {row.component}, {row.weighting}: len_max {length} against {study.lengths[-1]}"
            one = _row(f"{case}; baseline: token mean", "relative change", [mine], [theirs])
            found.append(one | {"noise": row.noise, "size": row.size})
    for length, effective, lost in zip(study.lengths, study.effective, study.underflow, strict=True):
        found += [
            _row(
                f"document's weights, len_max {length}; baseline: all",
                "effective paths",
                [effective],
                [float(PATHS)],
            ),
            _row(f"document's weights, len_max {length}", "share zero in float32", [lost], [1.0]),
        ]
    return found + [
        {"case": claim.name, "metric": "verdict", "ours": claim.verdict, "baseline": claim.figures, "ratio": None,
         "runs": 1} for claim in study.claims
    ]  # fmt: skip


def _row(case: str, metric: str, ours: list[float], baseline: list[float]) -> Row:
    mine, theirs = sorted(ours)[len(ours) // 2], sorted(baseline)[len(baseline) // 2]
    return {
        "case": case,
        "metric": metric,
        "ours": mine,
        "baseline": theirs,
        "ratio": mine / theirs,
        "runs": ours,
    }
