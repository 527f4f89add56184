"""Would the tests notice? One small fault after another is put into a copy of the package.

    python -m tests.mutations            all of them, about an hour on two cores
    python -m tests.mutations --only optimizer ema-of-old-parameters
    python -m tests.mutations --list

Each mutation is applied alone, and the tests that should notice it are run. One that they pass has
survived: a test is missing, or the change is harmless, and then its reason stands beside it. Before
a group of mutations its tests run without any, since a test that fails anyway notices nothing.
JAX_COMPILATION_CACHE_DIR may name a folder of compiled programs that makes another run shorter.

Exit status: 0 if all were caught or are harmless, 1 if one survived (or a harmless one was caught,
so that its reason is wrong), 2 if a text was not found or the tests cannot be run, 130 after
Ctrl-C. The working tree is never touched.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "fluxvit_jax"
MINUTES = 30  # more than that and the tests hang, which is noticed as well


class Mutation(NamedTuple):
    """A change of meaning.

    file: in the package; old: a text that stands there once; tests: the pytest node ids that should
    notice, relative to tests/; harmless: why it may survive.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    harmless: str = ""

    @property
    def group(self) -> str:
        return next(group for group, own in MUTATIONS.items() if self in own)


ODD_GRIDS = "models/test_token_selection.py::test_odd_grids"
GOLDEN = "models/test_fluxvit_golden.py"
ALONE = f"{GOLDEN}::test_alone_without_padding"
PADDED = f"{GOLDEN}::test_padded_in_a_batch_of_differing_grids"
LOSS = "objectives/test_flux_multi.py::test_loss_and_gradients"
GROUPS = "training/test_optimizer.py::test_groups_equal_the_official"
ADAMW = "training/test_optimizer.py::test_adamw_step_by_step"
CLIP = "objectives/test_flux_clip.py"
CLIP_RUN = "training/test_clip.py"
SPACE = "deploy/test_shared_space.py"
FIND = "find/test_find.py"
CHUNKED = "models/test_attention.py::test_equals_the_plain_one"
CHUNKED_BIAS = "models/test_attention.py::test_chunks_with_a_bias"
DROP_PATH = "models/test_drop_path.py"
FREEZING = "training/test_freezing.py"
BALANCE = "data/test_class_balance.py"
MULTI_LABEL = "training/test_multi_label.py"
CHECKPOINTER = "checkpoints/test_checkpointer.py"
SAMPLING = "data/test_frame_sampling.py"
VIEWS = "data/test_pipeline.py::test_views_are_those_of_the_plain_way"
AUGMENT = "data/test_augmentation.py"
IN_ORDER = f"{AUGMENT}::test_a_large_clip_is_shrunk_distorted_cropped_and_mirrored_in_that_order"
MIXING = "objectives/test_mixing.py"
DISTILLED = "objectives/test_flux_umt.py::test_the_loss_and_gradients_are_those_of_the_definition"
BEST_STEP = "checkpoints/test_checkpointer.py::test_weights_of_the_best_step"
DAMAGE = "checkpoints/test_checkpointer.py::test_damage_falls_back_to_the_step_before"
CALIBRATION = "evaluation/test_calibration.py"
CASCADES = "adaptive"
EVALUATED = "evaluation/test_evaluate.py::test_every_video_counts_and_a_bad_one_as_wrong"
TOP_FIVE = "evaluation/test_evaluate.py::test_five_of_seven_classes_are_the_top_five"
MEAN_OF_VIEWS = "evaluation/test_evaluate.py::test_softmax_then_mean_over_the_views"
RESUMED = "training/test_train.py::test_interrupted_while_evaluating"
MERGING = "models/test_token_merging.py"

