"""The text encoder of Flux-CLIP: its network, and its weights, frozen or to start from."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints import checkpointer
from fluxvit_jax.config.variants import TEXT_ENCODERS
from fluxvit_jax.convert import official_names, weight_files
from fluxvit_jax.convert.text_encoder_names import TEXT_ENCODER, text_state
from fluxvit_jax.distributed import partition_rules, storage
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.mesh import device_put_global
from fluxvit_jax.distributed.partition_rules import Rules
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.text_encoder import TextEncoder, TextEncoderConfig

Tree = dict[str, Any]

TEXT = "text_encoder"  # its name among parameters, trained or frozen


def text_encoder_config(config: ConfigDict) -> TextEncoderConfig:
    """The network that `config.clip.network` names."""
    sizes = TEXT_ENCODERS[config.clip.network]._asdict()
    return TextEncoderConfig(**sizes, dtype=config.model.dtype)


def shapes(config: ConfigDict) -> Tree:
    """Shapes of its parameters, float32."""
    network = text_encoder_config(config)
    return jax.eval_shape(lambda: fluxvit.split(TextEncoder(network, nnx.Rngs(0)))[1])


def abstract(config: ConfigDict, mesh: Mesh | AbstractMesh, rules: Rules) -> Tree:
    """Shapes and shardings of a frozen encoder: sharded like a trained one, in the compute dtype.

    Raises UserError if the size of a mesh axis does not divide a dimension sharded over it.
    """
    tree = {TEXT: shapes(config)}
    partition_rules.check(tree, mesh, config.clip.network, rules)
    dtype = jnp.dtype(config.model.dtype)

    def stored(path: tuple, leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        narrow = leaf.ndim > 1 and path[-1].key not in ("scale", "bias")
        return jax.ShapeDtypeStruct(leaf.shape, dtype if narrow else leaf.dtype, sharding=sharding)

    shardings = partition_rules.shardings(tree, mesh, rules)
    return jax.tree_util.tree_map_with_path(stored, tree, shardings)


def load(config: ConfigDict, mesh: Mesh, rules: Rules) -> Tree:
    """A frozen encoder's parameters on the mesh. Raises UserError as `read`."""
    expected = abstract(config, mesh, rules)
    params = {TEXT: read(config)}
    cast = jax.tree.map(lambda leaf, like: np.asarray(leaf, like.dtype), params, expected)
    say(f"the text encoder is {config.clip.network} of {config.clip.text_encoder}")
    return device_put_global(cast, jax.tree.map(lambda like: like.sharding, expected))


def read(config: ConfigDict) -> Tree:
    """The parameters in `config.clip.text_encoder`, float32 numpy arrays.

    That is a file of MobileCLIP, open_clip or InternVideo2 CLIP, or a run that has trained one.

    Raises UserError: there are none, they are damaged, or of another size.
    """
    source = config.clip.text_encoder
    if checkpointer.has_step(storage.path_of(source)):
        params = checkpointer.restore(source).params.get(TEXT)
        if params is None:
            raise UserError(f"{source}: is a run without a trained text encoder")
    else:
        state = text_state(weight_files.read_tensors(source)[0])
        try:
            params = official_names.from_official(state, of=TEXT_ENCODER)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    checkpointer.check_fit(params, shapes(config), source)
    return params
