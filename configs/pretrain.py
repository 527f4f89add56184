r"""Flux-UMT: pre-training by masked distillation from InternVideo2-1B, no labels. NOT RUN HERE.

    python -m fluxvit_jax.convert InternVideo2-stage2_1b-224p-f4.pt teacher --network=internvideo2
    python -m fluxvit_jax.main --config=configs/pretrain.py:base,data=mixture.csv \
        --workdir=runs/pretrain_base --config.distill.teacher=teacher

Argument: small, base or large; `,data=LIST` names what to train on: a list of videos and images, or
a mixture of several with weights and rules (`fluxvit_jax/data/mixture.py`). Table 14's data are
K710, MiT, ANet, SSv2 and HACS:

    list,root,weight,flip
    k710/train.csv,k710/videos,1,yes
    mit/train.csv,mit/videos,1,yes
    anet/train.csv,anet/videos,1,yes
    ssv2/train.csv,ssv2/videos,1,no
    hacs/train.csv,hacs/videos,1,yes

Afterwards: configs/k710.py or configs/k400.py with --config.train.init_from=runs/pretrain_base.

Sources: "table" is table 14 of the paper (arXiv 2503.14237), whose code for this stage is not
released; "base" is InternVideo2's distillation, on which it builds (single_modality of
OpenGVLab/InternVideo, scripts/distillation). What neither tells is chosen here, and said so.

Hardware: docs/pretraining.md has what the TPU compiler says of it. On TPU add
--config.model.cls=inside, and --config.parallel.mesh.fsdp=16 or so to cut the teacher.

Published result: none of this stage alone; FluxViT's results on K400 start from it.
"""

from ml_collections import ConfigDict

from fluxvit_jax.config.fields import REQUIRED, default_config
from fluxvit_jax.config.variants import NO_CLASSES
from fluxvit_jax.data import places
from fluxvit_jax.recipes import common


def get_config(argument: str = "base") -> ConfigDict:
    options = common.parse(argument, budgets=(2048, 1536, 1024), data=True)
    config = default_config(options.variant)

    config.model.classes = NO_CLASSES
    config.model.drop_path = 0.05  # table
    # Blocks scanned: with parameters cut over a slice the TPU compiler is done with them in four
    # minutes, and with unrolled ones not in twenty. Remat by names, as in fine-tuning.
    config.model.scan = True
    config.model.remat = "names"

    config.data.train = options.data or places.find("pretrain", ("mixture.csv", *places.TRAIN))
    config.data.grids.frames = "4..24..2"  # table
    config.data.grids.resolutions = "168..252..28"  # table
    # Not in the table: Flux-CLIP's thresholds, so that the teacher's 2048 are always there.
    config.data.grids.tokens = (2048, 4096)
    config.data.clips_per_grid = 8  # as in fine-tuning's released script; chosen
    config.data.repeated_aug = 1  # base
    config.data.workers = 16  # processes a host; chosen
    config.data.augment.crop = "multi_scale"  # base
    config.data.augment.flip = 0.5  # base; sources may forbid it

    config.train.objective = "flux_umt"
    config.train.batch_size = 2048  # table
    config.train.epochs = 100  # table
    config.train.warmup_epochs = 20.0  # table
    config.train.budgets = options.budgets  # table: the students' tokens

    config.distill.teacher = REQUIRED
    config.distill.network = "InternVideo2-1B"  # table; of which stage is not told: base has 2
    config.distill.frames = 4  # of stage 2's position table; stage 1's has 8
    config.distill.tokens = 2048  # table
    # The double mask's first half is the paper's selector. On whose embedding is not told: the
    # teacher's means something from the first step on, the student's begins random.
    config.distill.selector_features = "teacher"
    config.distill.mask = "attention"  # base; its rate of 0.8 gives way to the students' counts
    config.distill.student_blocks = (-6, -5, -4, -3, -2, -1)  # base
    config.distill.teacher_blocks = (23, 26, 29, 33, 36, 39)  # base
    config.distill.feature_loss_weight = 1.0  # base, as is the next
    config.distill.clip_loss_weight = 1.0

    # Table: 1e-3. Base scales its 1e-3 by batch / 256; here it is for the whole batch, as written.
    config.optim.learning_rate = 1e-3
    config.optim.min_learning_rate = 1e-5  # base
    config.optim.warmup_learning_rate = 0.0  # base, whose code never passes its own value on
    config.optim.b1, config.optim.b2 = 0.9, 0.98  # table
    config.optim.eps = 1e-6  # base
    config.optim.weight_decay = 0.05  # table
    config.optim.layer_decay = 1.0  # none
    config.optim.clip_norm = 5.0  # base
    return config
