"""Video chat at the demo's size: a projector between the demo's network and a tiny decoder.

    python -m fluxvit_jax.main --config=configs/demo_chat.py --workdir=demo/chat \
        --config.train.init_from=demo/multi --config.chat.llm=FOLDER

Argument: `multi` (default: three budgets on flexible grids) or `fixed` (one grid, every token),
with `,seed=N`. The network starts from a trained run of configs/demo.py, of the same argument, and
is frozen, as is the language model. `python -m benchmarks.chat_study` makes such a model and the
list of conversations, runs both recipes, and asks about unseen photographs.

Hardware: two CPU cores, about ten minutes. Expected result, one seed: of 240 clips of unseen
photographs, Flux-Multi's event is told correctly in 76, 79 and 73 % at 128, 64 and 32 tokens, the
direction in 80, 79 and 73 %; `fixed` on smaller grids falls from 65 to 45 and 21 %, and from 79 to
69 and 50 %. Always saying the commonest is right in 33 and 21 %. The speed is not learned.
All numbers are ours, chosen for so small a network and so short a training; none is the paper's.
"""

from ml_collections import ConfigDict

from fluxvit_jax.config.fields import REQUIRED
from fluxvit_jax.config.variants import NO_CLASSES
from fluxvit_jax.recipes import demo
from fluxvit_jax.recipes.demo_clip import parse


def get_config(argument: str = "multi") -> ConfigDict:
    method, seed = parse(argument)
    config = demo.get_config(f"{method},seed={seed}")

    config.model.classes = NO_CLASSES
    config.data.train = "demo/conversations.json"
    config.data.validation = ""
    config.data.class_names = ""
    # Every grid holds the largest budget.
    config.data.grids.tokens = (demo.BUDGETS[0], 192)
    if method == "multi":
        config.data.grids.frames = "8..12..2"

    config.train.objective = "flux_chat"
    config.train.init_from = REQUIRED
    config.train.freeze = "all"
    config.train.align_weight = 0.0
    config.train.batch_size = 16
    config.train.epochs = 6
    config.train.warmup_epochs = 0.5

    config.chat.llm = REQUIRED
    config.chat.template = "qwen"
    # Of two blocks. After five epochs at 128 tokens, the event was told of 85 % of 120 training
    # clips; with the first block's tokens, of 53 %.
    config.chat.layer = -1
    config.chat.merge = 8  # 16, 8 and 4 tokens
    config.chat.text_tokens = 44
    config.chat.time_message = False  # it does not fit; no text was trained with it
    config.optim.learning_rate = 2e-3
    config.optim.weight_decay = 0.0
    return config
