"""What the command line takes besides `--config`."""

from absl import flags

OF_A_RUN = ("train", "evaluate", "search", "cache", "preflight")  # modes that need a recipe
OF_WEIGHTS = ("predict", "export")  # modes that need weights, and take a recipe's settings


def define_flags() -> None:
    """Defines every flag but `--config`, which is `config.define_flag`'s."""
    flags.DEFINE_enum("mode", "train", [*OF_A_RUN, *OF_WEIGHTS], "What to do.")
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, evaluations.")
    flags.DEFINE_boolean("debug", False, "Show where in the program an error arises.")
    cluster = "of several processes, where neither Cloud TPU nor SLURM tells: "
    flags.DEFINE_string("coordinator", "", f"{cluster}ADDRESS:PORT on which the first listens.")
    flags.DEFINE_integer("hosts", 0, f"{cluster}how many they are.")
    flags.DEFINE_integer("host", -1, f"{cluster}which this one is, from 0.")
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
