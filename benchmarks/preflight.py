"""What the TPU compiler says of training on slices of each TPU: docs/sharding.md.

    python -m benchmarks.preflight [--out=preflight] [--only=TEXT]

Rows are networks, slices, clips a chip and forms of the blocks; each is the training step of
`configs/k400.py` (three budgets) or `configs/pretrain.py` (three students and a teacher), with
bfloat16 and AdamW in float32, compiled by libtpu in a process of its own. Finished rows are kept in
OUT, so it can be stopped and started again; the tables have what there is. About 3 to 4 minutes a
row on two idle cores, and 10 where the largest batch is sought.

    --only=TEXT  rows whose name has the text, such as "B v5e" or "16x16"
    --row=NAME   the row of that name only, in this process
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fluxvit_jax.config.loading import load_config
from fluxvit_jax.distributed import atomic
from fluxvit_jax.errors import ArgumentParser, UserError

# To train on: of Kinetics-400, about; of K-Mash, on which InternVideo2's students were distilled.
VIDEOS = {"k400": 240_000, "pretrain": 1_100_000}
RECIPES = {"S": "small", "B": "base", "L": "large"}
GROUP = 8  # clips that share a grid, unless a chip has fewer
TABLE = "preflight.json"


class Row(NamedTuple):
    """A line of the table.

    form: of the blocks, "scan" or "unrolled"; remat: `model.remat`; fsdp: chips that the training
    state is cut over; largest: whether the largest batch is sought as well; recipe: a file of
    `configs`.
    """

    variant: str
    topology: str
    clips: int  # a chip
    form: str = "unrolled"
    remat: str = "names"
    fsdp: int = 1
    largest: bool = False
    recipe: str = "k400"

    @property
    def name(self) -> str:
        cut = f" fsdp {self.fsdp}" if self.fsdp > 1 else ""
        start = "" if self.recipe == "k400" else f"{self.recipe} "
        return f"{start}{self.variant} {self.topology} {self.clips} {self.form} {self.remat}{cut}"

    def overrides(self, chips: int) -> list[str]:
        """Of the recipe, on so many chips."""
        return [
            f"--config.model.scan={self.form == 'scan'}",
            f"--config.model.remat={self.remat}",
            "--config.model.cls=inside",
            f"--config.data.clips_per_grid={min(GROUP, self.clips)}",
            f"--config.train.batch_size={self.clips * chips}",
            "--config.train.init_from=",
            f"--config.parallel.mesh.fsdp={self.fsdp}",
            f"--config.preflight.find_max_batch_size={self.largest}",
        ]


SLICES = ("v6e:4x4", "v5p:2x2x4", "v4:2x2x4")
ROWS = (
    # One host of v5e: the targets, the forms side by side, the largest batches.
    Row("B", "v5e:2x4", 4),
    Row("B", "v5e:2x4", 4, "scan"),
    Row("B", "v5e:2x4", 4, "scan", "full"),
    Row("B", "v5e:2x4", 16, largest=True),
    Row("S", "v5e:2x4", 8),
    Row("S", "v5e:2x4", 8, "scan"),
    Row("S", "v5e:2x4", 32, largest=True),
    # 16 chips of each kind.
    Row("L", "v5e:4x4", 4, "scan", fsdp=16, largest=True),
    *(Row("B", slice_, 8) for slice_ in SLICES),
    *(Row("S", slice_, 16) for slice_ in SLICES),
    *(Row("L", slice_, 4, "scan", fsdp=16) for slice_ in SLICES),
    # A whole pod of v5e.
    Row("B", "v5e:16x16", 4, "scan"),
    Row("B", "v5e:16x16", 4, "scan", fsdp=16),
    Row("B", "v5e:16x16", 16, "scan", fsdp=16),
    # Pre-training from InternVideo2-1B, 2048 clips a step.
    Row("B", "v5e:16x16", 8, "scan", fsdp=16, largest=True, recipe="pretrain"),
    Row("B", "v5p:4x4x8", 16, "scan", fsdp=16, largest=True, recipe="pretrain"),
)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.row:
        row = next((row for row in ROWS if row.name == options.row), None)
        if row is None:
            raise UserError(f"--row={options.row}: none of {', '.join(row.name for row in ROWS)}")
        write(row, compiled(row), options.out)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [row for row in ROWS if options.only in row.name]
    for number, row in enumerate(chosen, 1):
        if not file_of(row, options.out).exists():
            print(f"{number} of {len(chosen)}: {row.name}", file=sys.stderr, flush=True)
            command = (sys.executable, "-m", "benchmarks.preflight", f"--out={options.out}")
            if status := subprocess.run([*command, f"--row={row.name}"]).returncode:
                return status
        print(tabulate(options.out), flush=True)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m benchmarks.preflight", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("preflight"), help="folder of the rows")
    parser.add_argument("--only", default="", help="rows whose name has this text")
    parser.add_argument("--row", default="", help="this row only, in this process")
    return parser.parse_args(arguments)


def compiled(row: Row) -> dict[str, Any]:
    """The pre-flight's report of a row."""
    from fluxvit_jax import preflight  # starts JAX
    from fluxvit_jax.data.clip_cost import ClipCost
    from fluxvit_jax.preflight.compiler import topology

    (where,) = topology.parse(row.topology)
    (devices,) = topology.open_devices([where])
    recipe = f"configs/{row.recipe}.py:{RECIPES[row.variant]}"
    config = load_config(recipe, row.overrides(len(devices)))
    clip = ClipCost(cpu_seconds=0.0, bytes=0.0, measured_on="nothing", videos=VIDEOS[row.recipe])
    return preflight.check(config, where, devices, clip, settings=())


