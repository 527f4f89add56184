"""Folders of language models whose config.json or index says what cannot be."""

import json

import pytest

from fluxvit_jax.convert import language_model_files
from fluxvit_jax.errors import UserError
from tests.models.chat_golden import write_folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads 0 is no number from 1"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers '3' is no number from 1"),
        ({"head_dim": -1}, "head_dim -1 is no number from 1"),
        ({"rope_scaling": [1]}, r"rope_parameters \[1\] are no object"),
        ({"model_type": ["qwen2"]}, r"model_type \['qwen2'\] is none of"),
        ({"rms_norm_eps": None}, "describes no whole model"),
        ({"num_hidden_layers": 10**9}, "39 tensors are too few for 1000000000 layers"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path, changes, message):
    folder = write_folder(tmp_path / "model", "qwen2")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=message) as caught:
        config = language_model_files.read_config(folder)
        language_model_files.read(folder, language_model_files.shapes(config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "index", ["[" * 100_000, "[]", '{"weight_map": {"a": 5}}', '{"weight_map": {"a": []}}']
)
def test_an_index_that_is_none_is_refused(tmp_path, index):
    folder = write_folder(tmp_path / "model", "qwen2")
    (folder / language_model_files.INDEX).write_text(index)
    with pytest.raises(UserError, match=r"index\.json: cannot be read"):
        language_model_files.fingerprint(folder)
