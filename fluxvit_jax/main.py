"""The program: `python -m fluxvit_jax.main --config=configs/k400.py --workdir=DIR [--mode=MODE]`.

Modes: train (goes on by itself with what the workdir holds), evaluate. `--config.a.b=VALUE` sets a
field of the config. Exit status: 0; 2 for bad input, said in one line; 130 or 143 when Ctrl-C or
SIGTERM ended it.
"""

import os
import signal
import sys
from collections.abc import Sequence

# All else is imported by `main`: the workers that read data import this module as well.


def main(argv: Sequence[str] = sys.argv) -> int:
    """Runs the program with a command line; returns its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit)

    from absl import app, flags

    from fluxvit_jax import config
    from fluxvit_jax.errors import UserError

    options = flags.FLAGS
    config.define_flag(argv=list(argv))
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, evaluations.")
    flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "What to do.")
    flags.DEFINE_boolean("debug", False, "Show where in the program an error arises.")
    app.define_help_flags()

    try:
        config.parse_flags(argv)
        if not options.workdir:
            raise UserError("no folder for the run given: add, for example, --workdir=runs/first")
        return _run(options.mode, options.config, options.workdir)
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(mode: str, config, workdir: str) -> int:
    if mode == "evaluate":
        from fluxvit_jax import evaluate

        return evaluate.run(config, workdir)
    from fluxvit_jax import train

    return train.train(config, workdir)


def _exit(number: int, _) -> None:
    """Ends the program where nothing needs saving; training has a handler of its own.

    At once: an exception might be caught and forgotten by what is running.
    """
    os.write(sys.stderr.fileno(), b"interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
