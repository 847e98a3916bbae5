"""Devices without an end and pipes without a writer, where a user or a file names them: exit 2 in under 5 seconds."""

import os

import pytest

import tiny
from fuzzing import DEVICE_SECONDS, devices, within
from tether.causal.checkpoint import save_checkpoint
from tether.causal.modeling import CausalQwenForCausalLM

COMMANDS = {
    "a certificate": ["verify", "DEVICE"],
    "a recipe": ["merge", "run", "DEVICE", "--out", "out"],
    "a model": ["generate", "DEVICE", "x"],
    "a delta": ["fuse", "base", "DEVICE", "--out", "out"],
    "a text": ["learn", "base", "--text", "DEVICE", "--base-text", "DEVICE", "--out", "a.delta"],
    "pairs": ["train", "base", "--text", "DEVICE.jsonl", "--out", "run"],
    "options": ["train", "base", "--text", "words.txt", "--options", "DEVICE", "--out", "run"],
    "a key": ["certify", "base", "base", "--text", "words.txt", "--out", "c.json", "--sign", "DEVICE"],
    "probes": ["merge", "observe", "base", "--probes", "DEVICE", "--out", "out"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, a text, a pipe, and links to a device under names with and without a suffix."""
    folder = tmp_path_factory.mktemp("devices")
    save_checkpoint(CausalQwenForCausalLM.from_backbone(tiny.backbone()), tiny.tokenizer(), folder / "base")
    (folder / "words.txt").write_text("One text.\n" * 40)
    for suffix in ("", ".jsonl"):
        os.mkfifo(folder / f"pipe{suffix}")
        (folder / f"zero{suffix}").symlink_to("/dev/zero")
    return folder


@devices
@pytest.mark.parametrize("device", ["pipe", "zero"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_device_is_refused_before_it_is_waited_for(tether, monkeypatch, folder, name, device):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    command = [part.replace("DEVICE", device) for part in COMMANDS[name]]
    with within(DEVICE_SECONDS, command):
        code, _, err = tether(*command)
    assert code == 2, err
    assert device in err
    assert sorted(folder.iterdir()) == before
