r"""Video chat: FluxViT before a language model, stage 1 (table 10 of the paper). NOT RUN HERE.

    python -m fluxvit_jax.main --config=configs/chat.py:base,data=conversations.json \
        --workdir=runs/chat_base --config.train.init_from=runs/k710_base \
        --config.chat.llm=Qwen2.5-7B-Instruct
    python -m fluxvit_jax.main --mode=chat --checkpoint=runs/chat_base --video=video.mp4 \
        --tokens=512
    python -m fluxvit_jax.main --mode=evaluate --config=configs/mvbench.py:base \
        --workdir=runs/chat_base --config.data.validation=MVBench/json \
        --config.data.root=MVBench/video

Argument: small, base (default) or large; `,single=2048` trains one budget; `,data=LIST` names what
to train on: conversations as LLaVA's and VideoChat-Flash's JSON, JSON Lines or the YAML that names
several (`fluxvit_jax/data/conversations.py`), or captions, CSV of path,caption or JSON.
VideoChat-Flash's are the captions of S-MiT (481 k videos) and LLaVA's 558 k captions of images.

The language model is a folder as Hugging Face has them: Qwen2, Qwen2.5, Qwen3 or Llama. It needs
the extra `chat`: pip install 'fluxvit_jax[chat]'.

Sources: "table" is table 10, which tells neither the language model nor data, steps and rate;
"base" is stage 1 of VideoChat-Flash (stage1_internvideo2_tome16_res224_qwen7b.sh), on which it
builds. What neither tells is chosen here, and said so. Unlike the base, whose frozen encoder drops
paths as in training, this one does not.

Hardware: base used 8 GPUs. `--mode=preflight` tells whether a batch fits; a folder with the
language model's config.json alone is enough for it.
"""

from ml_collections import ConfigDict

from fluxvit_jax.config.fields import REQUIRED, default_config
from fluxvit_jax.config.variants import NO_CLASSES
from fluxvit_jax.data import places
from fluxvit_jax.recipes import common

LISTS = ("train.yaml", "train.json", "train.jsonl", "train.csv")  # looked for in data/chat


def get_config(argument: str = "base") -> ConfigDict:
    # Budgets: those of the table. Whether one projector was trained for all is not told; chosen.
    options = common.parse(argument, budgets=(2048, 1024, 512), data=True)
    config = default_config(options.variant)

    config.model.classes = NO_CLASSES
    config.model.scan = True  # quick to compile

    config.data.train = options.data or places.find("chat", LISTS)
    config.data.grids.frames = "4..24..2"  # not told: those of fine-tuning, up to 4096 tokens
    config.data.grids.resolutions = "168..252..28"
    config.data.grids.tokens = (2048, 4096)
    config.data.clips_per_grid = 8
    config.data.repeated_aug = 1
    config.data.workers = 16  # processes a host; chosen
    # Base: whole frames, squeezed. Here nearly whole ones, of all shapes up to 2 to 1.
    config.data.augment.crop = "random_resized"
    config.data.augment.scale = (0.9, 1.0)
    config.data.augment.ratio = (1 / 2, 2.0)
    config.data.augment.flip = 0.0  # answers tell left from right

    config.train.objective = "flux_chat"
    config.train.init_from = REQUIRED
    config.train.freeze = "all"  # table: encoder and language model are frozen
    config.train.batch_size = 512  # base
    config.train.epochs = 1  # base
    config.train.warmup_epochs = 0.03  # base
    config.train.budgets = options.budgets
    config.train.align_weight = 0.0

    config.chat.llm = REQUIRED  # base: Qwen2.5-7B-Instruct
    config.chat.train = "projector"  # table
    config.chat.step_budgets = "one"  # chosen: three steps in the time of one with all budgets
    config.chat.layer = -2  # base
    config.chat.merge = 16  # base: 256 tokens of a frame become 16
    config.chat.order = "time"  # base leaves the order of merging, where halves keep it anyway
    config.chat.template = "plain"  # base
    config.chat.time_message = True  # base, in inference; "plain" has no place for it
    config.chat.labels = "answers"
    config.chat.text_tokens = 128  # base: up to 8192; captions are short

    config.optim.schedule = "cosine_floor"  # base
    config.optim.learning_rate = 1e-3  # base
    config.optim.min_learning_rate = 0.0  # base
    config.optim.b1, config.optim.b2 = 0.9, 0.999  # base, as is the next
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0  # base
    config.optim.layer_decay = 1.0
    config.optim.clip_norm = 1.0  # base

    # Table 10's plain grids.
    config.eval.settings = ((2048, 8, 224), (1024, 4, 224), (512, 2, 224))
    config.eval.clips, config.eval.crops = 1, 1
    config.eval.frames, config.eval.resize = "middle", "squeeze"  # base
    return config
