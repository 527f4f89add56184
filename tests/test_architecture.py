"""The house: arrows between modules point down, and there is no circle."""

import ast
from pathlib import Path

import fluxvit_jax

PACKAGE = Path(fluxvit_jax.__file__).parent
# From the bottom up. A module imports from its own row and those above it in this list only.
ROWS = (
    ("errors", "grids", "version", "recipes"),
    ("models",),
    ("config",),
    ("distributed",),
    ("convert", "data", "reports"),
    ("checkpoints", "objectives"),
    ("training", "evaluation", "token_optimization", "adaptive", "deploy", "preflight"),
    ("command_line", "main", "doctor", "find", ""),  # "": the package itself
)
ROW_OF = {part: number for number, row in enumerate(ROWS) for part in row}
# Commands, which stand on top wherever they lie.
COMMANDS = {"convert.__main__", "data.prepare", "data.shrink", "data.synthetic"}


def modules() -> dict[str, Path]:
    """Every module by its name without the package's."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of the package that a file imports, in its functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fluxvit_jax":
            parent = node.module.removeprefix("fluxvit_jax").removeprefix(".")
            for alias in node.names:
                child = f"{parent}.{alias.name}".removeprefix(".")
                found.add(child if child in known else parent)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {n.removeprefix("fluxvit_jax.") for n in names if n.startswith("fluxvit_jax.")}
    return found


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, set(known)) - {name} for name, path in known.items()}


def test_arrows_point_down():
    rows = {name: ROW_OF[name.split(".")[0]] for name in modules() if name not in COMMANDS}
    up = [
        f"{name} -> {other}"
        for name, others in graph().items()
        for other in others
        if name in rows and rows.get(other, len(ROWS)) > rows[name]
    ]
    assert not up


def test_there_is_no_circle():
    """Modules are taken away whose imports are gone already, until none is left."""
    left = graph()
    while ready := [name for name, others in left.items() if not others & left.keys()]:
        for name in ready:
            del left[name]
    assert not left


def test_the_top_level_is_small():
    files = [path for path in PACKAGE.iterdir() if path.suffix == ".py"]
    assert len(files) <= 6
