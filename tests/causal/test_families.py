"""Every causal LM family of transformers is wrapped exactly, or refused with its name and a reason."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
from tether.causal.modeling import CausalQwenForCausalLM
from tether.errors import ConfigError

KNOWN = {
    "llama": (1.0, None),
    "cohere": (families.SCALE, None),
    "granite": (1 / families.SCALE, None),
    "hyperclovax": (families.SCALE, None),
    "falcon_h1": (families.SCALE, None),
    "minicpm3": (8 / 32, None),
    "inkling_text": (1 / families.SCALE, None),
    "gemma2": (1.0, families.CAP),
    "gemma4_text": (1.0, families.CAP),
    "nanochat": (1.0, families.CAP),
}
"""What these do after their head: multiplier and cap."""

REFUSED = {
    "bart": "BartForCausalLM.*not what AutoModel makes",
    "cpmant": "CpmAntForCausalLM.*going on with a text from its cache",
    "gptj": "GPTJForCausalLM.*has a bias",
    "llama4_text": "Llama4ForCausalLM.*names no backbone",
    "mamba": "MambaForCausalLM.*past_key_values",
    "reformer": r"ReformerModelWithLMHead.*output head of shape \(64, 64\), expected \(64, 32\)",
}

# Families warn of options of theirs; what they warn of is not looked at here.
pytestmark = pytest.mark.filterwarnings("ignore")


def ids():
    return torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def agree(model, expected, **inputs):
    with torch.no_grad():
        made = model(input_ids=ids(), **inputs).logits
    assert made.shape == expected.shape
    assert float((made - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def check_exact(base, model, folder):
    """The wrapper's logits are the base's on other tokens than it was checked on, also when it comes back, and so is
    the text that it writes."""
    with torch.no_grad():
        expected = base(input_ids=ids()).logits
    agree(model, expected)
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(again, CausalQwenForCausalLM)
    agree(again, expected)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids())
    assert torch.equal(model.generate(ids(), **options), base.generate(ids(), **options))


@pytest.mark.parametrize("kind", KNOWN)
def test_what_a_base_does_after_its_head_is_found_and_kept(kind, tmp_path):
    if kind not in families.FAMILIES:
        pytest.skip(f"this transformers has no {kind}")
    base = families.model(kind)
    model = CausalQwenForCausalLM.from_backbone(base)
    scale, cap = KNOWN[kind]
    assert model.config.logit_scale == pytest.approx(scale, rel=1e-12)
    assert model.config.logit_cap == cap
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert model.config.tie_word_embeddings == tied
    assert (model.action.weight is model.get_input_embeddings().weight) == tied
    check_exact(base, model, tmp_path)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_wrapped_is_refused_with_name_and_reason(kind):
    if kind not in families.FAMILIES:
        pytest.skip(f"this transformers has no {kind}")
    with pytest.raises(ConfigError, match=f"(?s){REFUSED[kind]}"):
        CausalQwenForCausalLM.from_backbone(families.model(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in families.FAMILIES if kind not in families.UNBUILT])
def test_every_family_is_exact_or_refused(kind, tmp_path):
    base = families.model(kind)
    with torch.no_grad():
        base(input_ids=ids()[:1])
    refused = ""
    try:
        model = CausalQwenForCausalLM.from_backbone(base)
    except ConfigError as error:
        refused = str(error)
    if refused:
        assert refused.startswith(f"{type(base).__name__}: ")
    else:
        check_exact(base, model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", families.UNBUILT)
def test_families_that_are_not_built_cannot_be_built(kind):
    if kind not in families.FAMILIES:
        pytest.skip(f"this transformers has no {kind}")
    with pytest.raises(Exception):  # noqa: B017 - each fails in its own way
        families.model(kind)(input_ids=ids()[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["granite", "gemma2"])
def test_in_half_precision_the_number_of_the_config_is_found(kind, dtype):
    base = families.model(kind).to(dtype)
    model = CausalQwenForCausalLM.from_backbone(base)
    assert (model.config.logit_scale, model.config.logit_cap) == pytest.approx(KNOWN[kind])
    with torch.no_grad():
        expected, made = (each(input_ids=ids()).logits.double() for each in (base, model))
    if kind == "gemma2":
        assert torch.equal(made, expected)
    assert float((made - expected).abs().max()) <= 4 * torch.finfo(dtype).eps * float(expected.abs().max())


@pytest.mark.parametrize(
    ("change", "difference"),
    [(lambda logits: logits + logits.square() / 100, "differ"),
     (lambda logits: torch.cat([logits[:, :-1] + 0.01, logits[:, -1:]], 1), "differ"),
     (lambda logits: logits * 1.001, "differ"),
     (lambda logits: logits[..., :-1], "shape"), (lambda logits: logits * torch.nan, "differ")],
)  # fmt: skip
def test_anything_else_that_a_base_does_is_refused_with_the_difference(change, difference):
    base = families.model("llama")
    forward = base.forward

    def changed(*args, **options):
        out = forward(*args, **options)
        out.logits = change(out.logits)
        return out

    base.forward = changed
    with pytest.raises(ConfigError, match=f"LlamaForCausalLM.*{difference}"):
        CausalQwenForCausalLM.from_backbone(base)


def test_a_base_that_changes_only_what_it_writes_from_its_cache_is_refused():
    base = families.model("llama")
    forward = base.forward

    def changed(*args, **options):
        out = forward(*args, **options)
        if options.get("input_ids").shape[1] == 1:
            out.logits = out.logits + 1e-3 * out.logits.square()
        return out

    base.forward = changed
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.*differ"):
        CausalQwenForCausalLM.from_backbone(base)
