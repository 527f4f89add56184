"""Augmentation against Pillow, and what the crops, the policy and the whole step promise."""

import math

import cv2
import ml_collections
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_image

from fluxvit_jax.config.randaugment import parse_randaugment
from fluxvit_jax.data import augmentation
from fluxvit_jax.data.augmentation import Box
from fluxvit_jax.errors import UserError


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """Photographs and two hard cases, uint8 [5, 128, 171, 3]."""
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    frames = [np.asarray(photo.resize((171, 128))) for photo in photos]
    frames.append(np.random.default_rng(0).integers(40, 200, frames[0].shape, np.uint8))
    frames.append(np.full_like(frames[0], 77))
    frames.append(frames[0] // 8 * np.array([1, 0, 3], np.uint8))
    return np.stack(frames)


def config(**changes) -> ml_collections.ConfigDict:
    fields = {
        "crop": "random_resized",
        "scale": (0.08, 1.0),
        "ratio": (3 / 4, 4 / 3),
        "flip": 0.5,
        "randaugment": "rand-m7-n4-mstd0.5-inc1",
    }
    return ml_collections.ConfigDict(fields | changes)


# --- RandAugment against Pillow; formulas of the arguments as timm has them -----------------------


def pil_affine(*matrix: float):
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(128,) * 3
    )


def pil_common(image: Image.Image, level: float, sign: int) -> dict:
    degrees, slope, share = (sign * level * most for most in (30, 0.3, 0.45))
    added = [min(255, i + int(level * 110)) if i < 128 else i for i in range(256)]
    return {
        "auto_contrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
        "invert": ImageOps.invert,
        "solarize_add": lambda image: image.point(added * 3),
        "rotate": lambda image: image.rotate(
            degrees, Image.Resampling.BILINEAR, fillcolor=(128,) * 3
        ),
        "shear_x": pil_affine(1, slope, 0, 0, 1, 0),
        "shear_y": pil_affine(1, 0, 0, slope, 1, 0),
        "translate_x": pil_affine(1, 0, share * image.width, 0, 1, 0),
        "translate_y": pil_affine(1, 0, 0, 0, 1, share * image.height),
    }


def pil_graded(factor: float, bits: int, threshold: int) -> dict:
    return {
        # No bits gave black until Pillow began to refuse it.
        "posterize": lambda image: (
            ImageOps.posterize(image, bits) if bits else image.point([0] * 768)
        ),
        "solarize": lambda image: ImageOps.solarize(image, threshold),
        "color": lambda image: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda image: ImageEnhance.Contrast(image).enhance(factor),
        "brightness": lambda image: ImageEnhance.Brightness(image).enhance(factor),
        "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(factor),
    }


def pil_plain(level: float, sign: int) -> dict:
    return pil_graded(0.1 + level * 1.8, int(level * 4), int(level * 256))


def pil_increasing(level: float, sign: int) -> dict:
    return pil_graded(1 + sign * level * 0.9, 4 - int(level * 4), 256 - int(level * 256))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("level", [0.0, 0.62, 0.7, 1.0])
@pytest.mark.parametrize("name", list(augmentation.INCREASING_OPERATIONS))
def test_operations_agree_with_pillow(clip, name, level, sign):
    for operations, graded in (
        (augmentation.PLAIN_OPERATIONS, pil_plain),
        (augmentation.INCREASING_OPERATIONS, pil_increasing),
    ):
        before = clip.copy()
        ours = operations[name](clip, level, sign)
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(clip, before)
        images = [Image.fromarray(frame) for frame in clip]
        pil = [(pil_common(image, level, sign) | graded(level, sign))[name] for image in images]
        theirs = np.stack([np.asarray(f(image)) for f, image in zip(pil, images, strict=True)])
        off = np.abs(ours.astype(int) - theirs)
        if name.startswith(("rotate", "shear", "translate")):
            # Pillow truncates where OpenCV rounds, and OpenCV before 5 places pixels to 1/32 only.
            assert off.max() <= 4
            assert (off[:2] > 1).mean() < 0.01
        elif name in ("color", "sharpness"):
            assert off.max() <= 1
            assert (off > 0).mean() < 0.005
        else:
            assert off.max() == 0


