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
Finished runs are kept, so the study can be stopped and started again. --results=FILE.jsonl keeps
what they found of each clip in a file, and the study goes on from it elsewhere; --only=fixed,single
trains these rows alone. About 4 minutes a run on two idle cores, half an hour a seed. Large videos
make it longer: `python -m fluxvit_jax.data.shrink`.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks import study
from fluxvit_jax.config.loading import load_config
from fluxvit_jax.recipes import demo


class Row(NamedTuple):
    """recipe: what follows `configs/demo.py:`; flags: of the config, after it."""

    name: str
    recipe: str
    flags: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        if self.name == TRANSFER:
            return "transfer"
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

Found = Mapping[str, Mapping[int, study.Right]]  # row -> seed


def main() -> int:
    parser = study.parser_of("method_study", __doc__, "demo/study", "of path,label to train on")
    parser.add_argument("--init_from", metavar="WORKDIR", help="adds a row that starts from these")
    parser.add_argument("--results", type=Path, help="file of what runs found, read and added to")
    parser.add_argument("--only", default="", help="rows to train, such as fixed,single")
    options = parser.parse_args()
    clips = study.clips_of(options)
    results = study.Results(options.results, clips)
    rows = [*ROWS]
    if options.init_from:
        rows.append(Row(TRANSFER, "multi", (f"--config.train.init_from={options.init_from}",)))
    trained = options.only.split(",") if options.only else [row.folder for row in rows]
    if unknown := set(trained) - {row.folder for row in rows}:
        parser.error(f"--only: no row {', '.join(unknown)}; they are {[r.folder for r in rows]}")
    found: dict[str, dict[int, study.Right]] = {row.name: {} for row in rows}
    for seed in range(options.seeds):
        for row in rows:
            right = measured(row, seed, clips, options.out, results, row.folder in trained)
            if right:
                found[row.name][seed] = right
                write(found, options.out)
    for name in ("study.md", "claims.md"):
        print((options.out / name).read_text())
    return 0


def measured(
    row: Row, seed: int, clips: study.Clips, out: Path, results: study.Results, train: bool
) -> study.Right | None:
    """Which clips a row classifies correctly after training with a seed.

    None if the results do not have it and it is not to be trained.
    """
    run, recipe = f"{row.folder}-seed-{seed}", f"configs/demo.py:{row.recipe},seed={seed}"
    flags = [*clips.flags(), *clips.schedule(demo.get_config(row.recipe)), *row.flags]
    config = load_config(recipe, flags)
    if right := results.find(run, config):
        return right
    if not train:
        return None
    study.train(out / run, recipe, *flags)
    right = study.right_clips(out / run, config.eval.settings)
    results.add(run, config, right)
    return right


def write(found: Found, out: Path) -> None:
    """Writes study.md, of what is trained so far, and claims.md, of seeds that both rows have."""
    heads = ["%", *(f"{budget} tokens" for budget in demo.BUDGETS), "seeds"]
    study.write_table(
        out / "study.md",
        heads,
        [
            [
                name,
                *(
                    study.mean_text([own[budget] for own in seeds.values()])
                    for budget in demo.BUDGETS
                ),
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
    better, worse = found[claim.better], found[claim.worse]
    seeds = [seed for seed in better if seed in worse]
    if not seeds:
        return []
    differences = [
        study.difference_text([better[s][budget] for s in seeds], [worse[s][budget] for s in seeds])
        for budget in demo.BUDGETS
    ]
    return [
        claim.table,
        f"{claim.better} > {claim.worse}",
        claim.points,
        *differences,
        str(len(seeds)),
    ]


if __name__ == "__main__":
    sys.exit(main())
