"""A recipe with an objective of its own, outside the package: `--config=.../toy.py:DATA`.

It is contrastive, so its loss compares the clips of the whole batch: a clip's vector, by a trained
projection, agrees with a frozen projection of the clip's mean pixels.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fluxvit_jax.config.network import model_config
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.blocks import l2_normalize
from fluxvit_jax.objectives.base import Objective, register
from tests import tiny


@register("toy")
class Toy(Objective):
    whole_batch = True
    partition_rules = (("toy/kernel", P("fsdp", None)),)

    def __init__(self, graph, limits, budget, group):
        self.graph, self.limits, self.budget, self.group = graph, limits, budget, group

    @classmethod
    def from_config(cls, config, limits, platform):
        graph = fluxvit.graphdef(model_config(config, platform))
        return cls(graph, limits, config.train.budgets[0], config.data.clips_per_grid)

    @classmethod
    def init_params(cls, config, key):
        return {"toy": {"kernel": jax.random.normal(key, (64, 8))}}

    @classmethod
    def abstract_frozen(cls, config, mesh):
        shape, whole = (fluxvit.PATCH_VALUES, 8), NamedSharding(mesh, P())
        return {"target": jax.ShapeDtypeStruct(shape, np.float32, sharding=whole)}

    @classmethod
    def load_frozen(cls, config, mesh):
        target = np.random.default_rng(0).normal(size=(fluxvit.PATCH_VALUES, 8)).astype(np.float32)
        return {"target": jax.device_put(target, NamedSharding(mesh, P()))}

    def value_and_grad(self, params, frozen, batch):
        def loss(params):
            model = fluxvit.from_params(self.graph, fluxvit.network_params(params))
            patches = fluxvit.normalize(batch["patches"])
            kept = model.select(patches, batch["grid"], self.budget, self.limits, None)
            position = model.position(batch["grid"][:: self.group], kept.token_index, self.limits)
            tokens = model.encode(fluxvit.gather_tokens(patches, kept), position, kept, None)
            ours = l2_normalize(model.pool_tokens(tokens, kept, 0) @ params["toy"]["kernel"])
            theirs = l2_normalize(jnp.mean(patches, axis=1) @ frozen["target"])
            return -jnp.mean(jnp.diag(jax.nn.log_softmax(ours @ theirs.T / 0.1)))

        value, gradients = jax.value_and_grad(loss)(params)
        return gradients, {"loss": value}


def get_config(folder: str):
    config = tiny.make_config(Path(folder), train__objective="toy", model__drop_path=0.0)
    config.optim.eps = 1e-5  # of gradients that are rounding alone, Adam would make whole steps
    return config
