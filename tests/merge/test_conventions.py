"""Models of equal shapes that compute different functions are refused; so is what a recipe says twice or in vain."""

import numpy as np
import pytest

from checkpoints import LLAMA, decoder, family, plan, save, tuned
from tether.errors import ConfigError
from tether.merge.run import merge
from tether.store.reader import CheckpointReader

FULL = LLAMA | {
    "model_type": "llama",
    "hidden_size": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "hidden_act": "silu",
}
TOKENS = list("abcdefghij")


@pytest.fixture
def models(tmp_path):
    return family(tmp_path, FULL, TOKENS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, "num_attention_heads 8 instead of 4"),
        ({"rope_theta": 1e6}, "rope_parameters.rope_theta 1e+06 instead of 10000"),
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "rope_parameters.rope_theta 500000 instead of 10000",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters.rope_type linear instead of default",
        ),
        ({"rms_norm_eps": 1.0}, "rms_norm_eps 1 instead of 1e-06"),
        ({"model_type": "gemma"}, "family gemma instead of llama"),
        ({"hidden_act": "gelu"}, "hidden_act gelu instead of silu"),
    ],
)
def test_configs_under_which_equal_shapes_are_another_function(tmp_path, models, change, said):
    config = {key: value for key, value in (FULL | change).items() if value is not None}
    save(tmp_path / "b", tuned(decoder(), 2), config, TOKENS)
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path, **models)
    assert said in str(caught.value)
    assert "b: its config has" in str(caught.value)


def test_the_same_said_in_other_words_is_the_same(tmp_path, models):
    config = {key: value for key, value in FULL.items() if key != "rope_theta"}
    config |= {
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        "head_dim": 2,
        "hidden_act": "swish",
    }
    save(tmp_path / "b", tuned(decoder(), 2), config, TOKENS)
    assert plan(tmp_path, **models).notes == ()


def test_another_small_epsilon_is_noted(tmp_path, models):
    save(tmp_path / "b", tuned(decoder(), 2), FULL | {"rms_norm_eps": 1e-5}, TOKENS)
    assert plan(tmp_path, **models).notes == ("b: rms_norm_eps 1e-05; that of base, 1e-06, will be used",)


def test_of_several_overrides_the_last_one_holds(tmp_path, models):
    overrides = [{"match": "*", "keep": "base"}, {"match": "*.mlp.*", "options": {"lambda": 2.0}}]
    merge(plan(tmp_path, **models, overrides=overrides), tmp_path / "out")
    found, base = CheckpointReader(tmp_path / "out"), CheckpointReader(tmp_path / "c")
    parts = [CheckpointReader(tmp_path / name) for name in "ab"]
    name = "model.layers.0.mlp.up_proj.weight"
    own = base.tensor(name)
    wanted = own + 2.0 * sum(0.5 * (part.tensor(name) - own) for part in parts)
    np.testing.assert_allclose(found.tensor(name), wanted, rtol=1e-5, atol=1e-6)
    assert np.array_equal(found.tensor("lm_head.weight"), base.tensor("lm_head.weight"))


def test_overrides_in_vain_or_of_the_parent_are_refused(tmp_path, models):
    overrides = [{"match": "*.mlp.*", "options": {"lambda": 2.0}}, {"match": "*", "keep": "base"}]
    with pytest.raises(ConfigError, match=r"overrides\.0: every tensor .* is kept"):
        plan(tmp_path, **models, overrides=overrides)
    with pytest.raises(ConfigError, match=r"models\.base: not one of the models a, b"):
        plan(tmp_path, **models, overrides=[{"match": "*.mlp.*", "models": {"base": {"weight": 2.0}}}])


def test_another_companion_makes_another_merge(tmp_path, models):
    first = merge(plan(tmp_path, **models), tmp_path / "out")
    assert merge(plan(tmp_path, **models), tmp_path / "out") == first
    (tmp_path / "c" / "generation_config.json").write_text('{"max_new_tokens": 9}')
    with pytest.raises(ConfigError, match="out"):
        merge(plan(tmp_path, **models), tmp_path / "out")


def test_all_chat_templates_are_carried_over(tmp_path, models):
    folder = tmp_path / "c" / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("{{ tools }}")
    merge(plan(tmp_path, **models), tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"


def test_other_eyes_are_noted_where_they_are_kept_and_refused_where_they_are_merged(tmp_path, models):
    for name, layer in (("a", -2), ("b", -1), ("c", -1)):
        config = {"text_config": LLAMA, "vision_config": {"hidden_size": 8}, "vision_feature_layer": layer}
        save(tmp_path / name, tuned(decoder(), 1), config)
    assert plan(tmp_path, **models).notes == (
        "a: outside its language model its config differs in vision_feature_layer; that of base will be used",
    )
    with pytest.raises(ConfigError, match="a: its config has vision_feature_layer -2 instead of -1"):
        plan(tmp_path, **models, towers="merge")


def test_models_without_a_config_are_noted(tmp_path, models):
    (tmp_path / "b" / "config.json").unlink()
    assert plan(tmp_path, **models).notes == ("configs not compared, no config.json beside the weights: b",)


def test_a_long_value_is_told_where_it_differs(tmp_path, models):
    for name, last in (("a", 2), ("b", 1), ("c", 1)):
        save(tmp_path / name, tuned(decoder(), 1), LLAMA | {"odd": [*range(100), last]})
    with pytest.raises(
        ConfigError, match=r"odd \.\.\.95, .* 99, 2\] instead of \.\.\.95, .* 99, 1\] in base"
    ):
        plan(tmp_path, **models)
