"""Serve adapters as a fused model: as experts weighted by evidence, or as moves that are added in a chart.

An adapter moves the hidden state z to z'. Through the frozen abduction that is a move of the law of U in the
same context, so what holds for moves, whoever makes them, holds here: what is promised of experts by evidence, the
charts' bounds given each adapter's own drift, gates, and the run-time leash. What is missing is a bound before
running: an adapter's own drift in a context is known only from its pass.
"""

import copy
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tether.cauchy.charts import CHARTS
from tether.causal.description import check_description
from tether.causal.evidence import Rule
from tether.causal.leash import check_leash
from tether.causal.loading import ALIASES, load
from tether.causal.mixture import Mixture
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.quantising import check_described, recorded, told
from tether.delta.adapter import Adapter
from tether.delta.adapter_backbone import AdaptedBackbone, AdapterFusion
from tether.delta.adapter_config import AdaptedConfig, describe, describe_evidence, serving_options
from tether.delta.adapter_mixture import AdapterMixture
from tether.delta.adapter_passes import Passes
from tether.delta.attached import Attached
from tether.delta.cache import backbone_print
from tether.delta.fusion import manner
from tether.delta.gate import put_gate
from tether.errors import CheckpointError, ConfigError
from tether.files import read_bytes
from tether.names import inside
from tether.reading import JSON_BYTES, parse_json
from tether.store.hub import hub_folder
from tether.store.manifest import Manifest, write_manifest
from tether.store.publish import publish_folder

__all__ = ["BASE", "AdaptedForCausalLM", "find_base", "save_adapted", "serve"]

