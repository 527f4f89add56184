"""Erasing, mixup and cutmix in patch space against plain NumPy on the frames."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxvit_jax.data.patches import PATCH_VALUES, unpatchify
from fluxvit_jax.grids import PATCH, Grid
from fluxvit_jax.objectives import mixing

GROUP = 4
GRIDS = [Grid(2, 3, 5), Grid(3, 4, 4), Grid(5, 2, 3), Grid(1, 7, 6), Grid(2, 1, 1)]
CLIP_GRIDS = [grid for grid in GRIDS for _ in range(GROUP)]
B, PLACES = len(CLIP_GRIDS), 50
LABELS = np.eye(B, dtype=np.float32)  # a class for each clip, so that a target tells its clips


def clips(seed: int = 0) -> np.ndarray:
    """Patches [B, P, 588] with all values different in the clips of a group, padding included."""
    return np.random.default_rng(seed).normal(size=(B, PLACES, PATCH_VALUES)).astype(np.float32)


def frames_of(patches: np.ndarray, clip: int) -> np.ndarray:
    return unpatchify(np.asarray(patches[clip]), CLIP_GRIDS[clip])


def opposite(clip: int) -> int:
    first = clip - clip % GROUP
    return first + GROUP - 1 - clip % GROUP


def keys(key: jax.Array, clips: int = B) -> jax.Array:
    """One for each clip."""
    return jax.random.split(key, clips)


@partial(jax.jit, static_argnames=("mixup", "cutmix", "probability"))
def mix(patches, key, mixup, cutmix, probability):
    grid = jnp.asarray(CLIP_GRIDS)
    recipe = {"mixup": mixup, "cutmix": cutmix, "probability": probability}
    return mixing.mix(patches, jnp.asarray(LABELS), grid, GROUP, keys(key), **recipe)


@partial(jax.jit, static_argnames="probability")
def erase(patches, key, probability):
    return mixing.erase(patches, jnp.asarray(CLIP_GRIDS), probability, keys(key))


def box_of(changed: np.ndarray) -> tuple[int, int]:
    """Height and width of the one box of changed pixels [T, h, w, 3], alike in all frames."""
    assert (changed == changed[:1, :, :, :1]).all()
    pixels = changed[0, :, :, 0]
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    if not len(rows):
        return 0, 0
    assert pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    return rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]


def own_share(targets: np.ndarray, clip: int) -> np.float32:
    """What is left of a clip's own class; the rest is its opposite's and no other class's."""
    partner = opposite(clip)
    np.testing.assert_allclose(targets[clip, clip] + targets[clip, partner], 1, rtol=1e-6)
    assert not np.delete(targets[clip], [clip, partner]).any()
    return targets[clip, clip]


@pytest.mark.parametrize("seed", range(4))
def test_mixup(seed):
    patches = clips()
    mixed, targets = jax.device_get(mix(patches, jax.random.key(seed), 0.8, 0.0, 1.0))
    shares = [own_share(targets, clip) for clip in range(B)]
    for clip, share in enumerate(shares):
        expected = share * frames_of(patches, clip) + (1 - share) * frames_of(
            patches, opposite(clip)
        )
        np.testing.assert_allclose(frames_of(mixed, clip), expected, atol=1e-6)
    by_group = np.reshape(shares, (-1, GROUP))
    assert (by_group == by_group[:, :1]).all() and len(set(by_group[:, 0])) == len(GRIDS)


@pytest.mark.parametrize("seed", range(8))
def test_cutmix(seed):
    patches = clips()
    mixed, targets = jax.device_get(mix(patches, jax.random.key(seed), 0.0, 1.0, 1.0))
    boxes = []
    for clip, grid in enumerate(CLIP_GRIDS):
        ours, own = frames_of(mixed, clip), frames_of(patches, clip)
        changed = ours != own
        boxes.append(box_of(changed))
        np.testing.assert_array_equal(
            ours, np.where(changed, frames_of(patches, opposite(clip)), own)
        )
        area = np.prod(boxes[-1])
        pixels = grid.rows * grid.columns * PATCH**2
        assert abs(own_share(targets, clip) - (1 - area / pixels)) < 2e-7  # float32's last digit
    for first in range(0, B, GROUP):
        assert len(set(boxes[first : first + GROUP])) == 1
    assert len(set(boxes)) > 1


def test_cutmix_boxes_are_as_timm_draws_them():
    """The box's sides are sqrt(1 - lambda) of the frame's, cut at the edge around any centre."""
    grid = jnp.tile(jnp.asarray([(1, 3, 5)]), (2000, 1))
    own = jnp.tile(jnp.asarray([0.0, 1.0])[:, None, None], (1000, 15, PATCH_VALUES))
    targets = jnp.tile(jnp.eye(2), (1000, 1))
    compiled = jax.jit(partial(mixing.mix, group=2, mixup=0.0, cutmix=1.0, probability=1.0))
    mixed, targets = compiled(own, targets, grid, keys=keys(jax.random.key(0), 2000))
    share = np.asarray(targets[::2, 1])
    inside = np.asarray(mixed[::2]).mean(axis=(1, 2))
    np.testing.assert_allclose(inside, share, atol=1e-5)
    # lambda is uniform, and so is the centre: in each direction a box of side s keeps
    # s - s^2 / 4 of its length in the mean.
    side = np.sqrt(np.linspace(0, 1, 10001))
    expected = np.mean((side - side**2 / 4) ** 2)
    assert abs(share.mean() - expected) < 5 * share.std() / 1000**0.5 + 0.01


