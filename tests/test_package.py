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


def test_every_public_name_and_config_can_be_what_is_imported_first():
    # Each in a process of its own, forked before transformers is there: an import that leads back to itself fails
    # only where nothing else was imported before.
    script = (
        "import os, sys, torch, tether\n"
        "failed = []\n"
        "for name in sys.argv[1:]:\n"
        "    if (child := os.fork()) == 0:\n"
        "        try:\n"
        "            exec(f'import {name}' if name.startswith('tether.') else f'from tether import {name}')\n"
        "            code = 0\n"
        "        except BaseException as error:\n"
        "            print(name, repr(error))\n"
        "            code = 1\n"
        "        sys.stdout.flush(); os._exit(code)\n"
        "    failed += [name] if os.waitpid(child, 0)[1] else []\n"
        "sys.exit(' '.join(failed) or 0)"
    )
    first = {tether._NAMES[name]: name for name in sorted(tether._NAMES)}
    modules = [
        "tether.causal.config",
        "tether.delta.adapter_config",
        "tether.causal.generation",
        "tether.cli.app",
    ]
    run = subprocess.run(
        [sys.executable, "-c", script, *first.values(), *modules], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


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
