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


@pytest.mark.parametrize("order", ["import tether, transformers", "import transformers, tether"])
def test_transformers_knows_the_model_type_whatever_is_imported_first(order):
    script = (
        f"{order}; from transformers import AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.for_model('causal_qwen')\n"
        "print(type(config).__name__, AutoModelForCausalLM._model_mapping[type(config)].__name__)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["CausalQwenConfig", "CausalQwenForCausalLM"]


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
