"""Layers that are computed again in the backward pass: the same adapter, from less memory."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, OPTConfig

import tiny
from tether.delta.adapter import lora_config
from tether.delta.adapter_learning import fit_adapter, learn_adapter
from tether.delta.adapter_training import AdapterFit
from tether.delta.attached import Attached
from tether.delta.budget import Budget
from tether.delta.recomputing import as_served, recomputing
from tether.errors import ConfigError

FIT = AdapterFit(budget=Budget(value=0.05), batch=4, lr=5e-3, probe=500, gate=False)


def fit(model, caches, **options):
    chosen = AdapterFit(
        **{name: getattr(FIT, name) for name in ("budget", "batch", "lr", "probe", "gate")}, **options
    )
    return fit_adapter(model, caches["digits"], caches["words"], caches["words-held-out"], "digits", chosen)


def kept_bytes(loss):
    """Bytes that are kept for the backward pass, and the gradients."""
    kept = {}

    def pack(values):
        kept[values.data_ptr()] = values.nbytes
        return values

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
        made = loss()
    return sum(kept.values()), made


def test_the_adapter_is_the_same(model, caches):
    modes = [part.training for part in model.modules()]
    plain, again = fit(model, caches), fit(model, caches, gradient_checkpointing=True)
    assert again.record["fit"]["gradient_checkpointing"]
    assert again.record["curve"] == plain.record["curve"]
    assert max(float(values.abs().max()) for name, values in plain.tensors.items() if "lora_B" in name) > 0.01
    for name, values in plain.tensors.items():
        assert_close(again.tensors[name], values, rtol=0, atol=1e-6)
    assert not model.backbone.is_activation_checkpointing
    assert [part.training for part in model.modules()] == modes


def test_less_is_kept_and_the_gradients_are_those(model, generator):
    ids = torch.randint(256, (4, 60), generator=generator)
    attached = Attached(model, "a", lora_config(4, 8), torch.Generator().manual_seed(0))
    found = []
    for wanted in (False, True):
        attached.peft.zero_grad()
        with recomputing(attached.backbone, wanted=wanted):
            size, loss = kept_bytes(lambda: attached.states("a", ids).last_hidden_state.square().sum())
            loss.backward()
        grads = {
            name: part.grad.clone() for name, part in attached.peft.named_parameters() if part.requires_grad
        }
        found.append((size, loss.item(), grads))
    (plain, loss, grads), (less, again, others) = found
    assert less < plain / 3
    assert again == loss
    assert all(torch.equal(others[name], grad) for name, grad in grads.items())
    assert any(grad.abs().max() > 0 for grad in grads.values())


def opt():
    """An architecture whose layers drop out by themselves, and not by modules inside."""
    config = OPTConfig(
        vocab_size=258, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, dropout=0.5, attention_dropout=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*` is deprecated")
def test_nothing_is_dropped_in_layers_that_train_nor_when_the_model_trains_again(generator):
    model = opt()
    ids = torch.randint(256, (2, 20), generator=generator)
    model.eval()
    model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    expected = {name: part.grad.clone() for name, part in model.named_parameters()}
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with as_served(model):
        size, loss = kept_bytes(lambda: model(input_ids=ids, use_cache=False).logits.square().sum())
    assert all(part.training for part in model.modules())
    # Its layers are computed again in here, with the model in training mode.
    loss.backward()
    for name, part in model.named_parameters():
        assert_close(part.grad, expected[name], rtol=1e-5, atol=1e-5)
    model.gradient_checkpointing_disable()
    model.eval()
    plain, _ = kept_bytes(lambda: model(input_ids=ids, use_cache=False).logits.square().sum())
    assert size < 0.8 * plain


def test_a_backbone_that_cannot_is_refused_before_a_text_is_read(model, tokenizer, monkeypatch):
    monkeypatch.setattr(type(model.backbone), "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: .*LlamaModel.*leave it out"):
        learn_adapter(
            model,
            tokenizer,
            "missing.jsonl",
            base_texts="missing.jsonl",
            fit=AdapterFit(gradient_checkpointing=True),
        )


def test_numbers_too(tokenizer, caches):
    """Where the backbone is given embeddings in place of ids."""
    from tether.causal.modeling import CausalQwenForCausalLM

    made = []
    for wanted in (False, True):
        model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
        model.add_numbers(tiny.tokenizer())
        chosen = AdapterFit(
            budget=Budget(value=0.05), batch=4, lr=5e-3, probe=200, gate=False, gradient_checkpointing=wanted
        )
        texts = tiny.documents("digits", 12, 1), tiny.documents("words", 12, 2)
        made.append(
            learn_adapter(model, tokenizer, texts[0], base_texts=texts[1], name="a", window=64, fit=chosen)
        )
    for name, values in made[0].tensors.items():
        assert_close(made[1].tensors[name], values, rtol=0, atol=1e-6)
