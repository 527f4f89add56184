"""Random erasing, mixup and cutmix of normalised patches, on the device.

All three work on pixels, as timm does on images; clips arrive cut into patches, so a pixel's place
in its frame follows from the grid. A box is the same in all frames of a clip.
"""

import jax
import jax.numpy as jnp

from fluxvit_jax.models.selection import layout

PATCH = 14

# timm's RandomErasing: share of the frame's area, and height over width.
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)


def smooth_one_hot(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """Soft targets float32 [B, classes]: 1 - s + s / classes for the label, s / classes else."""
    return jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def box_mask(box: jax.Array, grid: jax.Array, places: int) -> jax.Array:
    """The pixels of a box in every frame: bool [B, P, 588].

    box: int32 [B, 4], top, left, bottom, right in pixels, the last two exclusive.
    grid: int32 [B, 3]; places: P.
    """
    where = layout(grid, places)
    inside = jnp.arange(PATCH)
    y = where.h[..., None] * PATCH + inside  # [B, P, 14]
    x = where.w[..., None] * PATCH + inside
    top, left, bottom, right = (box[:, side, None, None] for side in range(4))
    row, column = (y >= top) & (y < bottom), (x >= left) & (x < right)
    mask = row[..., :, None, None] & column[..., None, :, None]
    return jnp.broadcast_to(mask, (*mask.shape[:-1], 3)).reshape(*mask.shape[:2], -1)


def erase(patches: jax.Array, grid: jax.Array, probability: float, keys: jax.Array) -> jax.Array:
    """Replaces a random box of a clip by noise, with `probability`.

    patches: [B, P, 588]; keys: [B], all that a clip's box and noise depend on.
    """
    size = grid[:, 1:] * PATCH  # height, width

    def draw(key: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of one clip: its box, int32 [4], the noise [P, 588], and whether it is erased."""
        choose, area_key, aspect_key, place_key, noise_key = jax.random.split(key, 5)
        low, high = ERASED_AREA
        area = jax.random.uniform(area_key, minval=low, maxval=high) * size[0] * size[1]
        low, high = (jnp.log(side) for side in ERASED_ASPECT)
        aspect = jnp.exp(jax.random.uniform(aspect_key, minval=low, maxval=high))
        box = jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)])
        # timm draws again when a side is as long as the frame's; cutting it off needs no loop.
        box = jnp.clip(jnp.round(box).astype(jnp.int32), 1, size - 1)
        # A uniform upper left corner with which it lies inside the frame.
        share = jax.random.uniform(place_key, (2,))
        corner = jnp.floor(share * (size - box + 1)).astype(jnp.int32)
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
    patches: jax.Array,
    targets: jax.Array,
    grid: jax.Array,
    group: int,
    keys: jax.Array,
    *,
    mixup: float,
    cutmix: float,
    probability: float,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each clip with the one opposite in its group, by mixup or cutmix (even odds if both).

    patches: [B, P, 588]; targets: [B, classes]; each run of `group` clips shares its grid and
    draws one proportion (timm's mode "batch" on the batch of one device), by the first of its keys
    [B]. mixup, cutmix: the Beta distribution's parameter; 0 for off, not both. Returns patches and
    targets.
    """
    B, P, _ = patches.shape
    G = B // group

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of one group: the clip's own share, whether a box is cut, and its centre, 0 to 1, [2]."""
        apply_key, switch_key, share_key, place_key = jax.random.split(key, 4)
        cut = _switch(mixup, cutmix, switch_key)
        # One Beta for both ways: its sampler is long to compile.
        parameter = jnp.where(cut, cutmix, mixup)
        share = jax.random.beta(share_key, parameter, parameter)
        share = jnp.where(jax.random.bernoulli(apply_key, probability), share, 1.0)
        return share, cut, jax.random.uniform(place_key, (2,))

    share, cut, centre = jax.vmap(draw)(keys.reshape(G, group)[:, 0])

    def opposite(x):
        return x.reshape(G, group, *x.shape[1:])[:, ::-1].reshape(x.shape)

    size = grid.reshape(G, group, 3)[:, 0, 1:] * PATCH
    box = jnp.floor(size * jnp.sqrt(1 - share)[:, None]).astype(jnp.int32)
    # The box is cut at the frame's edge around a uniform centre, so its share is what is left.
    centre = jnp.floor(centre * size).astype(jnp.int32)
    corners = jnp.concatenate([centre - box // 2, centre - box // 2 + box], axis=1)
    corners = jnp.clip(corners, 0, jnp.tile(size, (1, 2)))
    area = jnp.prod(corners[:, 2:] - corners[:, :2], axis=1) / jnp.prod(size, axis=1)
    share = jnp.repeat(jnp.where(cut, 1 - area, share), group)
    cut = jnp.repeat(cut, group)

    inside = box_mask(jnp.repeat(corners, group, axis=0), grid, P)
    weight = jnp.where(cut[:, None, None], ~inside, share[:, None, None]).astype(patches.dtype)
    patches = patches * weight + opposite(patches) * (1 - weight)
    return patches, targets * share[:, None] + opposite(targets) * (1 - share[:, None])


def _switch(mixup: float, cutmix: float, key: jax.Array) -> jax.Array:
    """Whether a group cuts rather than blends."""
    odds = 0.5 if mixup and cutmix else float(bool(cutmix))
    return jax.random.bernoulli(key, odds)
