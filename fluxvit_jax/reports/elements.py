"""HTML elements of pages. Arguments are HTML unless they are said to be text."""

import html
from collections.abc import Iterable, Mapping, Sequence


def document(title: str, css: str, header: str, main: str) -> str:
    """One HTML file that needs no other; title: text, also of the heading."""
    title = html.escape(title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{header}</header>
<main>
{main}</main>
</body>
</html>
"""


def notes(texts: Iterable[str]) -> str:
    """Remarks that readers should not miss, as text; nothing if there are none."""
    items = "".join(f"<li>{html.escape(text)}</li>\n" for text in texts)
    return f'<ul class="notes">\n{items}</ul>\n' if items else ""


def facts(named: Mapping[str, str]) -> str:
    """A card of facts, each made by `fact`, by their names."""
    items = "".join(f"<div><dt>{name}</dt>{one}</div>\n" for name, one in named.items())
    return f'<dl class="facts card">\n{items}</dl>\n'


def fact(text: str, more: str = "") -> str:
    """A fact, which is text, with details."""
    more = f'<dd class="small">{more}</dd>' if more else ""
    return f"<dd>{html.escape(text)}</dd>{more}"


def section(title: str, legend: str, content: str) -> str:
    return f"""<section>
<h2>{title}</h2>
<p class="legend">{legend}</p>
{content}</section>
"""


def folded(title: str, content: str) -> str:
    """A section that readers can unfold; its content scrolls."""
    return f"""<details>
<summary>{title}</summary>
<div class="scroll">{content}</div>
</details>
"""


def columns_of(panels: Sequence) -> int:
    """The number of panels side by side where there is room."""
    return 2 if len(panels) in (2, 4) else 3


def side_by_side(panels: Sequence[str]) -> str:
    style = f"--columns:{columns_of(panels)}"
    return f'<div class="panels" style="{style}">\n{"".join(panels)}</div>\n'


def table(kind: str, heads: Iterable[str], rows: Iterable[str], above: str = "") -> str:
    """A table of CSS classes `kind`; above: an extra row of its head above the column names."""
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