MUTATIONS = {
    "selection": [
        Mutation(
            "first-frame-scores-nothing",
            "models/token_selection.py",
            "distance = jnp.where(first, after, distance)",
            "distance = jnp.where(first, 0.0, distance)",
            (ODD_GRIDS,),
        ),
        Mutation(
            "one-frame-compared-with-padding",
            "models/token_selection.py",
            "return jnp.where(grid[:, :1] > 1, distance, 0.0)",
            "return distance",
            (ODD_GRIDS,),
        ),
        Mutation(
            "l1-for-l2",
            "models/token_selection.py",
            "return frame_difference(tokens, grid, groups, order=2)",
            "return frame_difference(tokens, grid, groups, order=1)",
            (f"{GOLDEN}::test_importance",),
        ),
        Mutation(
            "one-group-for-two",
            "models/token_selection.py",
            "jnp.where(frames % MAX_RULE_GROUPS == 0, MAX_RULE_GROUPS, 2)",
            "jnp.where(frames % MAX_RULE_GROUPS == 0, MAX_RULE_GROUPS, 1)",
            (f"{GOLDEN}::test_groups_of_frames",),
        ),
        Mutation(
            "ties-to-the-later-group",
            "models/token_selection.py",
            "ahead = jnp.where(other < group, ",
            "ahead = jnp.where(other > group, ",
            (ODD_GRIDS,),
        ),
        Mutation(
            "padding-counts-as-kept",
            "models/token_selection.py",
            'if rounding == "exact" and limits.fewest_tokens >= N:',
            'if rounding == "exact":',
            (ODD_GRIDS,),
        ),
        Mutation(
            "a-smaller-budget-forgets-its-mask",
            "models/token_selection.py",
            "valid = None if fewest_tokens >= tokens else selection.valid",
            "valid = None",
            (ODD_GRIDS,),
        ),
        Mutation(
            "attention-times-noise",
            "models/token_selection.py",
            "jax.lax.top_k(attention / noise, ",
            "jax.lax.top_k(attention * noise, ",
            ("objectives/test_flux_umt.py::test_drawing_is_in_proportion_to_attention",),
        ),
        Mutation(
            "official-rounding-over-all-groups",
            "models/token_selection.py",
            "kept = groups * ((1 - ratio) * (total // groups)).astype(np.int32)",
            "kept = ((1 - ratio) * total).astype(np.int32)",
            ("models/test_token_selection.py::test_official_rounding",),
        ),
    ],
    "budgets": [
        Mutation(
            "largest-grid-left-out",
            "grids.py",
            "if min_tokens <= grid.tokens <= max_tokens)",
            "if min_tokens <= grid.tokens < max_tokens)",
            ("test_grids.py",),
        ),
        Mutation(
            "nearest-head-by-difference",
            "grids.py",
            "abs(math.log(budget / head_budgets[head]))",
            "abs(budget - head_budgets[head])",
            ("test_grids.py::test_nearest_head_is_nearest_in_ratio",),
        ),
        Mutation(
            "cls-inside-takes-no-place",
            "models/padded_sequence.py",
            'return budget - (cls == "inside")',
            "return budget",
            ("models/test_padded_sequence.py",),
        ),
    ],
    "positions": [
        Mutation(
            "bicubic-of-another-kind",
            "models/position_embedding.py",
            "CUBIC_A = -0.75",
            "CUBIC_A = -0.5",
            ("models/test_position_embedding.py::test_matrices_are_those_of_torch",),
        ),
        Mutation(
            "corners-aligned",
            "models/position_embedding.py",
            "return (index + 0.5) * (native / size.astype(jnp.float32)) - 0.5",
            "return index * (native / size.astype(jnp.float32))",
            ("models/test_position_embedding.py::test_matrices_are_those_of_torch",),
        ),
        Mutation(
            "rows-and-columns-exchanged",
            "models/position_embedding.py",
            "row = (t * H + in_frame // columns) * W + in_frame % columns",
            "row = (t * H + in_frame % columns) * W + in_frame // columns",
            (f"{GOLDEN}::test_positions",),
        ),
        Mutation(
            "global-positions-reach-cls",
            "models/fluxvit.py",
            "            table[0], patches, grid, index, limits[:3]\n",
            "            self.gpe(table[:1])[0], patches, grid, index, limits[:3]\n",
            (f"{GOLDEN}::test_positions",),
        ),
    ],
    "network": [
        Mutation(
            "layer-scale-spares-the-bias",
            "models/blocks.py",
            "kernel, bias = kernel * gamma, bias * gamma",
            "kernel = kernel * gamma",
            (ALONE,),
        ),
        Mutation(
            "no-local-positions",
            "models/blocks.py",
            "attended += self.lpe(v, layout)",
            "pass",
            (ALONE,),
        ),
        Mutation(
            "the-other-gelu",
            "models/blocks.py",
            "jax.nn.gelu(hidden, approximate=not self.exact)",
            "jax.nn.gelu(hidden, approximate=self.exact)",
            (ALONE,),
        ),
        Mutation(
            "pooling-query-of-padding-too",
            "models/blocks.py",
            "mean = jnp.mean(x, axis=1, keepdims=True, where=where, dtype=jnp.float32)",
            "mean = jnp.mean(x, axis=1, keepdims=True, dtype=jnp.float32)",
            (PADDED,),
        ),
        Mutation(
            "pooled-values-by-the-norm-of-keys",
            "models/blocks.py",
            "v = self._heads(self.v(self.norm_v(x)))",
            "v = self._heads(self.v(self.norm_k(x)))",
            (ALONE,),
        ),
        Mutation(
            "pooling-not-masked",
            "models/blocks.py",
            "mask = None if valid is None else valid[:, None, None]",
            "mask = None",
            (PADDED,),
        ),
        Mutation(
            "cls-not-pooled",
            "models/padded_sequence.py",
            "jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)",
            "jnp.pad(valid, ((0, 0), (1, 0)), constant_values=False)",
            (PADDED,),
        ),
        Mutation(
            "one-token-too-few-attended",
            "models/padded_sequence.py",
            "return 1 + jnp.sum(valid, axis=1, dtype=jnp.int32)",
            "return jnp.sum(valid, axis=1, dtype=jnp.int32)",
            (PADDED,),
        ),
        Mutation(
            "one-padding-attended",
            "models/attention.py",
            "mask = (jnp.arange(k.shape[1])[None] < lengths[:, None])[:, None, None]",
            "mask = (jnp.arange(k.shape[1])[None] <= lengths[:, None])[:, None, None]",
            (PADDED,),
        ),
        Mutation(
            "one-padding-attended-in-chunks",
            "models/attention.py",
            "real = (jnp.arange(N) < lengths[:, None])[:, None, None]",
            "real = (jnp.arange(N) <= lengths[:, None])[:, None, None]",
            (CHUNKED, CHUNKED_BIAS),
        ),
        Mutation(
            "chunks-forget-the-bias",
            "models/chunked_attention.py",
            "return logits if bias is None else logits + bias",
            "return logits",
            (CHUNKED_BIAS,),
        ),
        Mutation(
            "softmax-gradient-without-its-mean",
            "models/chunked_attention.py",
            "dlogits = weights * (gradient @ v.T - inner[:, None])",
            "dlogits = weights * (gradient @ v.T)",
            (CHUNKED,),
        ),
        Mutation(
            "gradient-of-q-not-scaled",
            "models/chunked_attention.py",
            "dq = _joined(dq, shape) * shape[3] ** -0.5",
            "dq = _joined(dq, shape)",
            (CHUNKED,),
        ),
        Mutation(
            "chunks-without-shard-map",
            "models/attention.py",
            "attended, log_sums = _per_shard(chunked_attention.forward, inputs)",
            "attended, log_sums = chunked_attention.forward(inputs)",
            ("models/test_attention.py::test_devices_change_nothing",),
        ),
        Mutation(
            "products-for-cpus-in-16-bits",
            "models/products.py",
            "jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32).astype(a.dtype)",
            "jnp.einsum(subscripts, a, b)",
            ("models/test_products.py::test_products_of_a_block_for_cpus_give_float32",),
        ),
        Mutation(
            "larger-epsilon",
            "models/norms.py",
            "EPSILON = 1e-6",
            "EPSILON = 1e-5",
            ("models/test_internvideo2.py::test_the_constants_in_norms",),
        ),
        Mutation(
            "merged-tokens-weigh-as-one",
            "models/blocks.py",
            "jnp.log(size)[:, None, None]",
            "jnp.zeros_like(size)[:, None, None]",
            (f"{MERGING}::test_a_block_attends_by_size",),
        ),
        Mutation(
            "merged-tokens-averaged-evenly",
            "models/token_merging.py",
            "sums = jnp.concatenate([x.astype(jnp.float32) * size, size], axis=-1)",
            "sums = jnp.concatenate([x.astype(jnp.float32), size], axis=-1)",
            (f"{MERGING}::test_merging_is_that_of_tome",),
        ),
        Mutation(
            "deep-layers-start-as-large",
            "models/fluxvit.py",
            "scale = 1 / jnp.sqrt(2.0 * jnp.arange(1, depth + 1))[:, None, None]",
            "scale = jnp.ones(depth)[:, None, None]",
            ("models/test_initialization.py",),
        ),
        Mutation(
            "kernel-deviation-ignored",
            "models/fluxvit.py",
            "_scale_kernels(self, config.kernel_std / blocks.KERNEL_STD)",
            "_scale_kernels(self, 1.0)",
            ("models/test_initialization.py",),
        ),
        Mutation(
            "mean-of-another-data-set",
            "models/fluxvit.py",
            "MEAN = (0.485, 0.456, 0.406)",
            "MEAN = (0.5, 0.5, 0.5)",
            ("models/test_initialization.py",),
        ),
    ],
    "drop-path": [
        Mutation(
            "drop-path-not-scaled",
            "models/blocks.py",
            "return draw(keys)[..., None, None] / (1 - rate)",
            "return draw(keys)[..., None, None] * 1.0",
            (DROP_PATH,),
        ),
        Mutation(
            "drop-path-reversed",
            "models/fluxvit.py",
            "rates = jnp.linspace(0, config.drop_path, config.depth)",
            "rates = jnp.linspace(config.drop_path, 0, config.depth)",
            (DROP_PATH,),
        ),
        Mutation(
            "every-budget-drops-the-same",
            "objectives/flux_multi.py",
            "_fold_in(drop_keys, head) if self.drop_path else None",
            "drop_keys if self.drop_path else None",
            ("objectives/test_flux_multi.py::test_every_budget_drops_paths_of_its_own",),
        ),
    ],
    "sampling": [
        Mutation(
            "segments-without-their-ends",
            "data/frame_sampling.py",
            "return rng.integers(starts[:-1], starts[1:], endpoint=True)",
            "return rng.integers(starts[:-1], np.maximum(starts[1:], starts[:-1] + 1))",
            (SAMPLING,),
        ),
        Mutation(
            "first-temporal-view-at-the-start",
            "data/frame_sampling.py",
            "offset = int(segment / (clips + 1) * (clip + 1))",
            "offset = int(segment / (clips + 1) * clip)",
            (SAMPLING,),
        ),
        Mutation(
            "crops-stop-short-of-the-edge",
            "data/frame_sampling.py",
            "[i * (room / (crops - 1)) for i in range(crops)]",
            "[i * (room / crops) for i in range(crops)]",
            (SAMPLING,),
        ),
        Mutation(
            "grids-and-samples-of-one-stream",
            "data/random_streams.py",
            "GRID_STREAM = 0",
            "GRID_STREAM = 1",
            ("data/test_grid_sampling.py",),
        ),
        Mutation(
            "no-shuffling",
            "data/pipeline.py",
            "self._order = numbers.seed(self.seed).shuffle().repeat()",
            "self._order = numbers.repeat()",
            ("data/test_pipeline.py::test_every_epoch_is_another_order_of_all_videos",),
        ),
        Mutation(
            "repeats-augmented-alike",
            "data/group_reader.py",
            "rngs = [stream_rng(self.seed, int(sample)) for sample in samples]",
            "rngs = [stream_rng(self.seed, int(samples[0])) for sample in samples]",
            ("data/test_pipeline.py::test_repeats_share_a_decode_and_nothing_else",),
        ),
    ],
    "views": [
        Mutation(
            "crop-corners-exchanged",
            "data/views.py",
            "crop_view(pixels[clips[clip]], size, *corners[crop])",
            "crop_view(pixels[clips[clip]], size, *corners[crop][::-1])",
            (VIEWS,),
        ),
        Mutation(
            "frames-of-clips-interleaved",
            "data/views.py",
            "clips = index.reshape(-1, grid.frames)",
            "clips = index.reshape(grid.frames, -1).T",
            (VIEWS,),
        ),
    ],
    "augmentation": [
        Mutation(
            "randaugment-after-the-crop",
            "data/augmentation.py",
            """    if config.randaugment:
        frames = rand_augment(frames, parse_randaugment(config.randaugment), rng)
    height, width = frames.shape[1:3]
    if config.crop == "multi_scale":
        box = multi_scale_crop(height, width, rng)
    else:
        box = random_resized_crop(height, width, config.scale, config.ratio, rng)
    frames = resize_clip(crop(frames, box), size, size)
""",
            """    height, width = frames.shape[1:3]
    if config.crop == "multi_scale":
        box = multi_scale_crop(height, width, rng)
    else:
        box = random_resized_crop(height, width, config.scale, config.ratio, rng)
    frames = resize_clip(crop(frames, box), size, size)
    if config.randaugment:
        frames = rand_augment(frames, parse_randaugment(config.randaugment), rng)
""",
            (IN_ORDER,),
        ),
        Mutation(
            "mirrored-before-the-crop",
            "data/augmentation.py",
            """    frames = resize_clip(crop(frames, box), size, size)
    return flip(frames) if rng.random() < config.flip else frames
""",
            """    frames = flip(frames) if rng.random() < config.flip else frames
    return resize_clip(crop(frames, box), size, size)
""",
            (IN_ORDER,),
        ),
        Mutation(
            "short-side-of-256",
            "data/augmentation.py",
            "MAX_SHORT_SIDE = 320",
            "MAX_SHORT_SIDE = 256",
            (f"{AUGMENT}::test_large_frames_are_brought_to_320_first",),
        ),
        Mutation(
            "broken-copies-are-left-out",
            "data/shrink.py",
            "                _copy(source, unfinished, target)\n                return error",
            "                return error",
            ("data/test_shrink.py::test_copies_are_the_videos_with_fewer_pixels",),
        ),
        Mutation(
            "every-copy-is-finished",
            "data/shrink.py",
            "        and target.stat().st_mtime_ns == source.stat().st_mtime_ns\n",
            "",
            ("data/test_shrink.py::test_the_same_command_goes_on",),
        ),
        Mutation(
            "clip-charged-for-one-killed-worker",
            "data/supervised_workers.py",
            "if clip and clip == self._killed_at:",
            "if clip:",
            ("data/test_supervised_workers.py::test_what_kills_workers_everywhere_ends_the_run",),
        ),
        Mutation(
            "crash-charged-to-none",
            "data/supervised_workers.py",
            "if clip and (-code in CRASHES or code > 0):",
            "if clip and code > 0:",
            ("data/test_supervised_workers.py::test_evaluation_counts_them_as_failed",),
        ),
        Mutation(
            "last-words-unheard",
            "data/supervised_workers.py",
            "            return self.receive(wait)",
            "            return None",
            (
                "data/test_supervised_workers.py"
                "::test_a_crash_is_charged_to_its_clip_when_nobody_listened",
            ),
        ),
        Mutation(
            "clips-to-skip-forgotten",
            "checkpoints/workdir.py",
            'if line.get("skip") is True or line["step"] <= step]',
            'if line["step"] <= step]',
            ("training/test_train.py::test_clips_to_skip_stay_listed_and_damaged_lines_do_not",),
        ),
        Mutation(
            "image-decoded-before-its-size-is-checked",
            "data/images.py",
            "if height * width > MAX_PIXELS:",
            "if False:",
            ("data/test_images.py::test_size_is_checked_before_decoding",),
        ),
        Mutation(
            "mirrored-where-it-must-not-be",
            "data/group_reader.py",
            "augment = self.augment if record.flip else self._augment_unflipped",
            "augment = self.augment",
            ("data/test_mixture.py::test_clips_of_a_mixture",),
        ),
        Mutation(
            "cutmix-share-not-corrected",
            "objectives/mixing.py",
            "share = jnp.repeat(jnp.where(cut, 1 - area, share), group)",
            "share = jnp.repeat(share, group)",
            (f"{MIXING}::test_cutmix",),
        ),
        Mutation(
            "always-erased",
            "objectives/mixing.py",
            "return jnp.where(mask & chosen[:, None, None], noise, patches)",
            "return jnp.where(mask, noise, patches)",
            (f"{MIXING}::test_erasing_probability",),
        ),
        Mutation(
            "smoothing-without-the-label",
            "objectives/mixing.py",
            "(1 - smoothing) + smoothing / classes",
            "(1 - smoothing) + smoothing / (classes - 1)",
            (f"{MIXING}::test_soft_targets",),
        ),
    ],
    "losses": [
        Mutation(
            "align-weight-ignored",
            "objectives/flux_multi.py",
            'terms["align"] = self.align * distance',
            'terms["align"] = distance',
            ("objectives/test_flux_multi.py::test_the_weight_of_the_alignment",),
        ),
        Mutation(
            "one-projector-for-all",
            "objectives/flux_multi.py",
            "model.project(pooled, head - 1)",
            "model.project(pooled, 0)",
            (LOSS,),
        ),
        Mutation(
            "smooth-l1-that-jumps",
            "objectives/flux_multi.py",
            "jnp.where(distance < 1, 0.5 * distance**2, distance - 0.5)",
            "jnp.where(distance < 1, 0.5 * distance**2, distance)",
            ("objectives/test_flux_multi.py::test_smooth_l1",),
        ),
        Mutation(
            "positions-not-trained",
            "objectives/base.py",
            "return jax.tree.map(jnp.add, gradients, through_positions), metrics",
            "return gradients, metrics",
            (LOSS,),
        ),
        Mutation(
            "every-student-pools-by-the-first-head",
            "objectives/flux_umt.py",
            "positions[0], kept, student_blocks, head, keys",
            "positions[0], kept, student_blocks, 0, keys",
            (DISTILLED,),
        ),
        Mutation(
            "pooled-weight-ignored",
            "objectives/flux_umt.py",
            '* terms["layers"] + self.pooled_weight * pooled',
            '* terms["layers"] + pooled',
            (DISTILLED,),
        ),
        Mutation(
            "a-cache-of-two-teachers",
            "training/cache_targets.py",
            'before.get("fingerprint", fingerprint) != fingerprint',
            "False",
            ("training/test_pretrain.py::test_weights_put_in_the_teachers_place_are_noticed",),
        ),
        Mutation(
            "masks-drawn-evenly",
            "objectives/flux_umt.py",
            'even if self.mask == "random" else attention',
            "even",
            (DISTILLED,),
        ),
    ],
    "clip": [
        Mutation(
            "a-part-has-its-own-loss",
            "objectives/micro_batches.py",
            'parts (n g) ... -> (n parts g) ..."',
            'parts (n g) ... -> (parts n g) ..."',
            (f"{CLIP}::test_a_batch_in_parts_has_the_gradients_of_the_whole",),
        ),
        Mutation(
            "temperature-below-its-floor",
            "objectives/flux_clip.py",
            "jnp.maximum(params[TEMPERATURE], self.least_temperature)",
            "params[TEMPERATURE]",
            (f"{CLIP}::test_golden_training",),
        ),
        Mutation(
            "one-pooling-head-for-all-budgets",
            "objectives/flux_clip.py",
            "kept, head)\n        return to_text(pooled), pooled",
            "kept, 0)\n        return to_text(pooled), pooled",
            (f"{CLIP}::test_a_batch_in_parts_has_the_gradients_of_the_whole",),
        ),
        Mutation(
            "duplicates-are-negatives",
            "objectives/contrastive_loss.py",
            ".reshape(B, B, -1).all(axis=-1)",
            ".reshape(B, B, -1).all(axis=-1) * jnp.eye(B)",
            ("objectives/test_contrastive_loss.py::test_golden_loss_and_gradients",),
        ),
        Mutation(
            "part-of-an-identity",
            "objectives/contrastive_loss.py",
            ".reshape(B, B, -1).all(axis=-1)",
            ".reshape(B, B, -1).any(axis=-1)",
            ("objectives/test_contrastive_loss.py::test_an_identity_of_two_numbers",),
        ),
        Mutation(
            "one-loss-direction",
            "objectives/contrastive_loss.py",
            "cross_entropy(logits.T)) / 2",
            "cross_entropy(logits)) / 2",
            ("objectives/test_contrastive_loss.py::test_golden_loss_and_gradients",),
        ),
        Mutation(
            "floor-of-the-rate",
            "training/optimizer.py",
            "np.maximum(minimum, base",
            "np.maximum(0.0, base",
            (f"{CLIP}::test_golden_learning_rates",),
        ),
        Mutation(
            "names-of-files-collide",
            "data/captions.py",
            'f"{record.id} {record.segment}"',
            "f\"{record.id.rpartition('/')[2]} {record.segment}\"",
            ("data/test_media.py::test_the_identity_of_a_clip_is_its_files",),
        ),
        Mutation(
            "a-clip-from-the-whole-video",
            "data/reading.py",
            "first, end = record.segment or (0, length)",
            "first, end = 0, length",
            ("data/test_media.py::test_a_clip_inside_a_long_video",),
        ),
        Mutation(
            "image-steps-repeat-videos",
            "data/group_reader.py",
            "first = number * self.group + (turn.before - step)",
            "first = number * self.group + 0 * (turn.before - step)",
            ("data/test_media.py::test_each_batch_is_of_one_medium_and_captions_go_with_clips",),
        ),
        Mutation(
            "any-frozen-text-encoder",
            "data/splits.py",
            "if name in frozen and frozen[name] != checksum:",
            "if name in frozen and not checksum:",
            (f"{CLIP_RUN}::test_another_one_is_refused",),
        ),
        Mutation(
            "a-broken-video-is-found",
            "evaluation/retrieve.py",
            "to_text = np.where(failed[:, None], -np.inf, to_text)",
            "to_text = np.where(False, -np.inf, to_text)",
            (f"{CLIP_RUN}::test_a_broken_video_fails_whatever_its_scores",),
        ),
        Mutation(
            "any-split",
            "evaluation/retrieve.py",
            "if expected not in (0, found)",
            "if expected < 0",
            (f"{CLIP_RUN}::test_another_split_is_refused_by_its_count",),
        ),
        Mutation(
            "prompts-averaged-before-they-are-unit",
            "evaluation/zero_shot.py",
            "classes = unit(texts).reshape",
            "classes = texts.reshape",
            ("evaluation/test_zero_shot.py::test_a_classifier_of_texts_has_the_scores",),
        ),
        Mutation(
            "frames-not-in-the-middle",
            "data/frame_sampling.py",
            "(borders[:-1] + borders[1:] - 1) // 2",
            "(borders[:-1] + borders[1:]) // 2",
            ("data/test_frame_sampling.py::test_the_middle_frames_of_the_official_retrieval",),
        ),
    ],
    "optimizer": [
        Mutation(
            "layer-decay-off-by-one",
            "training/optimizer.py",
            "last = _depth(params) + 1",
            "last = _depth(params) + 2",
            (GROUPS,),
        ),
        Mutation(
            "local-positions-not-decayed",
            "training/optimizer.py",
            'DECAYED_SCALES = ("gpe", "lpe")',
            'DECAYED_SCALES = ("gpe",)',
            (GROUPS,),
        ),
        Mutation(
            "adam-forgets-early",
            "training/optimizer.py",
            "optax.scale_by_adam(optim.b1, optim.b2, optim.eps)",
            "optax.scale_by_adam(optim.b1, optim.b1, optim.eps)",
            (ADAMW,),
        ),
        Mutation(
            "clipped-after-adam",
            "training/optimizer.py",
            """        *clip,
        optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
""",
            """        optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
        *clip,
""",
            (ADAMW,),
        ),
        Mutation(
            "cosine-reaches-its-end",
            "training/optimizer.py",
            "/ max(1, steps - warmup_steps)",
            "/ max(1, steps - warmup_steps - 1)",
            ("training/test_optimizer.py::test_schedule_equals_the_official",),
        ),
        Mutation(
            "accumulated-gradients-summed",
            "training/train_step.py",
            "lambda t, x: t + x / parts",
            "lambda t, x: t + x",
            ("training/test_train.py::test_accumulated_gradients_are_those_of_the_whole_batch",),
        ),
        Mutation(
            "one-key-for-all-steps",
            "training/train_step.py",
            "key = jax.random.fold_in(jax.random.key(config.seed), step)",
            "key = jax.random.key(config.seed)",
            ("training/test_train.py::test_each_step_draws_anew",),
        ),
        Mutation(
            "one-key-for-all-clips",
            "training/train_step.py",
            'clips["key"] = jax.random.split(key, len(batch["label"]))',
            'clips["key"] = jnp.broadcast_to(key, len(batch["label"]))',
            ("training/test_train.py::test_each_clip_draws_for_itself",),
        ),
    ],
    "freezing": [
        Mutation(
            "last-blocks-frozen-instead-of-the-first",
            "models/freezing.py",
            'part["blocks"] = jax.tree.map(lambda x: x[self.blocks :], part["blocks"])',
            'part["blocks"] = jax.tree.map(lambda x: x[: -self.blocks], part["blocks"])',
            (f"{FREEZING}::test_both_parts_together_are_the_whole",),
        ),
        Mutation(
            "gradient-through-frozen-blocks",
            "objectives/flux_multi.py",
            "position = jax.lax.stop_gradient(position)",
            "pass",
            (f"{FREEZING}::test_gradients_are_those_of_the_trained_part",),
            "nothing reads that gradient, so JAX removes its computation as well",
        ),
        Mutation(
            "moments-of-what-is-frozen",
            "training/train_state.py",
            "optimizer.init(freezing(config).trained(params))",
            "optimizer.init(params)",
            (f"{FREEZING}::test_a_step_of_a_linear_probe",),
        ),
        Mutation(
            "frozen-blocks-drop-paths",
            "models/fluxvit.py",
            "rates = rates.at[: config.frozen_blocks].set(0)",
            "pass",
            (DROP_PATH,),
        ),
    ],
    "balance": [
        Mutation(
            "weights-by-all-classes",
            "data/class_balance.py",
            "len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))",
            "len(labels) / (classes * np.maximum(counts, 1))",
            (f"{BALANCE}::test_weights_are_those_of_scikit_learn",),
        ),
        Mutation(
            "classes-always-in-the-same-order",
            "data/class_balance.py",
            "number = int(order[place])",
            "number = place",
            (f"{BALANCE}::test_every_class_is_drawn_equally_often",),
        ),
        Mutation(
            "class-weights-ignored",
            "objectives/flux_multi.py",
            "targets = targets * jnp.asarray(class_weights, jnp.float32)",
            "pass",
            ("objectives/test_flux_multi.py::test_class_weights",),
        ),
        Mutation(
            "patience-from-the-last-of-equals",
            "training/validation.py",
            "key=lambda one: (sign * one[1], -one[0])",
            "key=lambda one: (sign * one[1], one[0])",
            ("training/test_train.py::test_patience_is_counted_from_the_best_step",),
        ),
    ],
    "averages": [
        Mutation(
            "ema-of-old-parameters",
            "training/train_step.py",
            'ema_update(part.trained(state["ema"]), trained, config.train.ema_decay)',
            'ema_update(part.trained(state["ema"]), part.trained(params), config.train.ema_decay)',
            ("training/test_train.py::test_the_average_and_the_norms_are_of_the_new_parameters",),
        ),
        Mutation(
            "ema-by-the-wrong-share",
            "training/optimizer.py",
            "return optax.incremental_update(params, average, 1 - decay)",
            "return optax.incremental_update(params, average, decay)",
            ("training/test_optimizer.py::test_moving_average",),
        ),
        Mutation(
            "weights-without-the-average",
            "checkpoints/checkpointer.py",
            'name = "ema" if average and "ema" in stored else "params"',
            'name = "params"',
            ("checkpoints/test_checkpointer.py::test_weights_are_the_moving_average",),
        ),
        Mutation(
            "validated-without-the-average",
            "training/validation.py",
            'params = state["ema"] if "ema" in state else state["params"]',
            'params = state["params"]',
            (RESUMED,),
        ),
    ],
    "checkpoints": [
        Mutation(
            "worst-for-best",
            "checkpoints/checkpointer.py",
            "for step in reversed(ranked)]",
            "for step in ranked]",
            (BEST_STEP,),
        ),
        Mutation(
            "oldest-for-newest",
            "checkpoints/checkpointer.py",
            "for step in sorted(_steps(self._folder), reverse=True):",
            "for step in sorted(_steps(self._folder)):",
            (DAMAGE,),
        ),
        Mutation(
            "checksums-not-compared",
            "checkpoints/checkpointer.py",
            'if found["sha256"] != expected["sha256"]:',
            "if False:",
            (
                DAMAGE,
                f"{CHECKPOINTER}::test_a_flipped_bit_in_any_file_is_found_or_harmless",
            ),
        ),
        Mutation(
            "damaged-steps-stay",
            "checkpoints/checkpointer.py",
            '            self._rename(bad, "damaged")\n',
            "",
            (DAMAGE,),
        ),
    ],
    "calibration": [
        Mutation(
            "temperature-upside-down",
            "evaluation/calibration.py",
            "return float(1 / np.sqrt(low * high))",
            "return float(np.sqrt(low * high))",
            (f"{CALIBRATION}::test_the_temperature_by_hand",),
        ),
        Mutation(
            "temperature-of-its-own-half",
            "evaluation/calibration.py",
            "fit_temperature(probabilities[~own], labels[~own], total)",
            "fit_temperature(probabilities[own], labels[own], total)",
            (f"{CALIBRATION}::test_each_half_has_the_temperature_of_the_other",),
        ),
        Mutation(
            "halves-of-other-classes",
            "evaluation/calibration.py",
            'first[np.argsort(labels, kind="stable")[::2]] = True',
            "first[::2] = True",
            (f"{CALIBRATION}::test_halves_have_the_same_classes_in_any_order",),
        ),
        Mutation(
            "bins-with-their-lower-end",
            "evaluation/calibration.py",
            'side="left") - 1',
            'side="right") - 1',
            (f"{CALIBRATION}::test_reliability_by_hand",),
        ),
        Mutation(
            "temperature-of-other-tokens",
            "deploy/pretrained.py",
            "self.temperatures[known[nearest_head(tokens, known)]]",
            "self.temperatures[known[0]]",
            ("deploy/test_pretrained.py::test_temperatures_of_the_newest_evaluation",),
        ),
    ],
    "adaptive": [
        Mutation(
            "average-of-the-last-step-alone",
            "adaptive/cascade.py",
            "return before + weight * (own - before)",
            "return own",
            (f"{CASCADES}/test_cascade.py::test_only_videos_in_doubt_are_asked_again",),
        ),
        Mutation(
            "margin-over-itself",
            "adaptive/cascade.py",
            "np.partition(average, -2, axis=1)[:, -2]",
            "np.partition(average, -1, axis=1)[:, -1]",
            (f"{CASCADES}/test_cascade.py::test_confidences",),
        ),
        Mutation(
            "patches-ranked-for-the-first-budget-only",
            "adaptive/cascade.py",
            "max(one.budget for one in [step, *covered])",
            "min(one.budget for one in [step, *covered])",
            (f"{CASCADES}/test_runs.py::test_shared_rankings_are_counted_once",),
        ),
        Mutation(
            "shared-ranking-paid-twice",
            "adaptive/fitting.py",
            "entry.shared if ranked else 0.0",
            "0.0",
            (
                f"{CASCADES}/test_fitting.py::test_nothing_beats_the_front_and_it_keeps_what_it_promises",
            ),
        ),
        Mutation(
            "stopped-videos-go-on",
            "adaptive/fitting.py",
            'np.searchsorted(cuts[kind][:-1], sure, side="right")',
            'np.searchsorted(cuts[kind][:-1], sure, side="right") + 1',
            (
                f"{CASCADES}/test_fitting.py::test_nothing_beats_the_front_and_it_keeps_what_it_promises",
            ),
        ),
        Mutation(
            "flattered-cascades-stay",
            "adaptive/fitting.py",
            "right.mean() - gain.std(ddof=1) / np.sqrt(len(gain))",
            "right.mean()",
            (
                f"{CASCADES}/test_fitting.py::test_a_cascade_that_is_hardly_better_than_a_cell_does_not_stay",
                f"{CASCADES}/test_motion.py::test_rules_are_credited_with_less_than_their_accuracy",
            ),
        ),
        Mutation(
            "further-views-averaged-alone",
            "adaptive/packing.py",
            "totals / own.stop",
            "totals / (own.stop - own.start)",
            (f"{CASCADES}/test_runs.py::test_views_are_looked_at_one_by_one",),
        ),
        Mutation(
            "views-begin-at-the-edge",
            "data/views.py",
            "return abs(crop - (self.crops - 1) / 2)",
            "return -abs(crop - (self.crops - 1) / 2)",
            ("data/test_pipeline.py::test_views_are_those_of_the_plain_way",),
        ),
        Mutation(
            "worst-case-without-limit",
            "adaptive/planner.py",
            "if all(one <= limit.value for one, limit in zip(cost, limits, strict=True))",
            "if cost[0] <= limits[0].value",
            (f"{CASCADES}/test_runs.py::test_plans_keep_within_both_limits",),
        ),
        Mutation(
            "less-motion-for-more",
            "adaptive/motion.py",
            "return cells if self.rising else",
            "return cells if not self.rising else",
            (f"{CASCADES}/test_motion.py::test_routes",),
        ),
        Mutation(
            "older-searches-lack-probabilities",
            "token_optimization/search.py",
            "return not self._keeps_probabilities(candidate) or",
            "return True or",
            (
                f"{CASCADES}/test_runs.py::test_probabilities_are_evaluated_again_where_they_are_missing",
            ),
        ),
    ],
    "evaluation": [
        Mutation(
            "failures-leave-the-denominator",
            "evaluation/accuracy.py",
            '"top1": sum(label in top[:1] for label, top in pairs) / len(videos)',
            '"top1": sum(label in top[:1] for label, top in pairs) / len(read)',
            (EVALUATED,),
        ),
        Mutation(
            "failures-leave-the-denominator-of-top-5",
            "evaluation/accuracy.py",
            '"top5": sum(label in top for label, top in pairs) / len(videos)',
            '"top5": sum(label in top for label, top in pairs) / len(read)',
            (EVALUATED,),
        ),
        Mutation("top-4-for-top-5", "evaluation/results.py", "TOP = 5", "TOP = 4", (TOP_FIVE,)),
        Mutation(
            "views-summed",
            "evaluation/view_programs.py",
            "own.append(local_rows(total) / (view + 1))",
            "own.append(local_rows(total))",
            (MEAN_OF_VIEWS,),
        ),
        Mutation(
            "last-view-only",
            "evaluation/view_programs.py",
            "return total + answer(params, output)",
            "return 0 * total + 2 * answer(params, output)",
            (MEAN_OF_VIEWS,),
        ),
        Mutation(
            "logits-not-probabilities",
            "evaluation/view_programs.py",
            "return (jax.nn.sigmoid if multi_label else jax.nn.softmax)(logits)",
            "return logits",
            (MEAN_OF_VIEWS,),
        ),
        Mutation(
            "always-the-first-head",
            "evaluation/settings.py",
            "Setting(budget, Grid.square(*size), nearest_head(budget, config.train.budgets))",
            "Setting(budget, Grid.square(*size), 0)",
            (EVALUATED,),
        ),
        Mutation(
            "every-view-drawn-alike",
            "evaluation/view_programs.py",
            "view_key = jax.random.fold_in(jax.random.key(seed), view)",
            "view_key = jax.random.key(seed)",
            ("evaluation/test_evaluate.py::test_selectors_that_draw_do_so_by_view",),
        ),
        Mutation(
            "loss-of-the-likeliest-class",
            "evaluation/accuracy.py",
            "own = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]",
            "own = probabilities.max(axis=1)",
            (TOP_FIVE,),
        ),
        Mutation(
            "least-confident-mistakes-first",
            "evaluation/results.py",
            "key=lambda i: (-tops[i][0][1], i)",
            "key=lambda i: (tops[i][0][1], i)",
            ("evaluation/test_report.py::test_the_page_says_it",),
        ),
        Mutation(
            "unread-videos-left-out-of-a-class",
            "evaluation/results.py",
            "return np.bincount(self.labels, minlength=len(self.class_names))",
            "read = self.labels[self.predicted(self.main) >= 0]\n"
            "        return np.bincount(read, minlength=len(self.class_names))",
            ("evaluation/test_report.py::test_accuracy_by_class_and_budget",),
        ),
        Mutation(
            "equal-scores-one-by-one",
            "evaluation/average_precision.py",
            "np.diff(scores[order]) != 0",
            "np.diff(scores[order]) <= 0",
            ("evaluation/test_average_precision.py",),
        ),
        Mutation(
            "unread-videos-never-missed",
            "evaluation/accuracy.py",
            "average_precision.of_classes(scores, positive, missed)",
            "average_precision.of_classes(scores, positive, 0 * missed)",
            (f"{MULTI_LABEL}::test_the_report_has_the_average_precision_of_each_class",),
        ),
        Mutation(
            "several-labels-share-one-softmax",
            "evaluation/view_programs.py",
            "(jax.nn.sigmoid if multi_label else jax.nn.softmax)",
            "jax.nn.softmax",
            (f"{MULTI_LABEL}::test_the_report_has_the_average_precision_of_each_class",),
        ),
        Mutation(
            "several-labels-forgotten-when-saved",
            "convert/config_json.py",
            "multi_label=config.train.multi_label,",
            "",
            (f"{MULTI_LABEL}::test_probabilities_are_independent_wherever_the_weights_go",),
        ),
        Mutation(
            "last-window-dropped",
            "deploy/windows.py",
            "if starts[-1] + length < frames:",
            "if not starts:",
            ("deploy/test_windows.py::test_windows_cover_a_video",),
        ),
    ],
    "search": [
        Mutation(
            "worse-half-kept",
            "token_optimization/candidates.py",
            "key=lambda c: (-top1[c.name], ",
            "key=lambda c: (top1[c.name], ",
            ("token_optimization/test_candidates.py::test_the_better_half_of_each_budget_stays",),
        ),
        Mutation(
            "fuller-grids-only",
            "token_optimization/candidates.py",
            "PLAIN_FILL * budget <= self.budget <= budget",
            "PLAIN_FILL * budget <= self.budget < budget",
            ("token_optimization/test_candidates.py::test_every_grid_that_can_fill_a_budget",),
        ),
        Mutation(
            "ties-to-more-tokens",
            "token_optimization/results_log.py",
            "return -share, candidate.budget, candidate.grid.tokens, candidate.name",
            "return -share, -candidate.budget, -candidate.grid.tokens, candidate.name",
            ("token_optimization/test_results_log.py",),
        ),
        Mutation(
            "few-videos-suffice-to-be-chosen",
            "token_optimization/results_log.py",
            ">= max(1, videos)]",
            ">= 1]",
            ("token_optimization/test_results_log.py::test_only_what_saw_enough_is_chosen",),
        ),
        Mutation(
            "top-5-without-top-1",
            "token_optimization/results_log.py",
            "top5 = top1 + outcomes.count(TOP5)",
            "top5 = outcomes.count(TOP5)",
            ("token_optimization/test_results_log.py",),
        ),
        Mutation(
            "a-search-that-is-never-alive",
            "token_optimization/search.py",
            "            self._watchdog.alive()\n            self._write_now_and_then()",
            "            self._write_now_and_then()",
            ("token_optimization/test_search.py::test_a_search_that_hangs_ends",),
        ),
        Mutation(
            "a-crashing-video-is-forgotten",
            "token_optimization/frame_reader.py",
            "return DecodedVideo(number=number, failure=error.reason)",
            "return DecodedVideo()",
            (
                "token_optimization/test_search.py::"
                "test_videos_that_hang_or_crash_their_reader_count_as_failed",
            ),
        ),
        Mutation(
            "narrow-intervals",
            "reports/confidence_intervals.py",
            "LEVEL = 0.95",
            "LEVEL = 0.9",
            ("reports/test_confidence_intervals.py",),
        ),
    ],
    "plan": [
        Mutation(
            "a-limit-that-is-met-fails",
            "token_optimization/planner.py",
            "if costs[name] <= limit]",
            "if costs[name] < limit]",
            ("token_optimization/test_planner.py::test_a_limit_that_is_met_exactly_fits",),
        ),
        Mutation(
            "least-accurate-planned",
            "token_optimization/planner.py",
            "return -_top1(cells[name]), costs[name]",
            "return _top1(cells[name]), costs[name]",
            ("token_optimization/test_planner.py::test_every_limit_gets_the_best_cell",),
        ),
        Mutation(
            "stopped-cells-planned-as-others",
            "token_optimization/planner.py",
            "complete = {name: cell for name, cell in cells.items() if videos[name] == most}",
            "complete = dict(cells)",
            ("token_optimization/test_planner.py::test_every_limit_gets_the_best_cell",),
        ),
        Mutation(
            "attention-at-half-its-cost",
            "models/flops.py",
            "attention = 4 * C * C * attending + 2 * attending**2 * C",
            "attention = 4 * C * C * attending + attending**2 * C",
            ("token_optimization/test_latency.py::test_the_papers_figures",),
        ),
    ],
    "conversion": [
        Mutation(
            "patch-kernels-transposed",
            "convert/official_names.py",
            "lambda x, _: x.transpose(2, 3, 4, 1, 0)",
            "lambda x, _: x.transpose(2, 4, 3, 1, 0)",
            ("convert/test_official_names.py::test_patch_kernel_gives_the_official_embeddings",),
        ),
        Mutation(
            "last-names-for-first",
            "convert/adapt.py",
            "config.class_names[:classes]",
            "config.class_names[-classes:]",
            ("convert/test_weight_files.py::test_only_kinetics_710_is_cut_to_its_parts",),
        ),
        Mutation(
            "first-classes-for-a-part-of-k710",
            "convert/adapt.py",
            "return _take_classes(pretrained, labels_in_k710(part), of_dataset(part))",
            "return _take_classes(pretrained, range(len(of_dataset(part))), of_dataset(part))",
            ("convert/test_weight_files.py::test_a_710_class_head_is_cut_by_the_official_table",),
        ),
        Mutation(
            "names-in-the-order-of-the-list",
            "data/annotations.py",
            "KnownNames(sorted(spelled.values()), str(path))",
            "KnownNames(list(spelled.values()), str(path))",
            ("data/test_annotations.py::test_labels_may_be_names",),
        ),
        Mutation(
            "cls-position-lost-in-resizing",
            "convert/adapt.py",
            "return np.concatenate([table[:1], rows])",
            "return np.concatenate([0 * table[:1], rows])",
            (
                "convert/test_weight_files.py::test_another_native_grid_resizes_positions_as_pytorch_does",
            ),
        ),
    ],
    "hosts": [
        Mutation(
            "a-port-in-use-is-not-noticed",
            "distributed/hosts.py",
            "        if place.host == 0:\n            _check_port",
            "        if place.host < 0:\n            _check_port",
            ("distributed/test_hosts.py::test_a_port_in_use",),
        ),
        Mutation(
            "a-death-is-told-to-nobody",
            "distributed/lifelines.py",
            "            self._tell(number)\n            self._on_death",
            "            self._on_death",
            ("distributed/test_hosts.py::test_a_host_that_is_killed[1]",),
        ),
        Mutation(
            "a-host-that-leaves-has-died",
            "distributed/lifelines.py",
            "        if number != LEAVES and not self._leaving:",
            "        if number == LEAVES and not self._leaving:",
            ("distributed/test_hosts.py::test_a_host_that_is_killed[0]",),
        ),
        Mutation(
            "an-end-of-all-is-a-death",
            "distributed/lifelines.py",
            "unregister(peer)\n        if number != LEAVES and not self._leaving:",
            "unregister(peer)\n            peer.close()\n        if number != LEAVES:",
            ("distributed/test_lifelines.py::test_an_end_that_was_told_is_no_death",),
        ),
    ],
    "doctor": [
        Mutation(
            "wrong-kernels-are-right",
            "doctor/machine.py",
            "if not by < tolerance(dtype)]",
            "if by < 0]",
            ("doctor/test_doctor.py::test_a_wrong_kernel",),
        ),
        Mutation(
            "failures-are-no-failure",
            "doctor/__main__.py",
            "return int(any(outcome.result == FAILED for outcome in outcomes.values()))",
            "return 0",
            ("doctor/test_doctor.py::test_a_workdir_that_cannot_be_written",),
        ),
        Mutation(
            "what-was-written-stays",
            "doctor/__main__.py",
            "                    folder.rmtree()\n",
            "                    pass\n",
            ("doctor/test_doctor.py::test_all_but_whole_runs",),
        ),
    ],
    "resume": [
        Mutation(
            "no-more-epochs",
            "config/fields.py",
            "(field.may_grow and values[0] < values[1])",
            "(field.may_grow and values[0] > values[1])",
            ("test_config.py::test_a_run_may_be_trained_for_more_epochs",),
        ),
        Mutation(
            "weights-to-start-from-for-a-run-that-goes-on",
            "training/completeness.py",
            'if field == "train.init_from" and resumes:',
            'if field == "train.init_from" and not resumes:',
            ("test_main.py::test_a_run_that_goes_on_needs_no_weights_to_start_from",),
        ),
        Mutation(
            "data-from-the-start-again",
            "data/host_share.py",
            "(self._start_step + step) * self._items_per_batch",
            "step * self._items_per_batch",
            ("data/test_pipeline.py::test_resumes_at_any_step_on_any_number_of_hosts",),
        ),
        Mutation(
            "training-data-from-the-start-again",
            "training/train.py",
            "start_step=start,\n        groups=",
            "start_step=0,\n        groups=",
            (RESUMED,),
        ),
        Mutation(
            "metrics-not-rewound",
            "training/train.py",
            "        metrics.rewind(start)\n",
            "",
            (RESUMED,),
        ),
        Mutation(
            "evaluation-owed-is-forgotten",
            "training/validation.py",
            "        self.pending = self.due(start) and start not in dict(found)",
            "        self.pending = False",
            (RESUMED,),
        ),
        Mutation(
            "signal-as-plain-number",
            "training/preemption.py",
            "self._signal = 128 + number",
            "self._signal = int(number)",
            ("training/test_train.py::test_a_second_signal_acts_at_once",),
        ),
        Mutation(
            "a-signal-waits-for-the-compiler",
            "training/train.py",
            "return ended_by_signals_again() if host_count() == 1 else nullcontext()",
            "return nullcontext()",
            ("distributed/test_interrupts.py::test_a_program_that_compiles_ends_at_once",),
        ),
        Mutation(
            "a-signal-waits-for-an-evaluation",
            "training/train.py",
            "at_once = stopped_at_once()",
            "at_once = nullcontext()",
            (
                "distributed/test_interrupts.py"
                "::test_the_first_evaluation_ends_at_once_and_loses_no_step",
            ),
        ),
        Mutation(
            "a-rank-that-a-kill-lost-stays-lost",
            "training/train.py",
            "if quality := validation.quality_of(start.step):  # a kill may have come before",
            "if quality := {}:",
            (RESUMED,),
        ),
        Mutation(
            "a-signal-of-a-child-ends-its-parent",
            "distributed/interrupts.py",
            "after_in_child=lambda: signal.set_wakeup_fd(NO_DESCRIPTOR)",
            "after_in_child=lambda: None",
            ("distributed/test_interrupts.py::test_a_signal_of_a_forked_child_is_its_own",),
        ),
        Mutation(
            "programs-used-last-are-dropped",
            "distributed/compilation_cache.py",
            "key=lambda program: program[1].st_atime_ns",
            "key=lambda program: -program[1].st_atime_ns",
            (
                "distributed/test_compilation_cache.py::"
                "test_programs_that_nobody_used_for_long_make_room",
            ),
        ),
        Mutation(
            "memory-of-compiling-stays",
            "distributed/compilation_cache.py",
            "event == COMPILED and duration_secs >= LONG",
            "False",
            (
                "distributed/test_compilation_cache.py::"
                "test_memory_of_a_long_compilation_is_given_back",
            ),
        ),
        Mutation(
            "steps-in-vain-count",
            "training/train_step.py",
            "_changed_where(usable & done, ",
            "_changed_where(usable, ",
            (
                "distributed/test_two_processes.py::"
                "test_a_run_that_one_host_stopped_goes_on_elsewhere",
            ),
        ),
        Mutation(
            "signal-stays-at-its-host",
            "distributed/lifelines.py",
            "self._tell(-status)",
            "pass",
            ("distributed/test_lifelines.py::test_a_signal_is_told",),
        ),
        Mutation(
            "rate-of-the-step-before",
            "training/train.py",
            "setup.rates[step - 1 - skipped]",
            "setup.rates[max(step - 2 - skipped, 0)]",
            ("training/test_train.py::test_the_logged_learning_rate_is_that_of_the_step",),
        ),
    ],
    "find": [
        Mutation(
            "texts-not-cleaned",
            "data/captions.py",
            "    return tokenize(cleaned)",
            "    return tokenize(texts)",
            (f"{SPACE}::test_vectors_are_those_of_the_evaluation",),
        ),
        Mutation(
            "cosines-not-divided-by-temperature",
            "evaluation/zero_shot.py",
            '    return cosines / params["temperature"]',
            "    return cosines",
            (f"{SPACE}::test_classes_by_their_names",),
        ),
        Mutation(
            "parts-of-another-network",
            "convert/clip_parts.py",
            "    _check_belonging(path, texts)\n",
            "",
            (f"{SPACE}::test_a_folder_mixed_from_two_models_is_refused",),
        ),
        Mutation(
            "parts-left-behind",
            "convert/weight_files.py",
            "    (folder / CLIP).unlink(missing_ok=True)",
            "    (folder / CLIP).exists()",
            (f"{SPACE}::test_other_weights_take_the_place_of_the_parts",),
        ),
        Mutation(
            "index-of-any-model",
            "find/__main__.py",
            "    if weights.checksum(model) != index.settings.model:",
            "    if False:",
            (f"{FIND}::test_an_index_of_another_model_is_refused",),
        ),
        Mutation(
            "index-begun-anew",
            "find/indexing.py",
            "[name for name in paths if name not in index.moments or name in index.failures]",
            "list(paths)",
            (f"{FIND}::test_a_killed_index_goes_on",),
        ),
        Mutation(
            "overlapping-windows-found-twice",
            "find/search.py",
            "    return one.start < other.end and other.start < one.end",
            "    return one == other",
            (f"{FIND}::test_overlapping_windows_are_found_once",),
        ),
        Mutation(
            "padding-of-a-batch-embedded-as-a-moment",
            "find/indexing.py",
            "clips += clips[-1:] * (self._batch_size - len(clips))",
            "clips = clips[-1:] * (self._batch_size - len(clips)) + clips",
            (f"{FIND}::test_an_index_holds_the_vectors_of_encode_video",),
        ),
    ],
    "chat": [
        Mutation(
            "pairs-of-channels-turned",
            "models/language_model.py",
            "first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)",
            "first, second = x.astype(jnp.float32)[..., ::2], x.astype(jnp.float32)[..., 1::2]",
            ("models/test_language_model.py::test_golden_logits_loss_and_gradients",),
        ),
        Mutation(
            "another-epsilon",
            "convert/language_model_files.py",
            'epsilon=float(values["rms_norm_eps"])',
            "epsilon=1e-5",
            ("models/test_language_model.py::test_golden_logits_loss_and_gradients",),
        ),
        Mutation(
            "padding-on-the-left-seen",
            "models/language_model.py",
            " & (all_slots >= cache.begin[:, None, None])",
            " & (all_slots >= 0)",
            ("models/test_language_model.py::test_golden_greedy_tokens_with_a_cache",),
        ),
        Mutation(
            "llm-tensors-left-over",
            "convert/language_model_files.py",
            '(wanted.keys() - found, "lacks"), (found - wanted.keys(), "has also")',
            '(wanted.keys() - found, "lacks"), (set(), "has also")',
            ("models/test_language_model.py::test_llama_has_no_biases_and_no_norms_of_heads",),
        ),
        Mutation(
            "merged-without-sizes",
            "models/connector.py",
            "merged.tokens.astype(jnp.float32) * merged.sizes[..., None]",
            "merged.tokens.astype(jnp.float32)",
            ("models/test_connector.py::test_golden_merging",),
        ),
        Mutation(
            "official-order-everywhere",
            "models/connector.py",
            "order = jnp.argsort(merged.position, axis=1)",
            "order = jnp.argsort(merged.position * 0, axis=1)",
            ("models/test_connector.py::test_tokens_in_the_order_that_they_had",),
        ),
        Mutation(
            "scores-within-the-video",
            "objectives/next_token_loss.py",
            "jnp.where(tokens > place[:, None], K - 1, 0)",
            "jnp.where(tokens >= place[:, None], K - 1, 0) - (tokens > place[:, None])",
            (
                "objectives/test_flux_chat.py::test_golden_stage_1",
                "objectives/test_flux_chat.py::test_only_the_tokens_before_labels_are_scored",
            ),
        ),
        Mutation(
            "mean-of-a-part",
            "objectives/flux_chat.py",
            "loss = jnp.sum(losses) / total",
            "loss = jnp.mean(losses)",
            ("training/test_chat.py::test_a_run_learns",),
        ),
        Mutation(
            "video-after-the-last-block",
            "objectives/flux_chat.py",
            "depth = network.depth + 1 + config.chat.layer",
            "depth = network.depth",
            ("objectives/test_flux_chat.py::test_the_layer_whose_tokens_are_projected",),
        ),
        Mutation(
            "any-language-model",
            "objectives/flux_chat_weights.py",
            "if language_model_files.fingerprint(folder) != found.frozen.get(LLM):",
            "if False:",
            ("deploy/test_chat.py::test_another_language_model_is_refused",),
        ),
        Mutation(
            "padding-of-a-prompt-remembered",
            "deploy/chat.py",
            "replace(longer, length=cache.length + count)",
            "longer",
            ("deploy/test_chat.py::test_answers_are_those_of_the_whole_text",),
        ),
        Mutation(
            "end-of-an-answer-read-twice",
            "deploy/chat.py",
            "                self._unread = []  # a",
            "                pass  # a",
            ("deploy/test_chat.py::test_a_follow_up_after_an_end",),
        ),
        Mutation(
            "first-end-ends-all-answers",
            "deploy/chat_batches.py",
            "(number < answer_tokens) & ~jnp.all(ended)",
            "(number < answer_tokens) & ~jnp.any(ended)",
            ("deploy/test_chat.py::test_several_at_once_are_answered_as_one_by_one",),
        ),
        Mutation(
            "padding-of-a-batch-seen",
            "deploy/chat_batches.py",
            "model.new_cache(begin + padding, S + answer_tokens)",
            "model.new_cache(0 * begin, S + answer_tokens)",
            ("deploy/test_chat.py::test_several_at_once_are_answered_as_one_by_one",),
        ),
    ],
    "chat-text": [
        Mutation(
            "half-a-character-streamed",
            "data/chat_tokenizer.py",
            "if not text.endswith(UNFINISHED):",
            "if True:",
            ("data/test_chat_tokenizer.py::test_characters_of_several_tokens_wait_for_their_last",),
        ),
        Mutation(
            "answers-end-by-im-end-alone",
            "data/chat_tokenizer.py",
            "[*_end_tokens(folder), self.im_end]",
            "[self.im_end]",
            ("data/test_chat_tokenizer.py::test_end_tokens_of_the_configs",),
        ),
        Mutation(
            "headers-are-learned",
            "data/chat_templates.py",
            "_common(own, tokenizer.encode(_header(role)))",
            "0",
            ("data/test_chat_templates.py::test_labels_of_answers_are_their_content_and_end",),
        ),
        Mutation(
            "questions-are-learned",
            "data/chat_templates.py",
            "        if role == USER:\n            first = end\n",
            "",
            ("data/test_chat_templates.py::test_labels_of_answers_are_their_content_and_end",),
        ),
        Mutation(
            "official-labels-without-marks",
            "data/chat_templates.py",
            "marks = {*newline, tokenizer.im_start, tokenizer.im_end}",
            "marks = {*newline, tokenizer.im_end}",
            ("data/test_chat_templates.py::test_golden_ids_and_official_labels",),
        ),
        Mutation(
            "video-where-it-stands",
            "data/chat_templates.py",
            "if MARKER in text and not text.startswith(MARKER):",
            "if False:",
            ("data/test_chat_templates.py::test_the_marker_goes_first_and_has_two_names",),
        ),
        Mutation(
            "follow-up-without-the-end",
            "data/chat_templates.py",
            'text = f"<|im_end|>\\n{_header(USER)}',
            'text = f"{_header(USER)}',
            ("data/test_chat_templates.py::test_golden_prompts",),
        ),
        Mutation(
            "seconds-taken-for-frames",
            "data/reading.py",
            "first = int(start * video.frame_rate)",
            "first = int(start)",
            ("data/test_conversations.py::test_seconds_are_frames",),
        ),
        Mutation(
            "left-is-right",
            "data/conversations.py",
            "part = Part(name=storage.display_name(path), source=source, flip=False)",
            "part = Part(name=storage.display_name(path), source=source)",
            ("data/test_conversations.py::test_videos_and_images_are_parts_of_their_own",),
        ),
        Mutation(
            "other-turns-same-data",
            "data/conversations.py",
            'f"{example.conversation} {example.seconds}"',
            'f"{example.seconds}"',
            ("data/test_conversations.py::test_the_identity_covers_what_is_said",),
        ),
        Mutation(
            "article-taken-for-an-answer",
            "evaluation/mvbench.py",
            "(?!A (?!is\\b)[a-z])",
            "",
            ("evaluation/test_mvbench.py::test_choices",),
        ),
        Mutation(
            "failed-videos-leave-the-mean",
            "evaluation/mvbench.py",
            "counted.get(rule, len(answers))",
            "counted.get(rule, len(read))",
            ("evaluation/test_mvbench.py::test_a_report_has_three_rules_side_by_side",),
        ),
        Mutation(
            "failed-videos-have-empty-answers",
            "evaluation/mvbench.py",
            "read = [answer for answer in answers if not answer.failure]",
            "read = list(answers)",
            ("evaluation/test_mvbench.py::test_a_report_has_three_rules_side_by_side",),
        ),
        Mutation(
            "segments-by-their-starts",
            "evaluation/mvbench.py",
            "first + size / 2 + np.round",
            "first + np.round",
            ("evaluation/test_mvbench.py::test_golden_frames",),
        ),
    ],
}


