"""Steps of images and of videos: their shares, what each shows, and clips inside long videos."""

import json

import cv2
import numpy as np
import pytest

from fluxvit_jax.config.grids import image_grids
from fluxvit_jax.data.captions import clean
from fluxvit_jax.data.media import turn_of_step
from fluxvit_jax.data.mixture import open_mixture
from fluxvit_jax.data.pipeline import train_batches
from fluxvit_jax.data.prepare import prepare
from fluxvit_jax.data.tokenizer import tokenize
from fluxvit_jax.errors import UserError
from tests import tiny
from tests.data.videos import write_video


@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 0.7, 1.0])
def test_turns_have_their_shares_in_any_run_of_steps(share):
    turns = [turn_of_step(step, share) for step in range(1000)]
    images = np.cumsum([turn.images for turn in turns])
    assert np.abs(images - share * np.arange(1, 1001)).max() <= 1 + 1e-9
    for medium in (False, True):
        before = [turn.before for turn in turns if turn.images == medium]
        assert before == list(range(len(before)))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A list of 12 images and 16 videos of flat colors, which their captions name."""
    folder = tmp_path_factory.mktemp("mixed")
    entries = []
    for number in range(28):
        value = 8 * number
        frame = np.full((32, 32, 3), value, np.uint8)
        if number < 12:
            name, key = f"{number}.png", "image"
            cv2.imwrite(str(folder / name), frame)
        else:
            name, key = f"{number}.mp4", "video"
            write_video(folder / name, np.repeat(frame[None], 6, axis=0))
        entries.append({key: name, "caption": [f"Gray {value}.", f"The gray, {value}!"]})
    (folder / "list.json").write_text(json.dumps(entries))
    return folder


def batches_of(mixed, count: int, **changes) -> list[dict]:
    config = tiny.make_clip(mixed / "list.json", mixed, **changes)
    source = open_mixture(config.data.train, config.data.root, captioned=True)
    with train_batches(config, source) as batches:
        return [next(batches) for _ in range(count)]


def values_of(batch) -> list[int]:
    """The gray of each clip, which names its file."""
    return [8 * round(int(np.median(own[0])) / 8) for own in batch["patches"]]


def test_each_batch_is_of_one_medium_and_captions_go_with_clips(mixed):
    batches = batches_of(mixed, 14)
    grids = {tuple(grid) for grid in image_grids(tiny.make_clip("x", mixed))}
    seen: dict[bool, list[int]] = {True: [], False: []}
    for batch in batches:
        images = batch["grid"][0, 0] == 1
        assert (batch["grid"][:, 0] == 1).all() == images
        if images:
            assert {tuple(grid) for grid in batch["grid"].tolist()} <= grids
            assert batch["patches"].shape[1] == max(np.prod(grid) for grid in grids)
        else:
            assert batch["patches"].shape[1] == 99
        own = values_of(batch)
        seen[images] += own
        texts = [
            {clean(text) for text in (f"Gray {value}.", f"The gray, {value}!")} for value in own
        ]
        ids = [{tuple(row) for row in tokenize(sorted(pair))} for pair in texts]
        assert all(tuple(row) in pair for row, pair in zip(batch["text"], ids, strict=True))
    # 14 steps of 8 clips, 12 images and 16 videos: four times each.
    assert sorted(seen[True]) == sorted(4 * [8 * n for n in range(12)])
    assert sorted(seen[False]) == sorted(4 * [8 * n for n in range(12, 28)])


def test_prepared_folders_give_the_same_batches(mixed, tmp_path):
    """One of videos and one of images, in a mixture, against two lists."""
    entries = json.loads((mixed / "list.json").read_text())
    entries[20] |= {"video_start_frame": 1, "video_end_frame": 5}
    kinds = {kind: [e for e in entries if kind in e] for kind in ("video", "image")}
    for kind, own in kinds.items():
        (tmp_path / f"{kind}.json").write_text(json.dumps(own))
        prepare(tmp_path / f"{kind}.json", tmp_path / kind, root=mixed, captioned=True)
    batches, identities = [], []
    for ending in (".json", ""):
        mixture = tmp_path / f"mixture{ending}.csv"
        rows = [f"{kind}{ending},{mixed}" for kind in kinds]
        mixture.write_text("\n".join(["list,root", *rows]) + "\n")
        source = open_mixture(mixture, captioned=True)
        identities.append(source.identity)
        with train_batches(tiny.make_clip(mixture, mixed), source) as made:
            batches.append([next(made) for _ in range(7)])
    assert identities[0] == identities[1]
    for own, other in zip(*batches, strict=True):
        for name in ("patches", "grid", "text"):
            assert np.array_equal(own[name], other[name])
    with pytest.raises(UserError, match="has videos and images, which are trained on in steps of"):
        prepare(mixed / "list.json", tmp_path / "both", captioned=True)
    with pytest.raises(UserError, match="its other splits have captions; choose another --out"):
        prepare(tmp_path / "video.json", tmp_path / "video", split="val")
    (mixed / "class").mkdir()
    (mixed / "class/12.mp4").symlink_to(mixed / "12.mp4")
    with pytest.raises(UserError, match="is a folder without captions"):
        open_mixture(mixed, captioned=True)


def test_the_identity_of_a_clip_is_its_files(mixed, tmp_path):
    """Two lists with files of one name: the official code takes them for one thing."""
    entries = json.loads((mixed / "list.json").read_text())[:8]
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    mixture = tmp_path / "mixture.csv"
    mixture.write_text(f"list,root\none.json,{mixed}\ntwo.json,{mixed}\n")
    source = open_mixture(mixture, captioned=True)
    config = tiny.make_clip(mixture, mixed)
    with train_batches(config, source) as batches:
        found = [next(batches) for _ in range(4)]
    identities = {tuple(own) for batch in found for own in batch["identity"].tolist()}
    assert len(identities) == 16


def test_a_clip_inside_a_long_video(tmp_path):
    """Frames 20 to 29 of 40; the official code yields frames from 20 on, whatever the end."""
    frames = np.stack([np.full((32, 32, 3), 6 * n, np.uint8) for n in range(40)])
    write_video(tmp_path / "long.mp4", frames)
    clip = {"video": "long.mp4", "video_start_frame": 20, "video_end_frame": 30}
    part = [clip | {"caption": f"part {number}"} for number in range(8)]
    (tmp_path / "list.json").write_text(json.dumps(part))
    (batch,) = batches_of(tmp_path, 1, data__workers=0)
    shown = []
    for own, grid in zip(batch["patches"], batch["grid"], strict=True):
        by_frame = own[: np.prod(grid)].reshape(grid[0], -1)
        shown += [round(float(np.median(frame)) / 6) for frame in by_frame]
    assert set(shown) <= set(range(19, 31)) and max(shown) >= 28 and min(shown) <= 21
    assert len({tuple(own) for own in batch["identity"].tolist()}) == 1
    (tmp_path / "list.json").write_text(
        json.dumps([clip | {"video_end_frame": 41, "caption": "x"}])
    )
    with pytest.raises(UserError, match="has 40 frames, and the list names 20 to 41"):
        batches_of(tmp_path, 1)
