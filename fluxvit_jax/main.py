"""The program: `python -m fluxvit_jax.main --config=configs/k400.py --workdir=DIR [--mode=MODE]`.

Modes: train (goes on by itself with what the workdir holds), evaluate, search (the best grid for
each budget), predict (one video or a folder), export (one folder for a server), preflight (would
the run compile and fit on devices that need not be there), cache (what a teacher makes of a plan).
`--config.a.b=VALUE` sets a field of the config. Exit status: 0; 1 for a pre-flight that does not
fit; 2 for bad input, said in one line; 130 or 143 when Ctrl-C or SIGTERM ended it.
"""

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from fluxvit_jax.errors import UserError

# All else is imported by `main`: the workers that read data import this module as well.


def main(argv: Sequence[str] = sys.argv) -> int:
    """Runs the program with a command line; returns its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit)

    from absl import app, flags

    from fluxvit_jax import command_line, config

    config.define_flag(argv=list(argv))
    command_line.define_flags()
    app.define_help_flags()
    try:
        config.parse_flags(argv)
        run = _run_weights if flags.FLAGS.mode in command_line.OF_WEIGHTS else _run
        return run(flags.FLAGS)
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options) -> int:
    if options.config is None:
        raise UserError("no recipe given: add, for example, --config=configs/demo.py")
    mode = importlib.import_module(f"fluxvit_jax.{options.mode}")
    if options.mode == "preflight":
        return mode.run(options.config, options.workdir or ".")
    if not options.workdir and options.mode != "cache":
        raise UserError("no folder for the run given: add, for example, --workdir=runs/first")
    from fluxvit_jax import distributed

    with distributed.joined(options.coordinator, options.hosts, options.host):
        own = {"mode": options.mode, "workdir": options.workdir}
        distributed.check_same(own | {"config": options.config.to_dict()})
        run = mode.train if options.mode == "train" else mode.run
        return run(options.config, options.workdir)


def _run_weights(options) -> int:
    weights = options.checkpoint or options.workdir
    if not weights:
        raise UserError("no weights given: add --workdir=DIR or --checkpoint=FILE_OR_FOLDER")
    if not all(text.isdecimal() and int(text) > 0 for text in options.tokens):
        raise UserError(f"--tokens={','.join(options.tokens)}: not numbers, such as 1024,512")
    from fluxvit_jax import export, predict, storage

    if storage.is_remote(options.out or ""):
        raise UserError(f"--out={options.out}: must be a folder of this machine")
    here = "" if storage.is_remote(options.workdir or "") else options.workdir or ""
    out = options.out or os.path.join(here, options.mode)
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