def test_smoothing_leaves_the_edge(clip):
    smooth = np.asarray(Image.fromarray(clip[2]).filter(ImageFilter.SMOOTH))
    np.testing.assert_array_equal(augmentation.sharpness(clip[2:3], 0.0)[0], smooth)


def test_policy_strings():
    assert parse_randaugment("rand-m7-n4-mstd0.5-inc1") == (7.0, 4, 0.5, True, 0.5)
    assert parse_randaugment("rand-m9-mstd0.5") == (9.0, 2, 0.5, False, 0.5)
    assert parse_randaugment("rand-n3-inc0-p1") == (10.0, 3, 0.0, False, 1.0)
    for text in ("augmix-m3", "rand-m", "rand-w0", "rand-m7,n4", "rand m7", "rand-m-7"):
        with pytest.raises(UserError, match="not understood"):
            parse_randaugment(text)


def test_each_operation_is_applied_half_of_the_time(clip):
    frames = clip[2:3, :14, :14]
    rng = np.random.default_rng(0)
    policy = parse_randaugment("rand-m7-n2-inc1")
    same = sum(
        np.array_equal(augmentation.rand_augment(frames, policy, rng), frames) for _ in range(1000)
    )
    # Both of two layers are skipped in a quarter of the draws; inverting twice and solarize with
    # the like add little to that. Five standard deviations are 0.07.
    assert 0.18 < same / 1000 < 0.34


def test_frames_of_a_clip_get_the_same_operations(clip):
    still = np.repeat(clip[:1], 3, axis=0)
    policy = parse_randaugment("rand-m7-n4-mstd0.5-inc1-p1")
    rng = np.random.default_rng(0)
    for _ in range(20):
        changed = augmentation.rand_augment(still, policy, rng)
        assert changed.shape == still.shape
        assert not np.array_equal(changed, still)
        assert (changed == changed[:1]).all()


# --- Size and crop --------------------------------------------------------------------------------


def test_random_resized_crops_fill_their_ranges():
    rng = np.random.default_rng(0)
    boxes = [
        augmentation.random_resized_crop(240, 320, (0.08, 1.0), (3 / 4, 4 / 3), rng)
        for _ in range(3000)
    ]
    y, x, h, w = np.array(boxes).T
    assert (y >= 0).all() and (x >= 0).all() and (y + h <= 240).all() and (x + w <= 320).all()
    share, aspect = h * w / (240 * 320), w / h
    assert 0.075 < share.min() < 0.1 and 0.95 < share.max() <= 1
    assert 0.73 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.36
    # Small crops always fit, so there the logarithm of the aspect is uniform and so centred.
    small = share < 0.4
    assert abs(np.log(aspect[small]).mean()) < 0.02
    assert abs(np.log(aspect[small]).std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01
    # Places are uniform: the mean is the middle.
    assert abs((y[small] / (240 - h[small])).mean() - 0.5) < 0.05
    assert abs((x[small] / (320 - w[small])).mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (100, 1000, Box(0, 433, 100, 133)),
        (1000, 100, Box(433, 0, 133, 100)),
        (100, 110, Box(0, 0, 100, 110)),
    ],
)
def test_random_resized_crop_falls_back_to_the_middle(height, width, box):
    rng = np.random.default_rng(0)
    # More than the whole area never fits.
    assert augmentation.random_resized_crop(height, width, (1.5, 2.0), (3 / 4, 4 / 3), rng) == box


def test_multi_scale_crops():
    rng = np.random.default_rng(0)
    boxes = {augmentation.multi_scale_crop(240, 320, rng) for _ in range(5000)}
    sides = [240, 210, 180, 158]
    sizes = {(box.height, box.width) for box in boxes}
    assert sizes == {(sides[i], sides[j]) for i in range(4) for j in range(4) if abs(i - j) < 2}
    smallest = {(box.y, box.x) for box in boxes if (box.height, box.width) == (158, 158)}
    assert len(smallest) == 13
    assert {(0, 0), (0, 160), (80, 0), (80, 160), (40, 80), (20, 40), (60, 120)} <= smallest
    assert all(box.y + box.height <= 240 and box.x + box.width <= 320 for box in boxes)


