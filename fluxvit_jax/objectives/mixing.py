"""Random erasing, mixup and cutmix of normalized patches, on the device.

All three work on pixels, as timm does on images. Clips arrive as patches, so the position of a
pixel in its frame follows from the grid. A box is the same in all frames of a clip.
"""

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, Key

from fluxvit_jax.grids import PATCH
from fluxvit_jax.models.arrays import Array
from fluxvit_jax.models.token_selection import patch_coordinates

# timm's RandomErasing: share of the frame's area, and height over width.
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)


def smooth_one_hot(
    labels: Int[Array, " B"], classes: int, smoothing: float
) -> Float[Array, "B {classes}"]:
    """Soft targets float32 [B, classes]: 1 - s + s / classes for the label, else s / classes."""
    return jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def box_mask(
    box: Int[Array, "B 4"], grid: Int[Array, "B 3"], patches: int
) -> Bool[Array, "B {patches} 588"]:
    """Mask of the pixels of a box in every frame: bool [B, P, 588].

    box: int32 [B, 4], top, left, bottom, right in pixels, the last two exclusive.
    grid: int32 [B, 3]; patches: P.
    """
    patch = patch_coordinates(grid, patches)
    in_patch = jnp.arange(PATCH)
    y = patch.h[..., None] * PATCH + in_patch  # [B, P, 14]
    x = patch.w[..., None] * PATCH + in_patch
    top, left, bottom, right = (box[:, side, None, None] for side in range(4))
    row, column = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return repeat(row[..., :, None] & column[..., None, :], "b p y x -> b p (y x c)", c=3)


def erase(
    patches: Float[Array, "B P 588"],
    grid: Int[Array, "B 3"],
    probability: float,
    keys: Key[Array, " B"],
) -> Float[Array, "B P 588"]:
    """Random erasing: replaces a random box of a clip by noise, with `probability`.

    patches: [B, P, 588]; keys: [B], the source of all randomness.
    """
    size = grid[:, 1:] * PATCH  # height, width

    def draw(key: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The box of one clip, int32 [4], its noise, [P, 588], and whether it is erased."""
        choose, area_key, aspect_key, corner_key, noise_key = jax.random.split(key, 5)
        low, high = ERASED_AREA
        area = jax.random.uniform(area_key, minval=low, maxval=high) * size[0] * size[1]
        low_log, high_log = (jnp.log(side) for side in ERASED_ASPECT)
        aspect = jnp.exp(jax.random.uniform(aspect_key, minval=low_log, maxval=high_log))
        box = jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)])
        # timm samples again if a side is as long as the frame's; clipping needs no loop.
        box = jnp.clip(jnp.round(box).astype(jnp.int32), 1, size - 1)
        # A uniform upper left corner for which the box is inside the frame.
        position = jax.random.uniform(corner_key, (2,))
        corner = jnp.floor(position * (size - box + 1)).astype(jnp.int32)
        noise = jax.random.normal(noise_key, patches.shape[1:], patches.dtype)
        return (
            jnp.concatenate([corner, corner + box]),
            noise,
            jax.random.bernoulli(choose, probability),
        )

    box, noise, chosen = jax.vmap(draw)(keys, size)
    mask = box_mask(box, grid, patches.shape[1])
    return jnp.where(mask & chosen[:, None, None], noise, patches)


def mix(
    patches: Float[Array, "B P 588"],
    targets: Float[Array, "B classes"],
    grid: Int[Array, "B 3"],
    group: int,
    keys: Key[Array, " B"],
    *,
    mixup: float,
    cutmix: float,
    probability: float,
) -> tuple[Float[Array, "B P 588"], Float[Array, "B classes"]]:
    """Mixes each clip with its mirror in the group, by mixup or cutmix (even odds if both).

    patches: [B, P, 588]; targets: [B, classes]; each run of `group` clips shares its grid and
    one proportion (timm's mode "batch" on the batch of one device), from the first of its keys [B].
    mixup, cutmix: parameter of the Beta distribution, 0 for off; not both are 0. Returns patches
    and targets.
    """

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The share of each clip in a group, whether it uses cutmix, and the box center [2]."""
        apply_key, switch_key, share_key, center_key = jax.random.split(key, 4)
        cut = jax.random.bernoulli(switch_key, 0.5 if mixup and cutmix else float(bool(cutmix)))
        # One Beta distribution for both methods: its sampler compiles slowly.
        parameter = jnp.where(cut, cutmix, mixup)
        share = jax.random.beta(share_key, parameter, parameter)
        share = jnp.where(jax.random.bernoulli(apply_key, probability), share, 1.0)
        return share, cut, jax.random.uniform(center_key, (2,))

    share, cut, center = jax.vmap(draw)(keys.reshape(-1, group)[:, 0])

    def mirrored(x: jax.Array) -> jax.Array:
        groups = rearrange(x, "(g clip) ... -> g clip ...", clip=group)
        return rearrange(groups[:, ::-1], "g clip ... -> (g clip) ...")

    size = grid.reshape(-1, group, 3)[:, 0, 1:] * PATCH
    box = jnp.floor(size * jnp.sqrt(1 - share)[:, None]).astype(jnp.int32)
    # The box around a uniform center is clipped to the frame, so its share is recomputed.
    center = jnp.floor(center * size).astype(jnp.int32)
    corners = jnp.concatenate([center - box // 2, center - box // 2 + box], axis=1)
    corners = jnp.clip(corners, 0, jnp.tile(size, (1, 2)))
    area = jnp.prod(corners[:, 2:] - corners[:, :2], axis=1) / jnp.prod(size, axis=1)
    share = jnp.repeat(jnp.where(cut, 1 - area, share), group)
    cut = jnp.repeat(cut, group)

    inside = box_mask(jnp.repeat(corners, group, axis=0), grid, patches.shape[1])
    weight = jnp.where(cut[:, None, None], ~inside, share[:, None, None]).astype(patches.dtype)
    patches = patches * weight + mirrored(patches) * (1 - weight)
    return patches, targets * share[:, None] + mirrored(targets) * (1 - share[:, None])