BASE = "TETHER_BASE"
"""Environment variable that names the base of adapted models, in place of what their folders say."""

ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers whose cache can be cut anywhere, as one must be in which adapters sleep."""


class AdaptedForCausalLM(CausalQwenForCausalLM):
    """A model with adapters in its backbone; made by `serve`, written by `save_adapted`.

    Loaded by `AutoModelForCausalLM` like any checkpoint of tether; its folder holds the adapters, not the base.

    Args:
        config: the base's with `fusion` set by `serve`.
    """

    config_class = AdaptedConfig

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refuse: the folder of such a model holds its adapters, which the model has no more as they were saved.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"served with adapters: expected its folder ({self.name_or_path or 'not written yet'}) to be copied, "
            "or save_adapted(served, adapters, tokenizer, folder, base=...) with the adapters that it was made of"
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *_: Any, **options: Any
    ) -> "AdaptedForCausalLM":
        """Serve again what `save_adapted` wrote.

        Args:
            pretrained_model_name_or_path: folder written by `save_adapted`, or the hub id of one.
            options: `dtype` of the base's weights, and `revision`, `cache_dir` and `token` of the hub; others have no
                meaning here.

        Returns:
            The served model, in evaluation mode.

        Raises:
            CheckpointError: the folder is damaged or cannot be fetched, or the base found is another one.
        """
        folder = hub_folder(str(pretrained_model_name_or_path), options)
        config = AdaptedConfig.from_pretrained(folder)
        described = config.fusion or {}
        check_description(described)
        found = find_base(folder, config.base)
        dtype = options.get("dtype")
        packing = check_described(config.quantised, folder)
        base, _ = load(found, None if dtype == "auto" else dtype, quantization_config=packing)
        loaded = [Adapter.load(inside(folder, name)) for name in described["domains"]]
        if [each.name for each in loaded] != described["domains"]:
            raise CheckpointError(f"{folder}: adapters in folders of other names; take another copy")
        served = serve(
            base, dict(zip(loaded, described["weights"], strict=True)), **serving_options(described)
        )
        served.config.base = config.base
        served.name_or_path = str(folder)
        return served

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptedForCausalLM":
        super()._apply(fn, recurse)
        # Adapters are in a twin of the backbone, which is no part of the model, so that its weights count once.
        backbone: Any = self.backbone
        if isinstance(self.fusion, AdapterMixture):
            self.fusion.kept[1].attached.follow(fn)
        elif isinstance(backbone, AdaptedBackbone):
            backbone.kept[0].follow(fn)
        return self

    def generate(self, *inputs: Any, num_beams: int | None = None, **options: Any) -> Any:
        """Write; see `CausalQwenForCausalLM.generate`.

        Args:
            inputs: as there.
            num_beams: of a sum only 1: beams are reordered in the base's cache, and the adapters' would not follow.
            options: as there.

        Returns:
            As there.

        Raises:
            ConfigError: more than one beam of a sum.
        """
        if num_beams is not None:
            options["num_beams"] = num_beams
        given = [config for config in (options.get("generation_config"), *inputs[1:2]) if config is not None]
        beams = max([num_beams or 1, *(getattr(config, "num_beams", None) or 1 for config in given)])
        if beams != 1 and not isinstance(self.fusion, Mixture):
            raise ConfigError(
                f"num_beams={beams}: a sum of adapters writes with one beam; leave it out, or serve by evidence"
            )
        return super().generate(*inputs, **options)


def find_base(folder: Path, said: str | None) -> str:
    """Find the base of an adapted model, without following what its folder says out of this machine.

    What is taken from the folder is an alias of tether's, or a relative path to a folder that is there and is no
    adapted model itself: it is only read, and its fingerprint is compared. Anything else, a hub id or an absolute
    path, is followed when a user says so in `TETHER_BASE`.

    Args:
        folder: of the adapted model.
        said: `base` in its config.

    Returns:
        Alias, path or hub id for `tether.load`.

    Raises:
        CheckpointError: the base is not there, is not to be followed unasked, or is an adapted model.
    """
    asked = os.environ.get(BASE)
    if asked:
        found = Path(asked)
    elif said in ALIASES:
        return str(said)
    elif not said or "\0" in said or "\\" in said or PureWindowsPath(said).drive or said.startswith("/"):
        raise CheckpointError(_not_followed(folder, said))
    else:
        found = folder / said
        if not (found.is_dir() or (found.is_file() and found.suffix.lower() == ".gguf")):
            raise CheckpointError(_not_followed(folder, said))
    if (found / "config.json").is_file():
        text = read_bytes(found / "config.json", JSON_BYTES)
        # By no schema of ours, since any architecture's is good here; some have infinity in theirs.
        content = parse_json(text, found / "config.json", foreign=True)
        if isinstance(content, dict) and content.get("model_type") == AdaptedConfig.model_type:
            raise CheckpointError(f"{folder}: its base {found} is an adapted model; expected a plain one")
    return asked or str(found)


def _not_followed(folder: Path, said: str | None) -> str:
    return (
        f"{folder}: names its base {ascii(said)[:200]}, which is no folder beside it; another place or absolute path "
        f"from a file is not followed unasked: if you trust it, set {BASE} to the base's path or hub id"
    )


_F = TypeVar("_F", AdapterFusion, AdapterMixture)


def serve(
    model: CausalQwenForCausalLM,
    adapters: Mapping[Adapter, float],
    *,
    by: str | None = None,
    rule: Rule | None = None,
    chart: str | None = None,
    gated: bool | None = None,
    leash: float | None = None,
    leash_metric: str = "softmax",
) -> "AdaptedForCausalLM":
    """Put learnt adapters on a model as a fusion; generation, measuring and certifying work as for deltas.

    Cost of a token: one pass of the backbone and, by evidence, a second one for all adapters together that are awake;
    a sum makes 1 + N passes.

    Args:
        model: the base, without a fusion; it is not touched.
        adapters: each adapter's weight: in a sum finite, any sign; by evidence 1.
        by: `evidence` or `sum`, as of `tether.delta.fusion.fuse`; None takes evidence, or a sum where an option of
            sums is given (chart, leash).
        rule: prior, restarts and floor of evidence; None takes the defaults.
        chart: of a sum, the chart in which their moves are added; None takes `symmetric`.
        gated: whether each adapter acts only where its gate is open (by evidence: sleeps elsewhere); None gates when
            every adapter has a gate.
        leash: of a sum, largest drift of any context, nats, or None.
        leash_metric: `softmax` or `latent`.

    Returns:
        The served model, in evaluation mode. Write it with `save_adapted`.

    Raises:
        ConfigError: no adapters, an unknown chart, a weight that is not finite or by evidence not 1, two of one name,
            a gate asked for and missing, a leash that means nothing, a model that is fused already, or by evidence
            layers with a state that cannot be cut.
        CheckpointError: an adapter was learnt on another base.
    """
    by = manner(by, rule, {"chart": chart, "leash": leash})
    chart = chart or "symmetric"
    if chart not in CHARTS:
        raise ConfigError(f"chart={chart!r}: expected one of {', '.join(CHARTS)}")
    if leash is not None:
        check_leash(leash, leash_metric)
    names = [adapter.name for adapter in adapters]
    if not names or len(set(names)) < len(names) or not all(map(math.isfinite, adapters.values())):
        raise ConfigError(
            f"adapters {names} with weights {list(adapters.values())}: expected at least one, distinct names and "
            "finite weights"
        )
    if model.fusion is not None:
        raise ConfigError(
            f"the model is fused already ({', '.join(model.fusion.domains)}): expected its base"
        )
    if by == "evidence":
        _check_experts(model, adapters)
    for adapter in adapters:
        # The backbone alone counts: an adapter gives z', whatever the latent is.
        if adapter.base != backbone_print(model):
            learnt, given = adapter.record.get("quantised"), recorded(model)
            if learnt != given:
                raise CheckpointError(
                    f"adapter {adapter.name!r} was learnt on a base in {told(learnt)}, the model given is in "
                    f"{told(given)}: its states are others, and so is what the adapter does. Load the base likewise "
                    "(--quantise, quantization_config), or put the adapter on this base with 'tether leash', which "
                    "measures it there"
                )
            raise CheckpointError(
                f"adapter {adapter.name!r} was learnt on base {adapter.base[:19]}..., the model given is "
                f"{backbone_print(model)[:19]}...: learn it again on this base, or name the other base"
            )
    ungated = [adapter.name for adapter in adapters if adapter.gate is None]
    if gated and ungated:
        raise ConfigError(
            f"{', '.join(ungated)}: no gate in the adapter; learn it with a gate, or serve without"
        )
    described = describe(list(adapters), list(adapters.values()), not ungated if gated is None else gated)
    if by == "evidence":
        described |= describe_evidence(list(adapters), rule or Rule())
    else:
        described["chart"] = chart
        if leash is not None:
            described["leash"] = {"nats": leash, "metric": leash_metric}
    with torch.device("meta"):
        served = AdaptedForCausalLM(
            AdaptedConfig(**(model.config.to_dict() | {"model_type": AdaptedConfig.model_type}))
        )
    served.config.fusion, served.config.quantised = described, recorded(model)
    for part in ("numeric", "abduction", "action"):
        setattr(served, part, getattr(model, part))
    attached = Attached.of(model, {adapter.name: adapter for adapter in adapters})
    device = model.action.weight.device
    if by == "evidence":
        passes = Passes(attached, names, model.numeric)
        served.fusion = _gates(list(adapters), AdapterMixture(model.abduction, described, passes), device)
        served.backbone = model.backbone
    else:
        added = AdapterFusion(model.abduction, described)
        served.fusion = _gates(list(adapters), added, device)
        served.backbone = AdaptedBackbone(model.backbone, attached, names, added)
    served.generation_config = copy.deepcopy(model.generation_config)
    served.name_or_path = served.config._name_or_path = ""
    served.eval()
    return served


def _check_experts(model: CausalQwenForCausalLM, adapters: Mapping[Adapter, float]) -> None:
    for adapter, weight in adapters.items():
        if weight != 1 or adapter.strengths != (1.0,):
            at = f"weight {weight:g}" if weight != 1 else f"strengths {list(adapter.strengths)}"
            raise ConfigError(
                f"adapter {adapter.name!r} with {at}: by evidence an adapter takes part whole, since there is no ray "
                "from the base to it; leave the weight out, or by='sum'"
            )
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    if other := sorted(kinds.difference(ATTENTION)):
        raise ConfigError(
            f"layers of kind {', '.join(other)}: adapters that sleep need a cache that can be cut anywhere; serve with "
            "by='sum'"
        )


@torch.no_grad()
def _gates(adapters: list[Adapter], fusion: _F, device: torch.device) -> _F:
    if not fusion.gated:
        return fusion
    names = ("gate_center", "gate_whitening", "gate_precision", "gate_threshold")
    for name in names:
        shape = getattr(fusion, name).shape
        setattr(fusion, name, nn.Parameter(torch.zeros(shape, device=device), requires_grad=False))
    for row, adapter in enumerate(adapters):
        gate = adapter.gate
        if gate is not None:
            put_gate(fusion, row, gate, f"adapter {adapter.name!r}")
    return fusion


def save_adapted(
    served: AdaptedForCausalLM,
    adapters: Mapping[Adapter, float],
    tokenizer: Any,
    folder: str | Path,
    *,
    base: str,
) -> Path:
    """Write what `serve` put together: the adapters, how they are fused, and their gates; not the base.

    Args:
        served: from `serve`.
        adapters: what it was made of.
        tokenizer: the base's tokenizer.
        folder: where to; must be absent or empty.
        base: alias, path or hub id under which the base is found again; its fingerprint is checked then.

    Returns:
        The folder, which becomes the model's `name_or_path`.
    """
    folder = Path(folder)
    served.config.base = _beside(base, folder)
    with publish_folder(folder) as target:
        served.config.save_pretrained(target)
        tokenizer.save_pretrained(target)
        recipe = {
            "base": base,
            "base_fingerprint": served.config.base_fingerprint,
            "fusion": served.config.fusion,
        }
        write_manifest(target, Manifest(kind="adapted", recipe=recipe))
        # Last, so that a domain that is named as one of the files above is refused.
        for adapter in adapters:
            adapter.save(target / adapter.name)
    served.name_or_path = str(folder)
    return folder


def _beside(base: str, folder: Path) -> str:
    if not Path(base).exists():
        return base
    try:
        return Path(os.path.relpath(base, folder)).as_posix()
    except ValueError:  # on another drive of Windows
        return str(Path(base).absolute())


AutoModelForCausalLM.register(AdaptedConfig, AdaptedForCausalLM, exist_ok=True)
