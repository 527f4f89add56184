"""The network that a config describes. Not imported by data workers, which run without JAX."""

from ml_collections import ConfigDict

from fluxvit_jax.config.variants import HEADS, VARIANTS
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import PATCH
from fluxvit_jax.models import attention
from fluxvit_jax.models.fluxvit import FluxViTConfig
from fluxvit_jax.models.freezing import Freezing, freezing_of


def model_config(config: ConfigDict, platform: str = "") -> FluxViTConfig:
    """The network that `config` describes: a variant of `VARIANTS`, changed by `config.model`.

    It has the official three pooling heads and classifiers for any number of trained budgets.

    platform: "cpu", "gpu" or "tpu", which selects the attention kernel and the kind of products;
        without it, those that work everywhere.

    Raises UserError if the platform has no such kernel.
    """
    model, variant = config.model, VARIANTS[config.model.variant]
    side = model.resolution // PATCH
    kernel = choose_attention(config, platform, variant.width // variant.heads)
    return FluxViTConfig(
        width=variant.width,
        depth=variant.depth,
        heads=variant.heads,
        frames=model.frames,
        rows=side,
        columns=side,
        classes=model.classes,
        budgets=HEADS,
        pool_width=variant.pool_width,
        pool_heads=variant.pool_heads,
        layer_scale=variant.layer_scale,
        kernel_std=variant.kernel_std,
        position_scale=variant.position_scale,
        gelu=model.gelu,
        cls=model.cls,
        selector=model.selector.kind,
        groups=model.selector.groups,
        rounding=model.selector.rounding,
        drop_path=model.drop_path,
        dtype=model.dtype,
        scan=model.scan,
        remat=model.remat,
        attention=kernel,
        float32_products=platform == "cpu",
    )


def freezing(config: ConfigDict) -> Freezing:
    """What `config.train.freeze` freezes of the network."""
    return freezing_of(config.train.freeze, VARIANTS[config.model.variant].depth)


def choose_attention(config: ConfigDict, platform: str, head_size: int) -> str:
    """The attention kernel for a head size on a platform; "": one that works everywhere.

    Raises UserError if the platform has no such kernel.
    """
    if not platform:
        return "xla"
    try:
        return attention.choose(config.model.attention, platform, config.model.dtype, head_size)
    except ValueError as error:
        raise UserError(f"config.model.attention: {error}") from error
