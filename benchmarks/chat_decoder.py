"""A tiny language model for benchmarks/chat_study.py: its tokenizer, and its training on texts.

It is of Qwen3's layout and learns, without any video, to answer the study's question from words:
in the video's place stand words of the answer in any order, more or fewer of them, or none. So it
heeds what stands there, as language models do that were trained on much text.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fluxvit_jax.convert import language_model_files
from fluxvit_jax.data.chat_templates import IGNORED, SYSTEM, VIDEO, prompt_ids, time_message
from fluxvit_jax.data.chat_tokenizer import FILE, IM_END, IM_START, PADDING, ChatTokenizer
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.language_model import LanguageModel, LanguageModelConfig, graphdef

TOKENS = 512  # of the tokenizer, at most
WORDS = (4, 16)  # in the video's place, at least and at most
BATCH = 32
LENGTHS = (64, 104)  # of a text with such words, in tokens: without and with a time message
LEARNING_RATE = 3e-3
SHOWN = 25  # steps between two lines of progress


class Texts(NamedTuple):
    """ids: int32 [B, L]; labels: int32 [B, L], `IGNORED` but for answers; not shifted."""

    ids: np.ndarray
    labels: np.ndarray


def write_decoder(
    folder: Path, question: str, answers: Sequence[str], steps: int, seed: int = 0
) -> float:
    """Trains a tokenizer and a decoder; writes them as a Hugging Face folder.

    Returns the share of the last texts' answer tokens that were foretold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, [question, *answers])
    tokenizer = ChatTokenizer(folder)
    config = decoder_config(tokenizer.size)
    params, hits = _train(config, tokenizer, question, answers, steps, seed)
    language_model_files.write(folder, config, jax.device_get(params))
    return hits


def decoder_config(tokens: int) -> LanguageModelConfig:
    """A decoder of 0.4 million parameters for a tokenizer of so many tokens."""
    return LanguageModelConfig(
        width=128, depth=2, heads=4, kv_heads=2, head_size=32, hidden=256, vocabulary=tokens,
        context=512, rope_theta=10_000.0, epsilon=1e-6, qkv_bias=False, qk_norm=True, tied=True,
    )  # fmt: skip


def write_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """Byte-level BPE, trained on texts and what a chat's prompt adds to them, as tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=[PADDING, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    added = [SYSTEM.replace(IM_START, "").replace(IM_END, ""), "user\n", "assistant\n"]
    added += [time_message(seconds / 7, 8, training=False) for seconds in range(5, 20)]
    tokenizer.train_from_iterator([*texts, *added], trainer)
    (folder / FILE).write_text(json.dumps(json.loads(tokenizer.to_str()), indent=1) + "\n")


def draw_texts(
    rng: np.random.Generator, tokenizer: ChatTokenizer, question: str, answers: Sequence[str]
) -> Texts:
    """A batch of conversations as `Chat.ask` has them, with words in place of videos.

    One batch in four tells how long the video is, as `Chat.ask` does; the training of a projector
    does not.
    """
    told = rng.random() < 1 / 4
    ids = np.full((BATCH, LENGTHS[told]), tokenizer.padding, np.int32)
    labels = np.full(ids.shape, IGNORED, np.int32)
    for row in range(BATCH):
        text = answers[rng.integers(len(answers))]
        seconds, frames = rng.uniform(0.6, 4), int(rng.integers(2, 17))
        message = time_message(seconds, frames, training=False) if told else ""
        prompt = prompt_ids([], question, tokenizer, message)
        place = int(np.argmax(prompt == VIDEO))
        words = tokenizer.encode(_drawn_words(rng, text))
        answer = [*tokenizer.encode(text), tokenizer.im_end]
        whole = [*prompt[:place], *words, *prompt[place + 1 :], *answer]
        ids[row, : len(whole)] = whole
        labels[row, len(whole) - len(answer) : len(whole)] = answer
    return Texts(ids, labels)


def _drawn_words(rng: np.random.Generator, text: str) -> str:
    """Words of a text in any order, some of them repeated, " one other"; "" one time in 8."""
    fewest, most = WORDS
    count = 0 if rng.random() < 1 / 8 else int(rng.integers(fewest, most + 1))
    return "".join(f" {word}" for word in rng.choice(text.split(), count))


def _train(
    config: LanguageModelConfig,
    tokenizer: ChatTokenizer,
    question: str,
    answers: Sequence[str],
    steps: int,
    seed: int,
) -> tuple[dict[str, Any], float]:
    params = fluxvit.split(LanguageModel(config, nnx.Rngs(seed)))[1]
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, max(steps // 20, 1), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98))
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, texts: Texts) -> tuple[Any, Any, jax.Array, jax.Array]:
        def loss_of(params: Any) -> tuple[jax.Array, jax.Array]:
            return answer_loss(config, params, texts)

        (loss, hits), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, new = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), new, loss, hits

    rng, begin, recent = np.random.default_rng(seed), time.monotonic(), []
    for number in range(1, steps + 1):
        texts = draw_texts(rng, tokenizer, question, answers)
        params, state, loss, hits = step(params, state, texts)
        recent = [*recent[1 - SHOWN :], (float(loss), float(hits))]
        if number % SHOWN == 0 or number == steps:
            left = (time.monotonic() - begin) / number * (steps - number)
            mean = np.mean(recent, axis=0)
            print(
                f"decoder: step {number}/{steps}, loss {mean[0]:.3f}, {mean[1]:.1%} of tokens "
                f"right, {left:.0f} s left",
                flush=True,
            )
    return params, float(np.mean(recent, axis=0)[1])


def answer_loss(
    config: LanguageModelConfig, params: Any, texts: Texts
) -> tuple[jax.Array, jax.Array]:
    """The mean cross entropy of the labels, and the share of them that are the likeliest."""
    model: LanguageModel = fluxvit.from_params(graphdef(config), params)
    scores = model.logits(model.encode(model.embed(texts.ids))[:, :-1])
    targets = texts.labels[:, 1:]
    counted = targets != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.maximum(targets, 0))
    hits = jnp.argmax(scores, axis=-1) == targets
    return jnp.mean(losses, where=counted), jnp.mean(hits, where=counted)
