"""Methods and selectors compared over several seeds, on the demo's clips or on your own.

    python -m benchmarks.method_study --out=demo/study [--clips=demo/clips] [--seeds=3]
    python -m benchmarks.method_study --out=runs/study --train=train.csv --validation=val.csv \
        --root=VIDEOS --classes=classes.txt [--init_from=demo/multi]

Rows: the ordinary way (fixed grid, every token), Flux-Single, Flux-Multi without and with alignment
(all three with the group-dynamic selector), the other selectors, and flexible grids without any.
Each row is trained by the demo's recipe with each seed and asked on the recipe's grids, which other
clips have chosen; those of the fixed grid alone were chosen on the demo's validation clips, in its
favor. Written are accuracies with intervals over clips (95 %), and what the paper claims, with
paired differences and whether the claim holds.
Finished runs are kept, so the study can be stopped and started again. About 4 minutes a run on two
idle cores, half an hour a seed. Large videos make it longer: `python -m fluxvit_jax.data.shrink`.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks import study
from fluxvit_jax.recipes import demo


class Row(NamedTuple):
    """recipe: what follows `configs/demo.py:`; flags: of the config, after it."""

    name: str
    recipe: str
    flags: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        name = "-".join([self.recipe, *self.flags])
        return name.replace("--config.model.selector.", "").replace(",", "-").replace("=", "-")


class Claim(NamedTuple):
    """The paper says that a row is better than another one, by so many points."""

    table: str
    better: str
    worse: str
    points: str


FIXED, SINGLE, MULTI = "Fixed grid, no selection", "Flux-Single", "Flux-Multi"
NO_ALIGNMENT, TRANSFER = "Flux-Multi, no alignment", "Flux-Multi, from given weights"
TWO_GROUPS, FOUR_GROUPS = "Flux-Multi, two groups", "Flux-Multi, four groups"
DYNAMIC = {norm: f"Flux-Multi, selector dynamic {norm.upper()}" for norm in ("l1", "l2")}
TUBE, RANDOM = "Flux-Multi, selector tube", "Flux-Multi, selector random"
NO_SELECTOR = "Flux-Single, selector none"

ROWS = (
    Row(FIXED, "fixed"),
    Row(SINGLE, "single"),
    Row(MULTI, "multi"),  # groups by the rule: four where frames divide by four, else two
    Row(NO_ALIGNMENT, "multi,align=0"),
    Row(NO_SELECTOR, "single,selector=none"),
    Row(RANDOM, "multi,selector=random"),
    Row(TUBE, "multi,selector=tube"),
    Row(DYNAMIC["l1"], "multi,selector=dynamic_l1"),
    Row(DYNAMIC["l2"], "multi,selector=dynamic_l2"),
    Row(TWO_GROUPS, "multi", ("--config.model.selector.groups=2",)),
    Row(FOUR_GROUPS, "multi", ("--config.model.selector.groups=4",)),
)
# Points on K400: from many tokens to few; table 2 is of one budget.
CLAIMS = (
    Claim("1", SINGLE, FIXED, "0.9 to 3.1"),
    Claim("1", MULTI, FIXED, "1.0 to 6.7"),
    Claim("1", MULTI, SINGLE, "0.1 to 3.6"),
    Claim("2", SINGLE, NO_SELECTOR, "0.8"),
    Claim("2", FOUR_GROUPS, RANDOM, "0.6"),
    Claim("2", FOUR_GROUPS, TUBE, "0.4"),
    Claim("2", FOUR_GROUPS, DYNAMIC["l1"], "0.5"),
    Claim("2", FOUR_GROUPS, DYNAMIC["l2"], "0.4"),
    Claim("2", FOUR_GROUPS, TWO_GROUPS, "0.4"),
    Claim("5", MULTI, NO_ALIGNMENT, "0.5 to 3.3"),
)

Found = Mapping[str, list[study.Right]]  # row -> of each seed


def main() -> int:
    parser = study.parser_of("method_study", __doc__, "demo/study", "of path,label to train on")
    parser.add_argument("--init_from", metavar="WORKDIR", help="adds a row that starts from these")
    options = parser.parse_args()
    clips = study.clips_of(options)
    rows = [*ROWS]
    if options.init_from:
        rows.append(Row(TRANSFER, "multi", (f"--config.train.init_from={options.init_from}",)))
    found: dict[str, list[study.Right]] = {row.name: [] for row in rows}
    for seed in range(options.seeds):
        for row in rows:
            found[row.name].append(measured(row, seed, clips, options.out))
            write(found, options.out)
    for name in ("study.md", "claims.md"):
        print((options.out / name).read_text())
    return 0


def measured(row: Row, seed: int, clips: study.Clips, out: Path) -> study.Right:
    """Which clips a row classifies correctly after training with a seed."""
    folder = "transfer" if row.name == TRANSFER else row.folder
    workdir = out / f"{folder}-seed-{seed}"
    config = demo.get_config(row.recipe)
    study.train(
        workdir,
        f"configs/demo.py:{row.recipe},seed={seed}",
        *clips.flags(),
        *clips.schedule(config),
        *row.flags,
    )
    return study.right_clips(workdir, config.eval.settings)


def write(found: Found, out: Path) -> None:
    """Writes study.md, of what is trained so far, and claims.md, of seeds that both rows have."""
    heads = ["%", *(f"{budget} tokens" for budget in demo.BUDGETS), "seeds"]
    study.write_table(
        out / "study.md",
        heads,
        [
            [
                name,
                *(study.mean_text([own[budget] for own in seeds]) for budget in demo.BUDGETS),
                str(len(seeds)),
            ]
            for name, seeds in found.items()
            if seeds
        ],
    )
    heads = ["Table", "Claim", "By, in the paper", *heads[1:]]
    study.write_table(
        out / "claims.md",
        heads,
        [row for claim in CLAIMS if (row := claim_row(claim, found))],
    )


def claim_row(claim: Claim, found: Found) -> list[str]:
    """A claim with its differences; nothing while one of its rows is missing."""
    pairs = list(zip(found[claim.better], found[claim.worse], strict=False))
    if not pairs:
        return []
    differences = [
        study.difference_text([a[budget] for a, _ in pairs], [b[budget] for _, b in pairs])
        for budget in demo.BUDGETS
    ]
    return [
        claim.table,
        f"{claim.better} > {claim.worse}",
        claim.points,
        *differences,
        str(len(pairs)),
    ]


if __name__ == "__main__":
    sys.exit(main())