def write(row: Row, report: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = {"row": row._asdict(), "report": report}
    atomic.write(file_of(row, out), json.dumps(content, indent=1) + "\n")


def file_of(row: Row, out: Path) -> Path:
    return out / f"{row.name.replace(' ', '_').replace(':', '_')}.json"


def tabulate(out: Path) -> str:
    """Tables of the rows that are finished, as Markdown; writes them with all numbers as JSON."""
    found = {
        row.name: json.loads(file_of(row, out).read_text())["report"]
        for row in ROWS
        if file_of(row, out).exists()
    }
    atomic.write(out / TABLE, json.dumps(found, indent=1) + "\n")
    tables = []
    for recipe in VIDEOS:
        rows = [row for row in ROWS if row.name in found and row.recipe == recipe]
        cells = [cells_of(row, found[row.name]) for row in rows]
        if cells:
            tables += ["", _line(cells[0]), "|---" * len(cells[0]) + "|"]
            tables += [_line(own.values()) for own in cells]
    return "\n".join(tables)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cells_of(row: Row, report: dict[str, Any]) -> dict[str, str]:
    """What a row says, by the heads of the columns."""
    from fluxvit_jax.preflight.target import TRAIN

    training = report["programs"][TRAIN]
    memory, estimate = training["memory"], training.get("estimate")
    form = f"{row.form}, remat {row.remat}" + (f", FSDP over {row.fsdp}" if row.fsdp > 1 else "")
    used = "does not compile" if memory["used"] is None else f"{memory['used'] / 2**30:.1f}"
    if memory["used"] is not None and not training["fits"]:
        used += " does not fit"
    cells = {
        "model": row.variant,
        "slice": row.topology,
        "clips a chip": str(row.clips),
        "form": form,
        "HBM, GiB": used,
        "est. MFU": f"{estimate['mfu']:.0%}" if estimate else "",
        "compile CPU s": f"{training['compile_cpu_seconds']:.0f}",
        "largest clips a chip (MFU)": largest(report.get("largest_batch")),
        "est. chip hours": f"{report['schedule']['chip_hours']:.0f}" if estimate else "",
    }
    if row.recipe == "pretrain":
        share = f"{estimate['frozen_share']:.0%}" if estimate else ""
        cells["the teacher's share"] = share
    return cells


def largest(report: dict[str, Any] | None) -> str:
    if report is None:
        return ""
    mfu = f" ({report['mfu']:.0%})" if "mfu" in report else ""
    return f"{report['clips_a_device']:g}{mfu}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
