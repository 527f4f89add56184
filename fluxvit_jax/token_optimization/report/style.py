"""Style of the page and the picture: colors, the markers of the methods, and the page's CSS."""

from fluxvit_jax.reports import style

MARKERS = {"select": "o", "plain": "s", "merge": "^"}  # of matplotlib; `SHAPES` are the same in SVG
SHAPES = {
    "select": '<circle r="5"/>',
    "plain": '<path d="M-4.5-4.5h9v9h-9z"/>',
    "merge": '<path d="M0-5.5 5.5 4.5h-11z"/>',
}

# Blue, orange and green that people with any color vision tell apart (after Okabe and Ito).
LIGHT = style.LIGHT | {"plain": "#c9540a", "merge": "#0b8a68"}
DARK = style.DARK | {"plain": "#ff9d5c", "merge": "#3fcfa4"}
# Percent of the accent in the worst and in the best cell of a heat map: text is legible on both.
HEAT = 8, 55


def method_colors(colors: dict[str, str]) -> dict[str, str]:
    """The color of each method, in the order of drawing: TO comes last, on top."""
    return {"merge": colors["merge"], "plain": colors["plain"], "select": colors["accent"]}


def mark(method: str, hollow: bool = False) -> str:
    """The marker of a method in charts and beside its name."""
    kind = f"mark {method}{' hollow' if hollow else ''}"
    return f'<svg class="{kind}" viewBox="-6 -6 12 12" aria-hidden="true">{SHAPES[method]}</svg>'


CSS = (
    style.colors(LIGHT, DARK)
    + style.BASE
    + style.ELEMENTS
    + """
.costs { width: auto; }
.costs td, .costs tbody th { padding: 0.35rem 0; }
.costs td, .costs th, .costs tbody th { padding-right: clamp(0.6rem, 4vw, 4rem); }
.costs td, .costs .small { white-space: nowrap; }
.costs tr.again { border-top-color: transparent; }
.costs tr.again th { color: transparent; }
.mark { width: 0.75em; height: 0.75em; margin-right: 0.4em; overflow: visible; fill: currentColor; }
.mark.hollow { fill: none; stroke: currentColor; stroke-width: 1.5; }
.select, .better { color: var(--accent); }
.plain, .worse { color: var(--plain); }
.merge { color: var(--merge); }
.whisker { background: linear-gradient(var(--quiet), var(--quiet)) 50% / 1px 100% no-repeat; }
.keys .line { width: 1.5rem; height: 0.75em; margin-right: 0.4em; stroke: var(--quiet); }
.keys .line { stroke-width: 1.5; fill: var(--quiet); }
.keys .cascades { stroke: var(--warn); }
.heat { table-layout: fixed; font-size: clamp(0.6875rem, 2.6vw, 0.8125rem); }
.heat th, .heat td { text-align: center; padding: 0.3rem 0; border: 2px solid var(--card); }
.heat th { color: var(--quiet); font-size: inherit; font-weight: 400; }
.heat td { border-radius: 0.375rem; }
.heat .known { background: color-mix(in srgb, var(--accent) var(--heat), var(--card)); }
.heat .partial { color: var(--quiet); font-style: italic; }
.heat .best { outline: 2px solid var(--ink); outline-offset: -2px; font-weight: 700; }
@media (max-width: 48rem) {
  .stacked td:nth-child(4) { grid-column: 1 / -1; }
  .costs { font-size: 0.875rem; }
  .costs th, .costs .small { font-size: 0.75rem; }
  .costs td, .costs th, .costs tbody th { padding-right: 0.5rem; }
}
"""
)