def test_large_frames_are_brought_to_320_first():
    large = np.random.default_rng(0).integers(0, 256, (2, 720, 405, 3), np.uint8)
    assert augmentation.limit_short_side(large).shape == (2, 568, 320, 3)
    # An area average of even noise is near its mean; a sample of it would not be.
    assert augmentation.limit_short_side(large).std() < 60 < large.std()
    small = large[:, :300, :320]
    assert augmentation.limit_short_side(small) is small


def test_crops_stay_inside(clip):
    np.testing.assert_array_equal(augmentation.crop_view(clip, 112, 9, 50), clip[:, 9:121, 50:162])
    for y, x in ((17, 0), (-1, 0), (0, 60)):
        with pytest.raises(ValueError, match="leaves frames of 128 x 171"):
            augmentation.crop_view(clip, 112, y, x)


# --- The whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["random_resized", "multi_scale"])
def test_a_clip_depends_on_its_random_numbers_alone(clip, crop):
    before = clip.copy()
    clips = [
        augmentation.augment_clip(clip, 56, config(crop=crop), np.random.default_rng(seed))
        for seed in (0, 0, 1)
    ]
    assert clips[0].shape == (5, 56, 56, 3)
    assert clips[0].dtype == np.uint8
    np.testing.assert_array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])
    np.testing.assert_array_equal(clip, before)


@pytest.mark.parametrize("crop", ["random_resized", "multi_scale"])
def test_a_large_clip_is_shrunk_distorted_cropped_and_mirrored_in_that_order(crop):
    """As the official code does: what it stores at a short side of 320, then RandAugment, the crop
    with its resizing, and the mirror. A smooth picture, in which each step leaves its own trace.
    """
    y, x = np.mgrid[:360, :500]
    picture = np.stack([y * 255 // 359, x * 255 // 499, (x // 25 + y // 30) % 2 * 255], axis=-1)
    large = np.stack([picture, picture // 2]).astype(np.uint8)
    steps = config(crop=crop, randaugment="rand-m7-n2-mstd0.5-inc1-p1")
    policy = parse_randaugment(steps.randaugment)
    mirrored = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        small = [cv2.resize(frame, (444, 320), interpolation=cv2.INTER_AREA) for frame in large]
        distorted = augmentation.rand_augment(np.stack(small), policy, rng)
        if crop == "multi_scale":
            box = augmentation.multi_scale_crop(320, 444, rng)
        else:
            box = augmentation.random_resized_crop(320, 444, (0.08, 1.0), (3 / 4, 4 / 3), rng)
        rows, columns = slice(box.y, box.y + box.height), slice(box.x, box.x + box.width)
        expected = [cv2.resize(frame[rows, columns], (56, 56)) for frame in distorted]
        if rng.random() < 0.5:
            mirrored += 1
            expected = [frame[:, ::-1] for frame in expected]
        made = augmentation.augment_clip(large, 56, steps, np.random.default_rng(seed))
        np.testing.assert_array_equal(made, np.stack(expected))
    assert 5 < mirrored < 25


def test_the_plain_clip_is_a_resized_frame_or_its_mirror(clip):
    square = clip[:, :, :128]
    steps = config(scale=(1.0, 1.0), ratio=(1.0, 1.0), randaugment="")
    plain = augmentation.resize_clip(square, 56, 56)
    mirrored = 0
    for seed in range(200):
        made = augmentation.augment_clip(square, 56, steps, np.random.default_rng(seed))
        mirrored += np.array_equal(made, plain[:, :, ::-1])
        assert np.array_equal(made, plain) or np.array_equal(made, plain[:, :, ::-1])
    assert 65 < mirrored < 135
    steps.flip = 0.0
    made = augmentation.augment_clip(square, 56, steps, np.random.default_rng(0))
    np.testing.assert_array_equal(made, plain)
