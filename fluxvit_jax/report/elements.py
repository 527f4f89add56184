"""The HTML that several parts of the page are made of."""

from collections.abc import Iterable, Sequence

from fluxvit_jax.report.style import SHAPES


def mark(method: str, hollow: bool = False) -> str:
    """What stands for a method in charts and beside its name."""
    kind = f"mark {method}{' hollow' if hollow else ''}"
    return f'<svg class="{kind}" viewBox="-6 -6 12 12" aria-hidden="true">{SHAPES[method]}</svg>'


def section(title: str, legend: str, content: str) -> str:
    return f"""<section>
<h2>{title}</h2>
<p class="legend">{legend}</p>
{content}</section>
"""


def folded(title: str, content: str) -> str:
    """What readers open if they want it; it scrolls then."""
    return f"""<details>
<summary>{title}</summary>
<div class="scroll">{content}</div>
</details>
"""


def columns_of(panels: Sequence) -> int:
    """How many panels stand beside each other where there is room."""
    return 2 if len(panels) in (2, 4) else 3


def side_by_side(panels: Sequence[str]) -> str:
    style = f"--columns:{columns_of(panels)}"
    return f'<div class="panels" style="{style}">\n{"".join(panels)}</div>\n'


def table(kind: str, heads: Iterable[str], rows: Iterable[str], above: str = "") -> str:
    """A table of CSS classes `kind`; above: a row of its head above that of the columns."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return f"""<table class="{kind}">
<thead>{above}<tr>{head}</tr></thead>
<tbody>
{"".join(rows)}</tbody>
</table>"""


def row(head: str, columns: Iterable[str], kind: str = "") -> str:
    """A row of a table; columns: HTML of all but the first, which is its head."""
    cells = "".join(f"<td>{text}</td>" for text in columns)
    start = f'<tr class="{kind}">' if kind else "<tr>"
    return f'{start}<th scope="row">{head}</th>{cells}</tr>\n'


def small(text: str) -> str:
    return f'<span class="small">{text}</span>'
