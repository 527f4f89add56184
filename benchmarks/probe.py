r"""Linear and attentive probes: how well the classes can be read from a network's frozen features.

    python -m benchmarks.probe --checkpoint=demo/pretrained --train=demo/clips/train.csv \
        --validation=demo/clips/validation.csv --grid=12x56 --tokens=128,64,32

The network, in any form that `from_pretrained` reads, looks once at the middle clip of each video
and stays as it is. The linear probe is a linear classifier on the standardised clip vector, the
attentive one FluxViT's attention pooling and a linear classifier on the kept tokens. Each is
trained at several learning rates; the one that does best on a tenth of the training videos, left
out for that, is reported on the validation videos. A video that cannot be read counts as wrong.
All features of the training videos are held in memory (float16): --probes=linear needs little.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import fluxvit_jax
from fluxvit_jax.budgets import Grid, nearest_head
from fluxvit_jax.config import default_config
from fluxvit_jax.data.annotations import Source, open_source
from fluxvit_jax.data.pipeline import evaluation_batches
from fluxvit_jax.errors import UserError
from fluxvit_jax.models.layers import AttentionPool, LayerNorm, Linear, structure
from fluxvit_jax.pretrained import PretrainedModel, forward

PROBES = ("linear", "attentive")
RATES = (3e-4, 1e-3, 3e-3)
EPOCHS, BATCH, DECAY = 50, 64, 1e-3
LEFT_OUT = 10  # one in so many training videos chooses the learning rate


class Features(NamedTuple):
    """Of the readable videos of a source: pooled float32 [n, E], tokens float16 [n, 1 + N, C]
    (None where they are not wanted), label int32 [n]; videos: how many there are in all.
    """

    pooled: np.ndarray
    tokens: np.ndarray | None
    label: np.ndarray
    videos: int


class LinearProbe(nnx.Module):
    """[B, C] -> [B, classes]."""

    def __init__(self, width: int, classes: int, rngs: nnx.Rngs):
        self.classifier = Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.classifier(x)


class AttentiveProbe(nnx.Module):
    """[B, N, C] -> [B, classes]."""

    def __init__(self, width: int, classes: int, rngs: nnx.Rngs):
        heads = max(1, width // 64)
        self.pool = AttentionPool(width, width, heads, jnp.float32, rngs)
        self.norm = LayerNorm(width, rngs=rngs)
        self.classifier = Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.classifier(self.norm(self.pool(x.astype(jnp.float32), None)))


def main() -> int:
    options = parse()
    try:
        model = fluxvit_jax.from_pretrained(options.checkpoint)
        sources = [
            open_source(path, options.root, options.classes)
            for path in (options.train, options.validation)
        ]
        labels = sources[0].class_names or range(options.classes or highest_label(sources[0]) + 1)
        print("| tokens | " + " | ".join(f"{probe} top-1 (%)" for probe in options.probes) + " |")
        print("|---" * (1 + len(options.probes)) + "|", flush=True)
        for tokens in options.tokens:
            found = [features(model, source, options, tokens) for source in sources]
            cells = [f"{accuracy(probe, *found, len(labels)):.1f}" for probe in options.probes]
            print(f"| {tokens} | {' | '.join(cells)} |", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse() -> argparse.Namespace:
    def numbers(separator: str, text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(separator))

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probe", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--checkpoint", required=True, help="workdir, folder or file of weights")
    parser.add_argument("--train", type=Path, required=True, help="list of videos to train on")
    parser.add_argument("--validation", type=Path, required=True, help="list to report on")
    parser.add_argument("--root", help="of the lists' paths (default: the folder of each list)")
    parser.add_argument("--classes", type=int, help="(default: what the training list has)")
    parser.add_argument(
        "--grid", type=partial(numbers, "x"), default=(8, 224), help="frames x pixels (8x224)"
    )
    parser.add_argument(
        "--tokens", type=partial(numbers, ","), default=(2048, 1024), help="budgets (2048,1024)"
    )
    parser.add_argument(
        "--probes", type=lambda text: text.split(","), default=PROBES, help=",".join(PROBES)
    )
    parser.add_argument("--batch", type=int, default=16, help="videos at once (default: 16)")
    parser.add_argument("--workers", type=int, default=2, help="that read videos (default: 2)")
    options = parser.parse_args()
    if unknown := [name for name in options.probes if name not in PROBES]:
        parser.error(f"--probes: {unknown[0]!r} is none of {', '.join(PROBES)}")
    if len(options.grid) != 2 or options.grid[1] % 14:
        parser.error("--grid: must be FRAMESxPIXELS, with pixels a multiple of 14")
    return options


def highest_label(source: Source) -> int:
    return max(source[number].label for number in range(len(source)))


def features(
    model: PretrainedModel, source: Source, options: argparse.Namespace, tokens: int
) -> Features:
    """What the network makes of the middle clip of each video."""
    config = default_config()
    config.eval.clips = config.eval.crops = 1
    config.eval.batch_size, config.data.workers = options.batch, options.workers
    grid, head = Grid.square(*options.grid), nearest_head(tokens, model.config.head_budgets)
    run = jax.jit(
        lambda params, patches: forward(params, patches, model.config.model, grid, tokens, head)[0]
    )
    pooled, kept, labels = [], [], []
    with (
        evaluation_batches(config, source, [grid]) as batches,
        tqdm(total=len(source), desc=f"{tokens} tokens", unit="video") as bar,
    ):
        for batch in batches:
            answer = run(model.params, batch["patches0"][:, 0])
            good = (batch["video"] >= 0) & (batch["failure"] == "")
            pooled.append(np.asarray(answer.pooled)[good])
            if "attentive" in options.probes:
                kept.append(np.asarray(answer.tokens, np.float16)[good])
            labels.append(batch["label"][good])
            bar.update(int((batch["video"] >= 0).sum()))
    tokens_seen = np.concatenate(kept) if kept else None
    return Features(np.concatenate(pooled), tokens_seen, np.concatenate(labels), len(source))


def accuracy(probe: str, train: Features, validation: Features, classes: int) -> float:
    """Top-1 (%) of a probe on all validation videos."""
    if probe == "linear":
        mean, std = train.pooled.mean(0), train.pooled.std(0) + 1e-6
        inputs = [(own.pooled - mean) / std for own in (train, validation)]
    else:
        inputs = [train.tokens, validation.tokens]
    chosen = np.arange(len(train.label)) % LEFT_OUT == LEFT_OUT - 1
    tried = []
    for rate in RATES:
        answer = fit(probe, inputs[0][~chosen], train.label[~chosen], classes, rate)
        own = np.mean(answer(inputs[0][chosen]) == train.label[chosen])
        tried.append((own, rate, answer))
    best = max(tried, key=lambda one: one[:2])[2]
    right = np.sum(best(inputs[1]) == validation.label)
    return 100 * float(right) / validation.videos


def fit(
    probe: str, inputs: np.ndarray, labels: np.ndarray, classes: int, rate: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Trains a probe; what it returns gives the likeliest class of each row."""
    kind = LinearProbe if probe == "linear" else AttentiveProbe
    make = partial(kind, inputs.shape[-1], classes)
    graph, params = structure(make), nnx.state(make(nnx.Rngs(0)), nnx.Param)
    steps = EPOCHS * max(1, len(inputs) // BATCH)
    optimizer = optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=DECAY)
    state = optimizer.init(params)

    def loss(params, x, y):
        logits = nnx.merge(graph, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    order = rng.permuted(np.tile(np.arange(len(inputs)), (EPOCHS + 1, 1)), axis=1).ravel()
    for number in range(steps):
        rows = order[number * BATCH : (number + 1) * BATCH]
        params, state = step(params, state, inputs[rows], labels[rows])
    likeliest = jax.jit(lambda x: nnx.merge(graph, params)(x).argmax(axis=-1))

    def answer(x: np.ndarray) -> np.ndarray:
        parts = np.split(x, range(BATCH, len(x), BATCH)) if len(x) else []
        return np.concatenate([np.asarray(likeliest(part)) for part in parts])

    return answer


if __name__ == "__main__":
    sys.exit(main())