class Ran(NamedTuple):
    """How a run of tests ended. status: pytest's, or None where it was cut off."""

    status: int | None
    seconds: float
    output: str

    @property
    def noticed_by(self) -> str:
        """The test that failed first."""
        lines = [line for line in self.output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return lines[0].partition(" - ")[0].partition("::")[2] if lines else "(they hang)"


class UnusableError(Exception):
    """Nothing can be said: a text is not there, or tests fail anyway."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutations or groups of them")
    parser.add_argument("--list", action="store_true", help="show the mutations and end")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="mutations-"))
    try:
        mutations = chosen(options.only)
        if options.list:
            print(*(f"{m.group:<13} {m.name:<42} {m.file}" for m in mutations), sep="\n")
            return 0
        copy_tree(folder / "tree")
        for mutation in mutations:
            mutated(folder / "tree", mutation)
        return try_all(mutations, folder / "tree")
    except UnusableError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def chosen(names: Sequence[str] | None) -> list[Mutation]:
    """All mutations, or those that are named, by their own names or their group's."""
    everything = [mutation for own in MUTATIONS.values() for mutation in own]
    known = {m.name for m in everything} | MUTATIONS.keys()
    if unknown := [name for name in names or () if name not in known]:
        raise UnusableError(f"no mutation or group is called {unknown[0]}; see --list")
    if not names:
        return everything
    return [m for m in everything if m.name in names or m.group in names]


def copy_tree(target: Path) -> None:
    """The files of the working tree as they are now, those that git ignores left out."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def mutated(tree: Path, mutation: Mutation) -> str:
    """The text of the file with the mutation. Raises UnusableError where it cannot be applied."""
    path = tree / PACKAGE / mutation.file
    text = path.read_text() if path.exists() else ""
    if (found := text.count(mutation.old)) != 1:
        raise UnusableError(
            f"{mutation.name}: {mutation.file} has its text {found} times, not once"
        )
    text = text.replace(mutation.old, mutation.new)
    compile(text, mutation.file, "exec")
    return text


def try_all(mutations: Sequence[Mutation], tree: Path) -> int:
    """Tries one mutation after another and prints what came of each; the exit status."""
    results: list[tuple[Mutation, str, Ran]] = []
    begin, group = time.monotonic(), ""
    try:
        for number, mutation in enumerate(mutations, start=1):
            if mutation.group != group:
                group = mutation.group
                check_unmutated(tree, [m for m in mutations if m.group == group])
            ran = try_one(tree, mutation)
            results.append((mutation, verdict(mutation, ran), ran))
            left = (time.monotonic() - begin) / number * (len(mutations) - number)
            say(
                f"[{number}/{len(mutations)}] {results[-1][1]:<9} {mutation.name}, "
                f"{ran.seconds:.0f} s; about {left / 60:.0f} min left"
            )
    finally:
        print_table(results)
    return int(any(word in ("SURVIVED", "NOTICED") for _, word, _ in results))


def check_unmutated(tree: Path, mutations: Sequence[Mutation]) -> None:
    """Raises UnusableError unless the tests of these mutations pass without any."""
    tests = list(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
    ran = run_tests(tree, tests)
    say(f"{mutations[0].group}: its tests without a mutation, {ran.seconds:.0f} s")
    if ran.status != 0:
        how = "hang" if ran.status is None else "fail"
        raise UnusableError(f"{ran.output}\nthese tests {how} without a mutation")


def try_one(tree: Path, mutation: Mutation) -> Ran:
    """Runs the mutation's tests with it in place, and takes it back."""
    path = tree / PACKAGE / mutation.file
    before = path.read_text()
    path.write_text(mutated(tree, mutation))
    try:
        ran = run_tests(tree, mutation.tests)
    finally:
        path.write_text(before)
    if ran.status not in (0, 1, None):
        raise UnusableError(f"{ran.output}\n{mutation.name}: its tests cannot be run")
    return ran


def verdict(mutation: Mutation, ran: Ran) -> str:
    """What came of a mutation; words in capitals are for someone to look at."""
    if mutation.harmless:
        return "harmless" if ran.status == 0 else "NOTICED"
    return "SURVIVED" if ran.status == 0 else "caught"


def run_tests(tree: Path, tests: Sequence[str]) -> Ran:
    """Runs tests of the copied tree until one fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=short"]
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        # What no mutation changes is compiled once for all of them.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(tree.with_name("compiled")))
    begin = time.monotonic()
    process = subprocess.Popen(
        [*command, f"--basetemp={tree.with_name('tmp')}", *(f"tests/{test}" for test in tests)],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C is for us: we end it and all that it has started
    )
    status = None
    try:
        output, _ = process.communicate(timeout=60 * MINUTES)
        status = process.returncode
    except subprocess.TimeoutExpired:
        end(process)
        output, _ = process.communicate()
    finally:
        end(process)
    return Ran(status, time.monotonic() - begin, output)


def end(process: subprocess.Popen) -> None:
    """Ends a process and all of its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def print_table(results: Sequence[tuple[Mutation, str, Ran]]) -> None:
    """A line a mutation, and how many came to what."""
    if not results:
        return
    print(f"\n{'group':<13} {'mutation':<42} {'result':<9} noticed by, or why harmless")
    for mutation, word, ran in results:
        why = mutation.harmless or (ran.noticed_by if word == "caught" else "")
        print(f"{mutation.group:<13} {mutation.name:<42} {word:<9} {why}")
    words = [word for _, word, _ in results]
    print(", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words)))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
