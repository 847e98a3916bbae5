import subprocess
import sys

import pytest

import tether


def test_every_public_name_resolves():
    for name in tether.__all__:
        assert getattr(tether, name) is not None
    assert dir(tether) == tether.__all__
    with pytest.raises(AttributeError, match="learn_delta"):
        tether.learn_detla  # noqa: B018


@pytest.mark.parametrize(
    "order",
    [
        "import tether, transformers",
        "import transformers, tether",
        # Leads through a config's docstring to the models' Auto module, long before AutoTokenizer can be had.
        "import tether; from transformers import AutoTokenizer",
        "from transformers import AutoTokenizer; import tether",
    ],
)
@pytest.mark.parametrize("kind", ["CausalQwen", "Adapted"])
def test_transformers_knows_the_model_types_whatever_is_imported_first(order, kind):
    model_type = {"CausalQwen": "causal_qwen", "Adapted": "causal_qwen_adapted"}[kind]
    script = (
        f"{order}; from transformers import AutoConfig, AutoModelForCausalLM\n"
        "from transformers.models.auto import modeling_auto\n"
        "assert modeling_auto.AutoModelForCausalLM is AutoModelForCausalLM, 'was imported twice'\n"
        f"config = AutoConfig.for_model({model_type!r})\n"
        "print(type(config).__name__, AutoModelForCausalLM._model_mapping[type(config)].__name__)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [f"{kind}Config", f"{kind}ForCausalLM"]


def test_import_tether_is_light():
    script = "import sys, tether; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_modules_are_reached_from_the_package_alone():
    script = (
        "import tether; names = [tether.cauchy.divergence.drift, tether.cauchy.charts.fuse, "
        "tether.causal.losses.ovr_loss, tether.theory.bounds.fused_drift_bound, tether.delta.gate.fit_gate]; "
        "assert all(map(callable, names))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
