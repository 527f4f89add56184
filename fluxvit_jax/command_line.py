"""Command-line flags besides `--config`, and the text of `--help`."""

import re
from collections.abc import Sequence

from absl import flags

from fluxvit_jax.config import loading, reference
from fluxvit_jax.config.fields import default_config
from fluxvit_jax.errors import UserError

# Modes that need a recipe, and the modules that run them.
OF_A_RUN = {
    "train": "fluxvit_jax.training.train",
    "evaluate": "fluxvit_jax.evaluation.tasks",
    "search": "fluxvit_jax.token_optimization.search",
    "cache": "fluxvit_jax.training.cache_targets",
    "preflight": "fluxvit_jax.preflight",
}
OF_WEIGHTS = ("predict", "export", "chat")  # modes that need weights, and take a recipe's settings
MODES = (*OF_A_RUN, *OF_WEIGHTS)

# What `--help` says of a mode, and the sections of the config that concern it.
ABOUT = {
    "train": "train a network, or go on with the run in the workdir",
    "evaluate": "accuracy or retrieval at every budget of eval.settings, into WORKDIR/evaluation",
    "search": "the best grid for each budget (Token Optimization), into WORKDIR/search",
    "cache": "the teacher's targets for every clip of a plan, into distill.cache",
    "preflight": "whether the run would compile and fit, on devices that need not be there",
    "predict": "classes of one video, as a page, or of a folder of videos, as a CSV",
    "export": "one folder for a server, which needs JAX only",
    "chat": "questions about a video, answered by a language model",
}
_NETWORK = ("seed", "model", "data", "parallel")
SECTIONS = {
    "train": (*_NETWORK, "train", "distill", "clip", "chat", "optim", "eval", "checkpoint", "log"),
    "evaluate": (*_NETWORK, "clip", "chat", "eval"),
    "search": (*_NETWORK, "eval", "search"),
    "cache": (*_NETWORK, "train", "distill"),
    "preflight": (*_NETWORK, "train", "distill", "clip", "chat", "optim", "eval", "preflight"),
    "predict": ("eval",),
    "export": ("eval",),
    "chat": ("eval", "parallel"),
}
EXAMPLES = {
    "train": (
        "--config=configs/k400.py:base",
        "--config=configs/custom.py:small --workdir=runs/mine --config.data.train=train.csv "
        "--config.model.classes=12 --config.train.init_from=runs/k400",
        "--workdir=runs/mine --config.train.epochs=30",
    ),
    "evaluate": (
        "--mode=evaluate --workdir=runs/mine",
        "--mode=evaluate --workdir=runs/clip --config.data.validation=pairs.json",
    ),
    "search": ("--mode=search --workdir=runs/mine --config.search.split=chosen_on.csv",),
    "cache": (
        "--mode=cache --config=configs/pretrain.py:base,data=mixture.csv "
        "--config.data.sampling_period_epochs=1 --config.distill.teacher=teacher "
        "--config.distill.cache=targets",
    ),
    "preflight": (
        "--mode=preflight --config=configs/k400.py:base --config.preflight.topology=v5e:4x4",
    ),
    "predict": (
        "--mode=predict --workdir=runs/mine --video=video.mp4 --tokens=1024,512",
        '--mode=predict --workdir=runs/clip --video=video.mp4 --classes="a cat,a dog"',
    ),
    "export": ("--mode=export --workdir=runs/mine --out=exported",),
    "chat": (
        "--mode=chat --checkpoint=runs/chat --llm=Qwen2.5-7B-Instruct --video=video.mp4 "
        "--tokens=512",
        '--mode=chat --checkpoint=runs/chat --video=videos --question="What happens?"',
    ),
}
HELP = ("-h", "-?", "-help", "--help", "--helpshort")


