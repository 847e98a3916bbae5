"""One trial of the merge experiment: a parent, two fine-tunes, their paths and statistics, and ways to merge them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.finetune import BASE, FineTune, fine_tuned, losses, windows
from benchmarks.operands import merge_tensor
from tether.causal.loading import load_backbone
from tether.demo.corpora import DOMAINS, documents
from tether.merge.fusion import regression_mean
from tether.merge.gram import gram_file, load_grams, save_grams, stream_grams
from tether.merge.packing import Pack, pack_bank
from tether.merge.paths import PathBank, load_bank, sample_paths, save_bank
from tether.merge.probes import Probe, encode_probes
from tether.merge.towers import find_linears

__all__ = ["PAIR", "State", "Trial"]

State = dict[str, Tensor]
Rule = Callable[[str, int, Tensor, Tensor, Tensor], Tensor]

PAIR = ("code", "tables")
GENERAL = "wiki"
VALIDATION = 6
"""Windows of each domain on which every method's options are chosen."""


class Trial:
    """Two fine-tunes of one parent on the domains of PAIR, and what merges are made and measured with.

    Args:
        seed: of fine-tunes and paths.
        folder: for statistics.
        samples: probes of each domain.
        tests: held-out windows of each domain.
        on_step: called between costly parts with their name.
    """

    def __init__(
        self, seed: int, folder: Path, samples: int, tests: int, on_step: Callable[[str], None]
    ) -> None:
        self.seed, self.folder, self.on_step = seed, folder, on_step
        self.shell, self.tokenizer = load_backbone(BASE, dtype=torch.float32)
        self.parent = self.state_of(self.shell)
        self.tuned = []
        for domain in PAIR:
            on_step(f"fine-tune {domain}, seed {seed}")
            model, _ = load_backbone(str(fine_tuned(FineTune(domain, seed), lambda _: on_step(""))))
            self.tuned.append(self.state_of(model))
        self.linears = {n: i for i, layer in enumerate(find_linears(self.shell)) for n in layer}
        self.validation = [windows(domain, "validation", self.tokenizer, VALIDATION) for domain in PAIR]
        self.test = [windows(domain, "test", self.tokenizer, tests) for domain in PAIR]
        self.general = windows(GENERAL, "test", self.tokenizer, tests // 2)
        self.probes = [
            [Probe(text=text) for text in self._texts(domain, "probe")[:samples]] for domain in PAIR
        ]
        self.banks: dict[int, PathBank] = {}

    @staticmethod
    def _texts(domain: str, split: str) -> list[str]:
        from benchmarks.finetune import SPLITS

        texts = documents(DOMAINS[domain])
        low, high = (round(len(texts) * share) for share in SPLITS[split])
        return texts[low:high]

    @staticmethod
    def state_of(model: Any) -> State:
        """Copy a model's weights, tied ones once.

        Args:
            model: a causal LM.

        Returns:
            Names to weights.
        """
        tied = model.config.tie_word_embeddings
        return {n: t.clone() for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}

    def load(self, state: State) -> Any:
        """Put weights into the one model that all states share.

        Args:
            state: names to weights.

        Returns:
            The model.
        """
        self.shell.load_state_dict(state, strict=False)
        return self.shell

    def measure(self, state: State, sets: list[Tensor], name: str) -> list[Tensor]:
        """Measure losses of windows.

        Args:
            state: weights.
            sets: windows.
            name: what to tell on_step.

        Returns:
            Nats a token, a tensor a set.
        """
        self.on_step(name)
        model = self.load(state)
        return [losses(model, tokens) for tokens in sets]

    def validate(self, state: State, name: str) -> float:
        """Measure the mean of both domains on the validation windows.

        Args:
            state: weights.
            name: what to tell on_step.

        Returns:
            Nats a token.
        """
        return float(torch.stack([part.mean() for part in self.measure(state, self.validation, name)]).mean())

    def bank(self, model: int) -> PathBank:
        """Give a model's own paths over the probes of both domains, the first domain's first.

        Args:
            model: 0 or 1.

        Returns:
            The paths.
        """
        file = self.folder / f"paths-{model}.safetensors"
        if model not in self.banks and file.is_file():
            self.banks[model] = load_bank(file)
        if model not in self.banks:
            self.on_step(f"paths of model {model}")
            probes = encode_probes([probe for part in self.probes for probe in part], self.tokenizer)
            self.banks[model] = sample_paths(self.load(self.tuned[model]), probes, seed=self.seed)
            self.folder.mkdir(parents=True, exist_ok=True)
            save_bank(file, self.banks[model])
        return self.banks[model]

    def half(self, bank: PathBank, domain: int) -> PathBank:
        """Keep the samples of one domain.

        Args:
            bank: from `bank`.
            domain: 0 or 1.

        Returns:
            Its paths.
        """
        count = len(bank.probes) // 2
        part = slice(domain * count, (domain + 1) * count)
        return PathBank(bank.probes[part], bank.tokens[part], bank.log_prob[part], bank.lengths[part])

    def grams(
        self, model: int, bank: PathBank, name: str, weights: Callable[[Pack], Tensor] | None = None
    ) -> Path:
        """Accumulate a model's Gram matrices on paths.

        Args:
            model: 0 or 1.
            bank: the paths.
            name: of the folder.
            weights: of positions.

        Returns:
            The folder.
        """
        folder = self.folder / f"gram-{name}"
        self.on_step(f"Gram matrices {name}")
        if gram_file(folder, 1 + max(self.linears.values())).is_file():
            return folder
        shell = self.load(self.tuned[model])
        save_grams(folder, stream_grams(shell, pack_bank(bank, shell), weights=weights, head=True))
        return folder

    def merge(self, rule: Rule, scale: float = 1.0) -> State:
        """Merge: a rule for the decoder's linear layers and the tied head, the mean for everything else.

        Args:
            rule: of module, layer, weights of A, B and C.
            scale: factor on the change from the parent.

        Returns:
            The weights.
        """
        merged = {}
        for name, parent in self.parent.items():
            first, second = (state[name] for state in self.tuned)
            module = name.removesuffix(".weight")
            if module in self.linears:
                value = rule(module, self.linears[module], first, second, parent)
            elif module == "model.embed_tokens":
                value = rule("lm_head", 1 + max(self.linears.values()), first, second, parent)
            else:
                value = (first + second) / 2
            merged[name] = value if scale == 1 else parent + scale * (value - parent)
        return merged

    def gram_merge(
        self,
        first: list[Path],
        second: list[Path],
        *,
        head: bool = True,
        shrinkage: float = 0.9,
        shares: Callable[[str], Tensor | None] = lambda module: None,
    ) -> State:
        """Merge by the regression mean.

        Args:
            first: folders of A's Gram matrices, added up.
            second: of B's.
            head: also the tied head; otherwise its mean.
            shrinkage: of the Gram matrices.
            shares: of each module's rows.

        Returns:
            The weights.
        """
        held: dict[int, list[dict[str, Tensor]]] = {}

        def rule(module: str, layer: int, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            del c
            if module == "lm_head" and not head:
                return (a + b) / 2
            if layer not in held:
                held.clear()
                held[layer] = []
                for folders in (first, second):
                    parts = [load_grams(folder, layer).grams for folder in folders]
                    held[layer].append({n: torch.stack([p[n] for p in parts]).sum(0) for n in parts[0]})
            return regression_mean(
                [a, b], [part[module] for part in held[layer]], shrinkage=shrinkage, shares=shares(module)
            )

        return self.merge(rule)

    def baseline(self, operator: str, options: dict[str, Any], settings: dict[str, Any]) -> State:
        """Merge by a named operator, every tensor alike.

        Args:
            operator: its name.
            options: of the operator.
            settings: of both models.

        Returns:
            The weights.
        """
        return {
            name: merge_tensor(
                operator, name, parent, [state[name] for state in self.tuned], options, settings
            )
            for name, parent in self.parent.items()
        }

    def scaled(self, state: State, scale: float) -> State:
        """Scale the change from the parent.

        Args:
            state: merged weights.
            scale: the factor.

        Returns:
            New weights.
        """
        return {name: parent + scale * (state[name] - parent) for name, parent in self.parent.items()}
