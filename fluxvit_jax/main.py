"""The program: `python -m fluxvit_jax.main --config=configs/k400.py --workdir=DIR [--mode=MODE]`.

Modes: train (goes on by itself with what the workdir holds), evaluate, search (the best grid for
each budget), predict (one video or a folder), export (one folder for a server).
`--config.a.b=VALUE` sets a field of the config. Exit status: 0; 2 for bad input, said in one line;
130 or 143 when Ctrl-C or SIGTERM ended it.
"""

import os
import signal
import sys
from collections.abc import Sequence

from fluxvit_jax.errors import UserError

# All else is imported by `main`: the workers that read data import this module as well.

OF_A_RUN = ("train", "evaluate", "search")  # modes that need a recipe and a workdir
OF_WEIGHTS = ("predict", "export")  # modes that need weights, and take a recipe's settings


def main(argv: Sequence[str] = sys.argv) -> int:
    """Runs the program with a command line; returns its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit)

    from absl import app, flags

    from fluxvit_jax import config

    config.define_flag(argv=list(argv))
    _define_flags(flags)
    app.define_help_flags()
    try:
        config.parse_flags(argv)
        run = _run_weights if flags.FLAGS.mode in OF_WEIGHTS else _run
        return run(flags.FLAGS)
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _define_flags(flags) -> None:
    flags.DEFINE_enum("mode", "train", [*OF_A_RUN, *OF_WEIGHTS], "What to do.")
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, evaluations.")
    flags.DEFINE_boolean("debug", False, "Show where in the program an error arises.")
    own = "predict, export: "
    flags.DEFINE_string("checkpoint", None, f"{own}weights of any form; default: the workdir.")
    flags.DEFINE_string("network", "", f"{own}config.json for what the weights do not tell.")
    flags.DEFINE_list("tokens", [], f"{own}budgets, such as 1024,512; default: the checkpoint's.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], f"{own}of the computation.")
    flags.DEFINE_string("out", None, f"{own}folder to write; default: WORKDIR/MODE, or MODE.")
    flags.DEFINE_string("video", "", "predict: a video file, or a folder of them.")
    flags.DEFINE_integer("top", 5, "predict: so many classes are named.")
    flags.DEFINE_enum("features", None, ["pooled", "tokens"], "predict: write .npz files of these.")
    flags.DEFINE_string("class_names", "", "predict: file of the classes' names, one a line.")
    flags.DEFINE_float("milliseconds", None, "predict: as accurate as a search found in this time.")


def _run(options) -> int:
    if options.config is None:
        raise UserError("no recipe given: add, for example, --config=configs/demo.py")
    if not options.workdir:
        raise UserError("no folder for the run given: add, for example, --workdir=runs/first")
    if options.mode == "evaluate":
        from fluxvit_jax.evaluate import run
    elif options.mode == "search":
        from fluxvit_jax.search import run
    else:
        from fluxvit_jax.train import train as run
    return run(options.config, options.workdir)


def _run_weights(options) -> int:
    weights = options.checkpoint or options.workdir
    if not weights:
        raise UserError("no weights given: add --workdir=DIR or --checkpoint=FILE_OR_FOLDER")
    if not all(text.isdecimal() and int(text) > 0 for text in options.tokens):
        raise UserError(f"--tokens={','.join(options.tokens)}: not numbers, such as 1024,512")
    from fluxvit_jax import export, predict

    out = options.out or os.path.join(options.workdir or "", options.mode)
    shared = (weights, out, tuple(map(int, options.tokens)), options.network, options.dtype)
    if options.mode == "export":
        return export.run(*shared, options.config, options.workdir)
    own = (options[name].value for name in predict.Options._fields[len(shared) :])
    return predict.run(predict.Options(*shared, *own), options.config)


def _exit(number: int, _) -> None:
    """Ends the program at once, where an exception might be caught; training has its own way."""
    os.write(sys.stderr.fileno(), b"interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
