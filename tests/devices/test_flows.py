"""What users do gives the CPU's figures with the model elsewhere: on the emulated device, and on a real one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FLOWS = Path(__file__).with_name("flows.py")
PATHS = [str(FLOWS.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)


def figures(device, *names):
    """Run flows in a process of their own: the emulated device stays once it is there."""
    done = subprocess.run(
        [sys.executable, FLOWS, device, *names], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(PATHS)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def differences(one, other, tolerance, where=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return [
            line for key in one for line in differences(one[key], other[key], tolerance, f"{where}/{key}")
        ]
    if isinstance(one, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for at, pair in pairs for line in differences(*pair, tolerance, f"{where}[{at}]")]
    same = one == other
    if isinstance(one, float) and isinstance(other, float):
        same = abs(one - other) <= tolerance * max(1.0, abs(one))
    return [] if same else [f"{where}: {one} {other}"]


@pytest.fixture(scope="module")
def expected():
    return figures("cpu")


def test_the_emulated_device_gives_the_figures_of_the_cpu(expected):
    assert differences(expected, figures("emu"), 1e-5) == []


def test_what_cuda_refuses_is_refused():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import emulated, torch\n"
        "emulated.install()\n"
        "there = torch.arange(6.0, device='emu').view(2, 3)\n"
        "assert torch.equal((there @ there.T + 1).cpu(), torch.tensor([[6.0, 15.0], [15.0, 51.0]]))\n"
        "assert there[torch.tensor([1])].device.type == 'emu' and (there * torch.tensor(2.0)).sum().item() == 30\n"
        "refused = [lambda: there + torch.ones(3), lambda: there @ torch.ones(3, 2), lambda: there.numpy(),\n"
        "    lambda: torch.cat([there, torch.ones(1, 3)]), lambda: torch.ones(2, 3).copy_(there).add_(there),\n"
        "    lambda: torch.rand(3, device='emu', generator=torch.Generator())]\n"
        "for number, operation in enumerate(refused):\n"
        "    try:\n"
        "        operation()\n"
        "    except (emulated.WrongDeviceError, TypeError):\n"
        "        continue\n"
        "    raise SystemExit(f'{number} is not refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, FLOWS.parent], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(ACCELERATOR is None, reason="no accelerator")
def test_a_real_device_gives_the_figures_of_the_cpu(expected):
    # Sums are taken in another order there, and fits repeat the difference.
    assert differences(expected, figures(str(ACCELERATOR)), 2e-2) == []
