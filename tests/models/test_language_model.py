"""Decoders against numbers of Hugging Face Transformers, and their folders."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fluxvit_jax.convert import language_model_files
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.language_model import graphdef
from tests.models.chat_golden import MODELS, QWEN, tensors, write_folder, write_tensors

FAMILIES = tuple(MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Qwen2 in one file, Qwen3 in three."""
    top = tmp_path_factory.mktemp("models")
    return {
        family: write_folder(top / family, family, files=1 + 2 * number)
        for number, family in enumerate(FAMILIES)
    }


@pytest.fixture(scope="module")
def models(folders):
    return {family: load(folder) for family, folder in folders.items()}


def load(folder):
    config = language_model_files.read_config(folder)
    params = language_model_files.read(folder, language_model_files.shapes(config))
    return fluxvit.from_params(graphdef(config), jax.tree.map(jnp.asarray, params))


def case(family, name):
    prefix = f"{family}.{name}."
    return {n.removeprefix(prefix): QWEN[n] for n in QWEN.files if n.startswith(prefix)}


def close(found, expected, tolerance=1e-5):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["one", "padded_right", "small_embeddings"])
def test_golden_logits_loss_and_gradients(models, family, name):
    model, golden = models[family], case(family, name)
    targets = golden["labels"][:, 1:]
    counted = targets >= 0

    @jax.jit
    def loss_of(x):
        hidden = model.encode(x, remat=True)
        logits = model.logits(hidden)
        scores = jax.nn.log_softmax(logits[:, :-1])
        own = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], axis=2)[..., 0]
        return -jnp.sum(own * counted) / counted.sum(), (hidden, logits)

    with jax.default_matmul_precision("highest"):
        (loss, (hidden, logits)), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            jnp.asarray(golden["inputs_embeds"])
        )
    real = golden["attention_mask"] == 1
    close(hidden[real], golden["after_final_norm"][real])
    close(logits[real], golden["logits"][real])
    assert loss == pytest.approx(MODELS[family]["cases"][name]["loss"], rel=1e-6)
    close(gradient, golden["d_inputs_embeds"])


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_logits_from_ids(models, family):
    golden = case(family, "ids")
    model = models[family]
    close(model.logits(model.encode(model.embed(golden["input_ids"]))), golden["logits"])


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_greedy_tokens_with_a_cache(models, family):
    """Padding is on the left, and the prompt goes in whole."""
    model, golden = models[family], case(family, "generate")
    L = golden["attention_mask"].shape[1]
    count = golden["tokens"].shape[1]
    begin = jnp.asarray(L - golden["attention_mask"].sum(axis=1))
    extend = jax.jit(lambda x, cache: model.extend(x, cache))
    hidden, cache = extend(golden["inputs_embeds"], model.new_cache(begin, L + count))
    for number in range(count):
        logits = model.logits(hidden[:, -1])
        close(logits, golden["logits"][:, number])
        token = jnp.argmax(logits, axis=1)
        np.testing.assert_array_equal(token, golden["tokens"][:, number])
        hidden, cache = extend(model.embed(token[:, None]), cache)


def test_a_cache_filled_by_pieces_changes_nothing(models):
    model, x = models["qwen3"], jnp.asarray(case("qwen3", "one")["inputs_embeds"])
    whole = model.encode(x)
    cache = model.new_cache(jnp.zeros(1, jnp.int32), 30)
    pieces = []
    for part in jnp.split(x, (9, 10, 17), axis=1):
        hidden, cache = model.extend(part, cache)
        pieces.append(hidden)
    close(jnp.concatenate(pieces, axis=1), whole, 1e-6)