def test_groups_do_not_mix_and_padding_does_not_matter():
    """Other clips elsewhere and other padding leave a group's result as it is, bit by bit."""
    patches, changed = clips(), clips(seed=1)
    for clip in range(GROUP, 2 * GROUP):
        changed[clip, : CLIP_GRIDS[clip].tokens] = patches[clip, : CLIP_GRIDS[clip].tokens]
    for seed in range(6):
        key = jax.random.key(seed)
        ours, theirs = (mix(x, key, 0.8, 1.0, 1.0) for x in (patches, changed))
        np.testing.assert_array_equal(ours[1], theirs[1])
        erased, also_erased = (erase(x, key, 1.0) for x in (patches, changed))
        for clip in range(GROUP, 2 * GROUP):
            np.testing.assert_array_equal(frames_of(ours[0], clip), frames_of(theirs[0], clip))
            np.testing.assert_array_equal(frames_of(erased, clip), frames_of(also_erased, clip))


def test_probability_zero_is_off():
    same, targets = mix(clips(), jax.random.key(0), 0.8, 1.0, 0.0)
    np.testing.assert_array_equal(same, clips())
    np.testing.assert_array_equal(targets, LABELS)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"mixup": 0.8, "cutmix": 1.0, "probability": 0.6}, (0.4, 0.3, 0.3)),
        ({"mixup": 0.8, "cutmix": 0.0, "probability": 1.0}, (0, 1, 0)),
    ],
)
def test_shares_of_groups_left_alone_blended_and_cut(recipe, expected):
    groups = 400
    grid = jnp.tile(jnp.asarray([(1, 2, 2)]), (2 * groups, 1))
    own = jnp.tile(jnp.asarray([0.0, 1.0])[:, None, None], (groups, 4, PATCH_VALUES))
    labels = jnp.tile(jnp.eye(2), (groups, 1))
    compiled = jax.jit(partial(mixing.mix, group=2, **recipe))
    first = np.asarray(
        compiled(own, labels, grid, keys=keys(jax.random.key(0), 2 * groups))[0][::2]
    )
    alone = (first == 0).all(axis=(1, 2))
    blended = ~alone & (first == first[:, :1, :1]).all(axis=(1, 2))
    cut = ~alone & ~blended
    # Four deviations, and some room for boxes that are empty or the whole frame.
    found = np.mean([alone, blended, cut], axis=1)
    assert (abs(found - expected) < 0.12).all(), found
    assert cut.any() == bool(recipe["cutmix"])
    # Of Beta(0.8, 0.8); five deviations.
    shares = 1 - first[blended, 0, 0]
    assert np.var(shares) == pytest.approx(1 / (4 * 2.6), abs=0.35 / np.sqrt(len(shares)))


def test_the_middle_clip_of_an_odd_group_is_mixed_with_itself():
    patches = clips()[:3]
    compiled = jax.jit(partial(mixing.mix, group=3, mixup=0.8, cutmix=0.0, probability=1.0))
    grid = jnp.asarray([GRIDS[0]] * 3)
    mixed, targets = compiled(patches, jnp.eye(3), grid, keys=keys(jax.random.key(0), 3))
    np.testing.assert_allclose(mixed[1], patches[1], atol=1e-6)
    np.testing.assert_allclose(targets[1], np.eye(3)[1], atol=1e-6)
    assert (np.asarray(mixed[0]) != patches[0]).any()


@pytest.mark.parametrize("seed", range(6))
def test_erase(seed):
    patches = clips()
    erased = np.asarray(erase(patches, jax.random.key(seed), 1.0))
    noise, boxes = [], []
    for clip, grid in enumerate(CLIP_GRIDS):
        ours, own = frames_of(erased, clip), frames_of(patches, clip)
        changed = ours != own
        noise.append(ours[changed])
        boxes.append(box_of(changed))
        height, width = boxes[-1]
        pixels = grid.rows * grid.columns * PATCH**2
        # Sides are rounded to whole pixels, and one that would reach beyond the frame is cut.
        assert height > 0 and (height - 1) * (width - 1) <= pixels * mixing.ERASED_AREA[1]
        low, high = mixing.ERASED_ASPECT
        if height < grid.rows * PATCH - 1 and width < grid.columns * PATCH - 1:
            assert (height + 0.5) * (width + 0.5) >= pixels * mixing.ERASED_AREA[0]
            assert (height + 0.5) / (width - 0.5) >= low and (height - 0.5) / (width + 0.5) <= high
    assert len(set(boxes)) > B / 2  # each clip has its own box
    noise = np.concatenate(noise)
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


def test_erasing_probability():
    patches = clips()
    np.testing.assert_array_equal(erase(patches, jax.random.key(0), 0.0), patches)
    chosen = [
        (np.asarray(erase(patches, jax.random.key(seed), 0.25)) != patches).any(axis=(1, 2)).mean()
        for seed in range(20)
    ]
    assert abs(np.mean(chosen) - 0.25) < 5 * (0.25 * 0.75 / (20 * B)) ** 0.5


def test_soft_targets():
    targets = mixing.smooth_one_hot(jnp.asarray([2, 0]), 4, 0.1)
    np.testing.assert_allclose(targets, [[0.025, 0.025, 0.925, 0.025], [0.925] + [0.025] * 3])
