"""How the page and the picture look: colours, the marks of the methods, and the page's CSS."""

from fluxvit_jax import page

MARKERS = {"select": "o", "plain": "s", "merge": "^"}  # of matplotlib; `SHAPES` are the same in SVG
SHAPES = {
    "select": '<circle r="5"/>',
    "plain": '<path d="M-4.5-4.5h9v9h-9z"/>',
    "merge": '<path d="M0-5.5 5.5 4.5h-11z"/>',
}

# Blue, orange and green that people with any colour vision tell apart (after Okabe and Ito).
LIGHT = page.LIGHT | {"plain": "#c9540a", "merge": "#0b8a68", "warn": "#a66300"}
DARK = page.DARK | {"plain": "#ff9d5c", "merge": "#3fcfa4", "warn": "#f0b429"}
# Percent of the accent in the worst and in the best cell of a heat map: text is legible on both.
HEAT = 8, 55


def of_methods(colours: dict[str, str]) -> dict[str, str]:
    """The colour of each method, in the order of drawing: TO comes last, on top."""
    return {"merge": colours["merge"], "plain": colours["plain"], "select": colours["accent"]}


CSS = (
    page.colours(LIGHT, DARK)
    + page.BASE
    + """
body { font-size: 0.9375rem; }
main, header { max-width: 88rem; margin: 0 auto; }
section, details { margin-top: 2rem; }
h2 { font-size: 1.25rem; line-height: 1.3; }
h3 { font-size: 0.9375rem; line-height: 1.35; margin-bottom: 0.5rem; }
ul { list-style: none; }
.legend { color: var(--quiet); font-size: 0.875rem; max-width: 52rem; margin: 0.25rem 0 0.875rem; }
.small, .legend { text-wrap: pretty; }
.small { display: block; color: var(--quiet); font-size: 0.8125rem; font-weight: 400; }
.card, details {
  background: var(--card); border: 1px solid var(--line); border-radius: 0.75rem; padding: 1rem;
}
.facts {
  display: grid; gap: 0.75rem 1.5rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr));
}
dt { color: var(--quiet); font-size: 0.8125rem; }
dd { font-weight: 600; }
.notes {
  margin-top: 1rem; padding: 0.75rem 1rem; border-radius: 0.75rem; display: grid; gap: 0.35rem;
  border: 1px solid var(--warn); border-left-width: 0.375rem;
  background: color-mix(in srgb, var(--warn) 9%, var(--card)); font-weight: 500;
}
.tag {
  display: inline-block; padding: 0 0.4rem; border-radius: 0.5rem; white-space: nowrap;
  color: var(--warn); border: 1px solid currentColor; font-size: 0.75rem; font-weight: 500;
}
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; }
thead th { color: var(--quiet); font-size: 0.8125rem; vertical-align: bottom; }
.rows td, .rows th { padding: 0.6rem 1rem 0.6rem 0; vertical-align: top; }
.rows tbody tr { border-top: 1px solid var(--line); }
.rows thead th { padding-top: 0; }
.costs, .all { width: auto; }
.costs td, .costs tbody th { padding: 0.35rem 0; }
.costs td, .costs th, .costs tbody th { padding-right: clamp(0.6rem, 4vw, 4rem); }
.costs td, .costs .small { white-space: nowrap; }
.costs tr.again { border-top-color: transparent; }
.costs tr.again th { color: transparent; }
.value { font-size: 1.125rem; font-weight: 700; white-space: nowrap; }
.mark { width: 0.75em; height: 0.75em; margin-right: 0.4em; overflow: visible; fill: currentColor; }
.mark.hollow { fill: none; stroke: currentColor; stroke-width: 1.5; }
.select, .better { color: var(--accent); }
.plain, .worse { color: var(--plain); }
.merge { color: var(--merge); }
.whisker {
  position: relative; height: 0.75rem; max-width: 9rem; margin: 0.2rem 0;
  background: linear-gradient(var(--quiet), var(--quiet)) 50% / 1px 100% no-repeat;
}
.whisker div {
  position: absolute; top: 50%; height: 2px; margin-top: -1px; background: currentColor;
}
.whisker div + div { width: 0.5rem; height: 0.5rem; margin: -0.25rem; border-radius: 50%; }
.keys { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin-bottom: 0.875rem; }
.keys span { white-space: nowrap; }
.keys .line { width: 1.5rem; height: 0.75em; margin-right: 0.4em; stroke: var(--quiet); }
.keys .line { stroke-width: 1.5; fill: var(--quiet); }
/* As many beside each other as fit, at most `--columns`. */
.panels {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(
    max(min(100%, 22rem), (100% - (var(--columns) - 1) * 1rem) / var(--columns)), 1fr));
}
.panels > * { min-width: 0; }
img { display: block; width: 100%; height: auto; }
.heat { table-layout: fixed; font-size: clamp(0.6875rem, 2.6vw, 0.8125rem); }
.heat th, .heat td { text-align: center; padding: 0.3rem 0; border: 2px solid var(--card); }
.heat th { color: var(--quiet); font-size: inherit; font-weight: 400; }
.heat td { border-radius: 0.375rem; }
.heat .known { background: color-mix(in srgb, var(--accent) var(--heat), var(--card)); }
.heat .partial { color: var(--quiet); font-style: italic; }
.heat .best { outline: 2px solid var(--ink); outline-offset: -2px; font-weight: 700; }
summary { cursor: pointer; font-weight: 600; }
.scroll, .sideways { overflow: auto; overflow-wrap: normal; }
.scroll { max-height: 36rem; margin-top: 0.75rem; }
.sideways { width: fit-content; max-width: 100%; }
.all { font-size: 0.8125rem; white-space: nowrap; }
.all th, .all td { padding: 0.25rem 1.25rem 0.25rem 0; }
.all td { text-align: right; }
.all thead { position: sticky; top: 0; background: var(--card); }
.all thead th { text-align: right; }
.all thead tr:first-child th { color: var(--ink); text-align: left; }
.all th:first-child, .all tbody th { text-align: left; }
.all tbody tr { border-top: 1px solid var(--line); }
@media (max-width: 48rem) {
  .stacked thead { display: none; }
  .stacked tr {
    display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0.625rem 1rem;
    padding: 0.75rem 0;
  }
  .stacked tbody tr:first-child { border-top: 0; }
  .stacked td, .stacked tbody th { display: block; padding: 0; }
  .stacked tbody th { grid-column: 1 / -1; }
  .stacked td::before {
    content: attr(data-label); display: block; color: var(--quiet); font-size: 0.8125rem;
  }
  .stacked td:nth-child(4) { grid-column: 1 / -1; }
  .costs { font-size: 0.875rem; }
  .costs th, .costs .small { font-size: 0.75rem; }
  .costs td, .costs th, .costs tbody th { padding-right: 0.5rem; }
}
@media (max-width: 30rem) { .card, details { padding: 0.75rem; } }
"""
)