def test_llama_has_no_biases_and_no_norms_of_heads(folders, tmp_path):
    """Qwen2's and Qwen3's code without both: a Qwen3 whose norms of heads are taken away."""
    folder = tmp_path / "llama"
    shutil.copytree(folders["qwen3"], folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "llama"}))
    with pytest.raises(UserError, match=r"has also .*self_attn.k_norm.weight and 3 more"):
        load(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    state = {n: x for n, x in tensors("qwen3").items() if "k_norm" not in n and "q_norm" not in n}
    write_tensors(folder, {n: x for n, x in state.items() if n != "model.norm.weight"})
    with pytest.raises(UserError, match=r"is not the model of its config.json: lacks model.norm"):
        load(folder)
    write_tensors(folder, state)
    assert load(folder).embed(jnp.zeros((1, 2), jnp.int32)).shape == (1, 2, 48)


def test_weights_come_sharded_in_the_dtype_that_is_wanted(folders, tmp_path):
    config = language_model_files.read_config(folders["qwen2"])
    narrow = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors("qwen2").items()}
    folder = tmp_path / "bfloat16"
    shutil.copytree(folders["qwen2"], folder)
    write_tensors(folder, narrow)
    sharding = NamedSharding(jax.make_mesh((1,), ("fsdp",)), P())
    shapes = language_model_files.shapes(config)
    wanted = jax.tree.map(
        lambda like: jax.ShapeDtypeStruct(like.shape, "bfloat16", sharding=sharding), shapes
    )
    found = language_model_files.read(folder, wanted)
    plain = language_model_files.read(folders["qwen2"], shapes)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        assert (one.dtype, one.sharding) == (jnp.bfloat16, sharding)
        np.testing.assert_array_equal(one, other.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_folder_is_that_which_was_read(folders, tmp_path, family):
    config = language_model_files.read_config(folders[family])
    params = language_model_files.read(folders[family], language_model_files.shapes(config))
    narrow = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    for name, tree in (("wide", params), ("narrow", narrow)):
        language_model_files.write(tmp_path / name, config, tree)
        assert language_model_files.read_config(tmp_path / name) == config
        again = language_model_files.read(
            tmp_path / name, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        )
        jax.tree.map(np.testing.assert_array_equal, again, tree)
    golden = tensors(family)
    with language_model_files.TensorFiles.open(tmp_path / "wide") as files:
        assert files.tensors.keys() == golden.keys()
        for tensor, file in files.tensors.items():
            np.testing.assert_array_equal(file.get_tensor(tensor), golden[tensor])
    with language_model_files.TensorFiles.open(tmp_path / "narrow") as files:
        dtypes = {file.get_tensor(tensor).dtype for tensor, file in files.tensors.items()}
        assert dtypes == {jnp.dtype(jnp.bfloat16)}


def test_a_model_of_no_family_is_not_written(folders, tmp_path):
    config = language_model_files.read_config(folders["qwen3"])
    params = language_model_files.read(folders["qwen3"], language_model_files.shapes(config))
    both = type(config)(**{**vars(config), "qkv_bias": True})
    with pytest.raises(UserError, match="has both qkv_bias and qk_norm"):
        language_model_files.write(tmp_path / "model", both, params)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written"):
        language_model_files.write(tmp_path / "file", config, params)


def test_a_part_of_a_parameter_is_read_alone(folders):
    """As by the devices that share it."""
    folder = folders["qwen2"]
    whole = language_model_files.read(
        folder, language_model_files.shapes(language_model_files.read_config(folder))
    )
    with language_model_files.TensorFiles.open(folder) as files:
        for own, array in (
            ("layers/k/kernel", whole["layers"]["k"]["kernel"]),
            ("layers/k/bias", whole["layers"]["k"]["bias"]),
            ("token_embed", whole["token_embed"]),
            ("output/kernel", whole["output"]["kernel"]),
        ):
            index = tuple(slice(1, size // 2 + 1) for size in array.shape)
            np.testing.assert_array_equal(files.part(own, array.shape, index), array[index])


def test_a_fingerprint_is_of_the_weights(folders, tmp_path):
    found = language_model_files.fingerprint(folders["qwen2"])
    write_folder(tmp_path / "again", "qwen2", files=2)
    assert language_model_files.fingerprint(tmp_path / "again") == found
    changed = {name: x + (name == "model.norm.weight") for name, x in tensors("qwen2").items()}
    write_folder(tmp_path / "other", "qwen2")
    write_tensors(tmp_path / "other", changed)
    assert language_model_files.fingerprint(tmp_path / "other") != found


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is none of qwen2, qwen3, llama"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"hidden_size": None}, "describes no whole model"),
        ({"vocab_size": 161}, r"lm_head.weight is \[160, 64\], and config.json says \[161"),
    ],
)
def test_other_models_are_refused(folders, tmp_path, changes, message):
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen2"], folder)
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        load(folder)


def test_damaged_folders_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match=r"no language model: there is no config\.json"):
        load(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen3"], folder)
    first, second, _ = sorted(folder.glob("model-*.safetensors"))
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{second.name}: cannot be read as .safetensors"):
        load(folder)
    first.unlink()
    with pytest.raises(UserError, match=f"there is no {first.name}"):
        load(folder)


def test_rope_as_newer_transformers_write_it(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen2"], folder)
    values = json.loads((folder / "config.json").read_text())
    del values["rope_theta"]
    newer = MODELS["qwen2"]["keys_that_transformers_5_writes"]
    (folder / "config.json").write_text(json.dumps(values | newer))
    assert language_model_files.read_config(folder) == language_model_files.read_config(
        folders["qwen2"]
    )
