"""The program: `python -m fluxvit_jax.main --config=RECIPE [--workdir=DIR] [--mode=MODE]`.

`fluxvit` is the same. A run that exists needs its workdir only: `--mode=evaluate --workdir=DIR`.
`--config.a.b=VALUE` sets a field of the config. `--mode=MODE --help` tells what concerns a mode,
`--config=RECIPE --help` the values of a recipe. A recipe is Python code that is executed: use only
recipes that you trust. Exit status: 0; 1 for a pre-flight that does not fit; 2 for bad input, with
the reason on stderr; 75 when the program hung or another host died, and the same command goes on;
130 or 143 when Ctrl-C or SIGTERM ended it.
"""

import glob
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fluxvit_jax.distributed.interrupts import ended_by_signals
from fluxvit_jax.errors import UserError

if TYPE_CHECKING:
    from absl import flags

# `main` imports the rest, because the workers that read data import this module as well.

# Device files of TPUs, NVIDIA's GPUs (the second under WSL) and AMD's.
ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd")


def main(argv: Sequence[str] = sys.argv) -> int:
    """Runs the program with a command line; returns its exit status."""
    with ended_by_signals():  # training replaces it
        return _main(argv)


def _main(argv: Sequence[str]) -> int:
    avoid_libtpu()

    from absl import app, flags

    from fluxvit_jax import command_line
    from fluxvit_jax.config.loading import define_flag, parse_flags

    command_line.define_flags()
    app.define_help_flags()
    try:
        given, argv = argv, command_line.resolved(argv)
        define_flag(argv=argv)
        if any(argument in command_line.HELP for argument in argv):
            _show(f"{__doc__}\n{command_line.help_text(argv)}")
            return 0
        parse_flags(argv)
        if flags.FLAGS.mode in command_line.OF_WEIGHTS:
            return _run_weights(flags.FLAGS)
        return _run(flags.FLAGS, given)
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: "flags.FlagValues", argv: Sequence[str]) -> int:
    from fluxvit_jax.command_line import OF_A_RUN

    config = options.config
    if config is None:
        raise UserError(
            "no recipe given: add, for example, --config=configs/demo.py, or the --workdir of a run"
        )
    if options.print_config:
        _show(json.dumps(config.to_dict(), indent=1))
        return 0
    mode = importlib.import_module(OF_A_RUN[options.mode])
    if options.mode == "preflight":
        return mode.run(config, options.workdir or ".")
    if options.workdir == "":
        raise UserError("no folder for the run given: add, for example, --workdir=runs/first")
    from fluxvit_jax.config.loading import flag_argument
    from fluxvit_jax.data import places
    from fluxvit_jax.distributed.compilation_cache import keep_programs
    from fluxvit_jax.distributed.console import say
    from fluxvit_jax.distributed.hosts import check_same, joined, raise_on_all_hosts
    from fluxvit_jax.distributed.kernel_check import check_kernels
    from fluxvit_jax.distributed.storage import write_errors
    from fluxvit_jax.objectives.base import objective_class
    from fluxvit_jax.training.completeness import check_complete

    recipe = flag_argument(argv, "config") or ""
    workdir = options.workdir or places.workdir_of(recipe)
    hosts = joined(options.coordinator, options.hosts, options.host)
    with hosts, write_errors(workdir):
        keep_programs(options.compile_cache)
        check_same({"mode": options.mode, "workdir": workdir, "config": config.to_dict()})
        if options.workdir is None and options.mode != "cache":
            say(f"workdir: {workdir}; --workdir=DIR names another")
        if options.mode == "train":
            with raise_on_all_hosts():
                check_complete(config, recipe, workdir, argv)
        check_kernels(config, objective_class(config).head_sizes(config))
        if options.mode == "train":
            return mode.train(config, workdir, options.accept_data_change, options.fresh)
        return mode.run(config, workdir)


def _run_weights(options: "flags.FlagValues") -> int:
    weights = options.checkpoint or options.workdir
    if not weights:
        raise UserError("no weights given: add --workdir=DIR or --checkpoint=FILE_OR_FOLDER")
    if not all(text.isdecimal() and int(text) > 0 for text in options.tokens):
        raise UserError(f"--tokens={','.join(options.tokens)}: not numbers, such as 1024,512")
    from fluxvit_jax.deploy import export, predict
    from fluxvit_jax.distributed import storage
    from fluxvit_jax.distributed.compilation_cache import keep_programs

    if storage.is_remote(options.out or ""):
        raise UserError(f"--out={options.out}: must be a folder of this machine")
    here = "" if storage.is_remote(options.workdir or "") else options.workdir or ""
    out = options.out or os.path.join(here, options.mode)
    tokens = tuple(map(int, options.tokens))
    keep_programs(options.compile_cache)
    if options.mode == "export":
        with storage.write_errors(out):
            return export.run(
                weights,
                out,
                tokens,
                options.network,
                options.dtype,
                options.config,
                options.workdir,
            )
    if options.mode == "chat":
        with storage.write_errors(out):
            return _run_chat(options, weights, out, tokens)
    settings = predict.Options(
        weights=weights,
        out=out,
        tokens=tokens,
        network=options.network,
        dtype=options.dtype,
        video=options.video,
        top=options.top,
        features=options.features,
        class_names=options.class_names,
        classes=options.classes,
        milliseconds=options.milliseconds,
        average_milliseconds=options.average_milliseconds,
        average_gflops=options.average_gflops,
        workdir=options.workdir,
        window=options.window,
        stride=options.stride,
        calibrated=options.calibrated,
    )
    with storage.write_errors(out):
        return predict.run(settings, options.config)


def _run_chat(options: "flags.FlagValues", weights: str, out: str, tokens: Sequence[int]) -> int:
    from fluxvit_jax.deploy import chat_mode

    if len(tokens) > 1:
        raise UserError(f"--tokens={','.join(options.tokens)}: a chat has one budget; name one")
    return chat_mode.run(
        chat_mode.Options(
            checkpoint=weights,
            out=out,
            video=options.video,
            llm=options.llm,
            tokens=tokens[0] if tokens else None,
            question=options.question,
            dtype=options.dtype,
        ),
        options.config,
    )


def _show(text: str) -> None:
    """Prints a long text; ends without a word if what reads it, such as a pager, has enough."""
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    print(text, flush=True)
    # A process that goes on, such as one that calls `main`, must not die of a closed connection.
    signal.signal(signal.SIGPIPE, before)


def avoid_libtpu() -> None:
    """Leaves CPUs to JAX where libtpu is installed, as for pre-flights, but no accelerator is.

    It would look for a TPU for seconds, and print errors that are none.
    """
    if importlib.util.find_spec("libtpu") and not any(map(glob.glob, ACCELERATORS)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


if __name__ == "__main__":
    sys.exit(main())
