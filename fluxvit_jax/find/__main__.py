"""Finds videos by words, at any token budget, with weights of Flux-CLIP.

    python -m fluxvit_jax.find index VIDEOS --checkpoint=DIR --tokens=512 --out=INDEX.npz
    python -m fluxvit_jax.find "a cat jumps off a table" --index=INDEX.npz --checkpoint=DIR

The first command embeds every video below a folder, or with --window=8s every window of it. It may
be killed at any time: the same command goes on, and also adds videos that have come since. The
second prints the moments that are the most similar to the words, and with --out a page to play
them. Exit status: 0; 2 for bad input; 130 when interrupted.
"""

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import ArgumentParser, UserError

# The rest is imported where it is needed: the workers that read videos import this module as well.

WORKERS = 8  # at most, by default


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    from fluxvit_jax.distributed.compilation_cache import keep_programs
    from fluxvit_jax.main import avoid_libtpu

    avoid_libtpu()
    arguments = list(sys.argv[1:] if argv is None else argv)
    run = _index if arguments[:1] == ["index"] else _search
    try:
        args = _arguments(run is _index, arguments)
        keep_programs(None)
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was found stays", file=sys.stderr)
        return 130
    return 0


def _arguments(indexing: bool, argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=f"python -m fluxvit_jax.find{' index' * indexing}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    if indexing:
        argv = argv[1:]
        add("videos", metavar="VIDEOS", help="folder of videos")
        add("--out", metavar="INDEX.npz", required=True, help="file to write, or to go on with")
        add("--tokens", metavar="N", type=int, required=True, help="token budget")
        add("--window", metavar="SECONDS", default="", help="windows of long videos, such as 8s")
        add("--stride", metavar="SECONDS", default="", help="from window to window (the window)")
        workers = min(WORKERS, os.cpu_count() or 1)
        add("--workers", type=int, default=workers, help="processes that read (%(default)s)")
        add("--batch-size", type=int, default=8, help="clips at once on the device (%(default)s)")
        add(
            "--clip-seconds",
            type=float,
            default=120.0,
            help="a video, or a minute of windows, that takes longer is given up (%(default)g)",
        )
    else:
        add("words", metavar="WORDS", help="what to look for, such as: a cat jumps off a table")
        add("--index", metavar="INDEX.npz", required=True, help="of the command index")
        add("--top", type=int, default=10, help="moments to find (%(default)s)")
        add("--out", metavar="PAGE.html", default="", help="page to write")
        add("--videos", metavar="DIR", default="", help="where the videos are now, for the page")
    add("--checkpoint", metavar="DIR", required=True, help="workdir or folder of Flux-CLIP")
    add(
        "--text-encoder",
        metavar="FILE",
        default="",
        help="where the frozen text encoder of a run is now, if it was moved",
    )
    return parser.parse_args(argv)


def _index(args: argparse.Namespace) -> None:
    from fluxvit_jax.deploy.windows import seconds_of
    from fluxvit_jax.find import indexing, weights
    from fluxvit_jax.find.index_file import Settings

    for flag, least in (("tokens", 2), ("workers", 0), ("batch_size", 1), ("clip_seconds", 0)):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')}: must be at least {least}")
    if args.stride and not args.window:
        raise UserError(f"--stride={args.stride}: add --window, the length of a window")
    window = seconds_of("window", args.window) if args.window else 0.0
    stride = seconds_of("stride", args.stride) if args.stride else window
    out = _place(args.out, ".npz")
    model = weights.load(args.checkpoint, args.text_encoder)
    ((tokens, frames, resolution),) = model.config.asked((args.tokens,))
    settings = Settings(weights.checksum(model), tokens, frames, resolution, window, stride)
    options = indexing.Options(args.batch_size, args.workers, args.clip_seconds)
    found = indexing.make(model, args.videos, out, settings, options)
    failed = f"; {len(found.failures)} could not be read, listed in it" if found.failures else ""
    print(
        f"{len(found.moments)} videos, {len(found)} moments{failed}; written to {out}\n"
        f'next: python -m fluxvit_jax.find "WORDS" --index={shlex.quote(str(out))} '
        f"--checkpoint={shlex.quote(args.checkpoint)}"
    )


def _search(args: argparse.Namespace) -> None:
    from fluxvit_jax.find import index_file, page, weights
    from fluxvit_jax.find.search import search

    if args.top < 1:
        raise UserError(f"--top={args.top}: must be at least 1")
    if not args.words.strip():
        raise UserError(f"{args.words!r}: there are no words to look for")
    out = _place(args.out, ".html") if args.out else None
    index = index_file.load(Path(args.index))
    if not len(index):
        raise UserError(f"{args.index}: holds no moment yet; the command that made it goes on")
    model = weights.load(args.checkpoint, args.text_encoder)
    if weights.checksum(model) != index.settings.model:
        raise UserError(
            f"{args.index}: is an index of another model than --checkpoint={args.checkpoint}; "
            "name that one, or make an index with this one"
        )
    with warnings.catch_warnings(record=True) as cautions:
        warnings.simplefilter("always", UserWarning)
        found = search(model, index, args.words, args.top)
    for caution in cautions:
        print(f"warning: {caution.message}", file=sys.stderr)
    for one in found:
        place = storage.display_name(one.file)
        print(f"{one.cosine:7.3f}  {page.seconds(one.moment):<20}  {place}")
    if out:
        try:
            page.write(out, args.words, index, found, args.videos or index.folder)
        except OSError as error:
            raise UserError(f"--out={out}: cannot be written: {error.strerror}") from error
        print(f"written to {out}")


def _place(text: str, suffix: str) -> Path:
    """The path of a file to write, in a folder that is made. Raises UserError."""
    path = Path(text)
    if storage.is_remote(text) or path.suffix != suffix or path.is_dir():
        raise UserError(f"--out={text}: must be a file of this machine that ends in {suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={text}: cannot be written: {error.strerror}") from error
    return path


if __name__ == "__main__":
    sys.exit(main())
