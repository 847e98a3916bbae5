"""`tether generate` as a user meets it: three modes, individuals that come back, numbers in and out."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

import tiny
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.noise import Noise
from tether.causal.numbers import NumericTokenizer
from tether.cli.output import plain

PROMPT = "Rate 12.50 of 3,000"


@pytest.fixture
def generate(monkeypatch, tether, work):
    monkeypatch.chdir(work)
    return lambda *arguments: tether("generate", *arguments, "--new-tokens", "12")


@pytest.fixture
def text(generate):
    def run(*arguments):
        code, out, err = generate(*arguments)
        assert code == 0, err
        return out

    return run


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base, a model without numbers and one that writes a number now and then."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("base", "plain", "numeric"):
        model, tokenizer = tiny.backbone("qwen2"), tiny.tokenizer()
        if name != "base":
            model = CausalQwenForCausalLM.from_backbone(model, latent_scale=0.1)
        if name == "numeric":
            tokenizer = model.add_numbers(tokenizer)
            with torch.no_grad():
                model.action.bias[258] = 4.5
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def expected(folder, prompt, numeric, **options):
    model = CausalQwenForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer = NumericTokenizer(tokenizer) if numeric else tokenizer
    encoded = tokenizer(prompt, return_tensors="pt")
    written = model.generate(
        **encoded, max_new_tokens=12, pad_token_id=257, return_dict_in_generate=True, **options
    )
    start = encoded["input_ids"].shape[1]
    ids = written["sequences"][0, start:]
    if not numeric:
        return plain(prompt + tokenizer.decode(ids, skip_special_tokens=True)) + "\n", 0
    values = written["numeric_values"][0, start:]
    rest = tokenizer.decode(ids, values, skip_special_tokens=True, precision=6)
    return plain(prompt + rest) + "\n", int((ids == 258).sum())


def test_the_command_starts_in_a_process_of_its_own(work):
    # Where nothing of transformers or tether was imported before.
    command = [sys.executable, "-m", "tether.cli.app", "generate", "plain", "Rate 12", "--new-tokens", "3"]
    run = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Rate 12")


def test_numbers_are_read_and_written_in_every_mode(work, text):
    for mode in ("softmax", "deterministic", "causal"):
        options = {"noise": Noise.draw(1, 32, seed=3)} if mode == "causal" else {}
        wanted, numbers = expected(work / "numeric", PROMPT, True, mode=mode, **options)
        assert numbers >= 1
        got = text("numeric", PROMPT, "--mode", mode, "--seed", 3)
        assert got == wanted
        assert got.startswith(PROMPT)
        assert "<NUM>" not in got
    # The value is read, not its digits.
    others = [text("numeric", prompt)[len(prompt) :] for prompt in ("Rate 12.5", "Rate 12.50", "Rate 99.5")]
    assert others[0] == others[1] != others[2]


def test_a_model_without_numbers_reads_digits(work, text):
    greedy = tiny.backbone("qwen2").generate(
        **tiny.tokenizer()(PROMPT, return_tensors="pt"), max_new_tokens=12, do_sample=False, pad_token_id=257
    )
    wanted = plain(tiny.tokenizer().decode(greedy[0], skip_special_tokens=True)) + "\n"
    assert text("plain", PROMPT) == text("base", PROMPT) == wanted
    noise = Noise.draw(1, 32, seed=0)
    assert (
        text("plain", PROMPT, "--mode", "causal")
        == expected(work / "plain", PROMPT, False, mode="causal", noise=noise)[0]
    )


def test_a_seed_is_an_individual(text):
    for more in ((), ("--shared-noise",), ("--common-noise", 0.3), ("--truncation", 0.01)):
        drawn = [text("numeric", "ab", "--mode", "causal", "--seed", seed, *more) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
    causal = ("numeric", "ab", "--mode", "causal", "--seed", 1)
    forms = (), ("--shared-noise",), ("--common-noise", 0.3), ("--truncation", 0.9)
    assert len({text(*causal, *form) for form in forms}) == 4
    assert text(*causal, "--truncation", 1) == text("numeric", "ab")


@pytest.mark.parametrize("shared", [False, True])
def test_an_individual_is_kept_and_acts_again_elsewhere(work, text, tmp_path, shared):
    file = tmp_path / "new" / "who.safetensors"
    flags = ["--shared-noise"] if shared else []
    first = text("numeric", PROMPT, "--mode", "causal", "--seed", 7, "--noise", file, *flags)
    assert first == text("numeric", PROMPT, "--mode", "causal", "--seed", 7, *flags)
    noise = Noise.load(file)
    assert (noise.seeds.tolist(), noise.size, noise.shared) == ([7], 32, shared)
    written = file.read_bytes()
    assert text("numeric", PROMPT, "--mode", "causal", "--seed", 99, "--noise", file) == first
    other = text("numeric", "Elsewhere 5", "--mode", "causal", "--noise", file, *flags)
    assert other == text("numeric", "Elsewhere 5", "--mode", "causal", "--seed", 7, *flags)
    assert file.read_bytes() == written


BAD = {
    "unknown mode": (["--mode", "argmax"], "softmax, deterministic, causal"),
    "temperature": (["--mode", "causal", "--temperature", 1.0], "only softmax mode"),
    "common noise in another mode": (["--common-noise", "0.1"], "only causal mode"),
    "all noise in common": (["--mode", "causal", "--common-noise", "1"], "common=1.0"),
    "shared noise in another mode": (["--shared-noise"], "only causal mode"),
    "truncation in another mode": (["--truncation", 0.1, "--mode", "deterministic"], "only causal mode"),
    "noise in another mode": (["--noise", "new"], "only causal mode"),
    "negative truncation": (["--mode", "causal", "--truncation=-0.5"], "truncation=-0.5"),
    "truncation above 1": (["--mode", "causal", "--truncation", 2], "truncation=2"),
    "negative seed": (["--mode", "causal", "--seed=-1", "--noise", "new"], "seed=-1"),
    "no noise": (["--mode", "causal", "--noise", "base/config.json"], "config.json"),
    "other tensors": (["--mode", "causal", "--noise", "base/model.safetensors"], "written by Noise.save"),
    "another latent": (["--mode", "causal", "--noise", "small.noise"], "31 dimensions"),
    "two individuals": (["--mode", "causal", "--noise", "two.noise"], "2 individuals"),
    "own noise each": (["--mode", "causal", "--noise", "one.noise", "--shared-noise"], "for each position"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_one_message_with_exit_2(work, generate, case):
    for name, noise in (
        ("small", Noise.draw(1, 31, seed=1)),
        ("two", Noise.draw(2, 32, seed=1)),
        ("one", Noise.draw(1, 32, seed=1)),
    ):
        noise.save(work / f"{name}.noise")
    before = sorted(work.iterdir())
    arguments, message = BAD[case]
    code, out, err = generate("numeric", "ab", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("tether:") == 1
    assert "Traceback" not in err
    assert sorted(work.iterdir()) == before


def test_a_tokenizer_of_another_model_is_refused(work, generate, tmp_path):
    CausalQwenForCausalLM.from_pretrained(work / "numeric").save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(tmp_path)
    code, _, err = generate(tmp_path, "ab 3")
    assert code == 2
    assert "the model's is 258" in err
