import pytest

import tiny_moe


@pytest.fixture
def moe():
    return tiny_moe.build("qwen3_moe")