def define_flags() -> None:
    """Defines every flag but `--config`, which is `loading.define_flag`'s.

    Help that begins with modes, as in "predict, export: ", says that the flag concerns only these.
    """
    flags.DEFINE_enum("mode", "train", MODES, "What to do.")
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run: checkpoints, metrics, evaluations; default with a recipe: runs/RECIPE. "
        "Without a recipe: that of a run that exists, which brings its own config.",
    )
    flags.DEFINE_boolean(
        "print_config",
        False,
        f"{', '.join(OF_A_RUN)}: print the config as config.json has it, and end.",
    )
    flags.DEFINE_boolean("debug", False, "Show where in the program an error arises.")
    flags.DEFINE_boolean(
        "accept_data_change", False, "train: go on with a run although its data are not the same."
    )
    flags.DEFINE_boolean(
        "fresh", False, "train: start anew; a run in the workdir is moved into WORKDIR/earlier-1."
    )
    flags.DEFINE_string(
        "compile_cache",
        None,
        "Folder of compiled programs, which later commands load; empty: none. Default: the "
        "environment variable JAX_COMPILATION_CACHE_DIR, or ~/.cache/fluxvit_jax.",
    )
    flags.DEFINE_string(
        "coordinator",
        "",
        "ADDRESS:PORT that process 0 listens on; needed only outside Cloud TPU and SLURM.",
    )
    cluster = "of several processes, where neither Cloud TPU nor SLURM tells: "
    flags.DEFINE_integer("hosts", 0, f"{cluster}number of processes.")
    flags.DEFINE_integer("host", -1, f"{cluster}number of this one, from 0.")
    mode = "predict, export, chat: "
    flags.DEFINE_string(
        "checkpoint",
        None,
        f"{mode}weights of any form, hf://OWNER/NAME or builtin://ti; default: the workdir.",
    )
    flags.DEFINE_string(
        "network", "", "predict, export: config.json with what the weights do not determine."
    )
    flags.DEFINE_list("tokens", [], f"{mode}budgets, such as 1024,512; default: the checkpoint's.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], f"{mode}of the computation.")
    flags.DEFINE_string("out", None, f"{mode}folder to write; default: WORKDIR/MODE, or MODE.")
    flags.DEFINE_string("video", "", "predict, chat: a video file, or a folder of them.")
    flags.DEFINE_string(
        "question", "", "chat: to be answered; default: questions are read from the terminal."
    )
    flags.DEFINE_string(
        "llm", "", "chat: folder of the language model; default: where the run had it."
    )
    flags.DEFINE_string("window", "", "predict: also in windows of so long, such as 4s.")
    flags.DEFINE_string("stride", "", "predict: from window to window; default: the window.")
    flags.DEFINE_integer("top", 5, "predict: number of classes to name.")
    flags.DEFINE_enum(
        "features",
        None,
        ["pooled", "tokens", "llm"],
        "predict: write .npz files of these; llm: what a language model reads, by video chat.",
    )
    flags.DEFINE_string(
        "class_names", "", "predict: class names, a file of one a line, or k400 etc."
    )
    flags.DEFINE_list(
        "classes", [], "predict: names of any classes, for Flux-CLIP: opening a door,closing it."
    )
    flags.DEFINE_boolean(
        "calibrated", False, "predict: probabilities at the temperatures of the newest evaluation."
    )
    flags.DEFINE_float("milliseconds", None, "predict: the best setting of a search in this time.")
    average = "predict: the best cascade of a search whose average video costs no more"
    flags.DEFINE_float("average_milliseconds", None, f"{average}; --milliseconds: at worst.")
    flags.DEFINE_float("average_gflops", None, f"{average}.")


def resolved(argv: Sequence[str]) -> list[str]:
    """The command line with the file of the recipe.

    A recipe of ours may be given by its name, and flags may be spelled with hyphens. Modes of a run
    take the config of the workdir's own run where no recipe is given.

    Raises UserError: fields of a config are given, and there is no such run; or two recipes.
    """
    argv = loading.located([_with_underscores(argument) for argument in argv])
    workdir = loading.flag_argument(argv, "workdir")
    mode = loading.flag_argument(argv, "mode") or "train"
    if workdir and mode in OF_A_RUN and loading.flag_argument(argv, "config") is None:
        from fluxvit_jax.checkpoints import stored_recipe

        if stored_recipe.is_run(workdir):
            return [argv[0], f"--config={stored_recipe.__file__}:{workdir}", *argv[1:]]
        if fields := loading.override_names(argv):
            raise UserError(
                f"--workdir={workdir}: there is no run whose config.{fields[0]} could be set; name "
                "another folder, or add a recipe with --config"
            )
    return argv


def _with_underscores(argument: str) -> str:
    """An argument that spells a flag of ours with hyphens, such as --class-names, as absl does."""
    name, equals, value = argument.partition("=")
    ours = name.startswith("--") and name[2:].replace("-", "_") in flags.FLAGS
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if ours else argument


def help_text(argv: Sequence[str]) -> str:
    """The text of `--help`: of one mode, and with the values of a recipe, if argv names them.

    absl's own `--helpfull` lists the flags of all libraries. Raises UserError: no such recipe.
    """
    given = loading.flag_argument(argv, "mode")
    modes = [given] if given in MODES else list(MODES)
    recipe = loading.flag_argument(argv, "config")
    values = loading.read_recipe(recipe) if recipe else default_config()
    sections = {section for mode in modes for section in SECTIONS[mode]}
    parts = {
        "Modes (--mode=MODE)": "\n".join(f"  {mode:<10} {ABOUT[mode]}" for mode in modes),
        "Flags": "\n".join(
            reference.paragraph(f"--{flag.name}", f"{_words(flag)}{_default(flag)}")
            for flag in [flags.FLAGS["config"], *flags.FLAGS.get_flags_for_module(__name__)]
            if not set(modes).isdisjoint(_modes_of(flag))
        ),
        f"Fields, with the values {f'of {recipe}' if recipe else 'where no recipe sets them'}": (
            reference.help_text(values, sections) or "  none"
        ),
        "Recipes": f"  {', '.join(loading.shipped())}\n  Each says its argument at its top.",
        "Examples": "\n".join(
            f"  python -m fluxvit_jax.main {line}" for mode in modes for line in EXAMPLES[mode]
        ),
    }
    return "\n\n".join(f"{title}:\n{text}" for title, text in parts.items())


def _modes_of(flag: flags.Flag) -> Sequence[str]:
    """The modes that a flag concerns: those before the colon of its help, or all."""
    words = _words(flag).partition(": ")[0].split(", ")
    return words if set(words) <= set(MODES) else MODES


def _words(flag: flags.Flag) -> str:
    """The help of a flag, with its choices at the end, which absl puts in front."""
    choices, words = re.fullmatch(r"(?:<(.*)>: )?(.*)", str(flag.help)).groups()  # type: ignore[union-attr]  # matches all
    return f"{words} One of {choices.replace('|', ', ')}." if choices else words


def _default(flag: flags.Flag) -> str:
    """The default of a flag in words, where it says something."""
    return "" if flag.default in (None, False, "", [], 0, -1) else f" Default: {flag.default}."
