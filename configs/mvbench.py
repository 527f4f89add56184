r"""MVBench by a video chat (table 10 of the paper). NOT RUN HERE.

    python -m fluxvit_jax.main --mode=evaluate --config=configs/mvbench.py:base \
        --workdir=runs/chat_base --config.data.validation=MVBench/json \
        --config.data.root=MVBench/video --config.eval.settings="((1024,4,224),(512,4,224))"

Argument: small, base (default) or large, as of configs/chat.py. `data.validation` is the folder of
the task files, TASK.json, or one of them; `data.root` has the videos, in the folders of the public
data set. Frames are the middles of equal segments, prompts those of VideoChat2 or, with
--config.eval.prompt=lmms_eval, of VideoChat-Flash; which the paper used is not told. Reports have
both official rules and a strict one, which counts no empty answer as right, with intervals.
"""

from ml_collections import ConfigDict

from fluxvit_jax.recipes import chat


def get_config(argument: str = "base") -> ConfigDict:
    config = chat.get_config(argument)
    config.eval.task = "mvbench"
    return config
