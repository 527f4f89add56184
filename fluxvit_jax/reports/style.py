"""Style of all pages and pictures: colors and CSS."""

# By the names that styles call them.
LIGHT = {
    "ground": "#f4f5f7",
    "card": "#ffffff",
    "ink": "#1b1f24",
    "quiet": "#626b76",
    "line": "#e3e6ea",
    "accent": "#3569d4",
    "warn": "#a66300",
}
DARK = {
    "ground": "#121417",
    "card": "#1b1e23",
    "ink": "#e8eaed",
    "quiet": "#9aa3ae",
    "line": "#30353c",
    "accent": "#7aa6ff",
    "warn": "#f0b429",
}


def colors(light: dict[str, str], dark: dict[str, str]) -> str:
    """CSS with colors by their names, such as `var(--ink)`, light or dark as the reader prefers."""
    light_ones, dark_ones = (
        " ".join(f"--{name}: {color};" for name, color in own.items()) for own in (light, dark)
    )
    return f"""
:root {{ color-scheme: light dark; {light_ones} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark_ones} }} }}
"""


# The beginning of every page's CSS, after its colors.
BASE = """
* { box-sizing: border-box; margin: 0; padding: 0; }
body {
  background: var(--ground); color: var(--ink); padding: clamp(0.75rem, 2.5vw, 2rem);
  font: 1rem/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums;
}
h1 { font-size: clamp(1.125rem, 4vw, 1.5rem); line-height: 1.25; }
"""

# Of pages made of `elements`.
ELEMENTS = """
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
.all { width: auto; }
.value { font-size: 1.125rem; font-weight: 700; white-space: nowrap; }
.whisker {
  position: relative; height: 0.75rem; max-width: 9rem; margin: 0.2rem 0;
}
.whisker div {
  position: absolute; top: 50%; height: 2px; margin-top: -1px; background: currentColor;
}
.whisker div + div { width: 0.5rem; height: 0.5rem; margin: -0.25rem; border-radius: 50%; }
.keys { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin-bottom: 0.875rem; }
.keys span { white-space: nowrap; }
/* As many beside each other as fit, at most `--columns`. */
.panels {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(
    max(min(100%, 22rem), (100% - (var(--columns) - 1) * 1rem) / var(--columns)), 1fr));
}
.panels > * { min-width: 0; }
img { display: block; width: 100%; height: auto; }
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
}
@media (max-width: 30rem) { .card, details { padding: 0.75rem; } }
"""
