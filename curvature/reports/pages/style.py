"""The look of the page: quiet, readable from a phone to a wide screen, by day and by night."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfa; --raised: #ffffff; --ink: #1c1e21; --soft: #5b6068; --line: #e2e3e0; --accent: #27578f;
  --c0: #2f6db3; --c1: #c2571a; --c2: #3d8a5f; --c3: #8a5aa8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --raised: #1b1e22; --ink: #e6e7e4; --soft: #a2a7ae; --line: #2d3137; --accent: #8fb8ea;
    --c0: #79aeea; --c1: #eb9a62; --c2: #7cc79c; --c3: #c39ddd;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem 1rem 4rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
h1, h2, h3 { font-weight: 600; line-height: 1.25; margin: 0; }
h1 { font-size: 1.75rem; letter-spacing: -0.01em; }
h1 span { font-weight: 400; color: var(--soft); }
h2 { font-size: 1.25rem; }
h3 { font-size: 0.9rem; margin-bottom: 0.4rem; }
p { margin: 0.5rem 0; max-width: 42rem; }
a { color: var(--accent); text-underline-offset: 0.15em; }
code { font: 0.9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.over { margin: 0 0 0.25rem; color: var(--soft); font-size: 0.85rem; letter-spacing: 0.04em; }
.facts { display: flex; flex-wrap: wrap; gap: 0.75rem 2rem; margin: 1.25rem 0; }
.facts dt { color: var(--soft); font-size: 0.8rem; }
.facts dd { margin: 0; font-size: 1.05rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 0; padding: 0; list-style: none; }
nav { font-size: 0.9rem; }
section { margin-top: 2.5rem; padding-top: 1.75rem; border-top: 1px solid var(--line); }
.plain { color: var(--soft); }
.findings { margin: 0.75rem 0 1rem; padding-left: 1.1rem; max-width: 42rem; }
.findings li { margin: 0.3rem 0; }
.note { padding: 0.6rem 0.9rem; border: 1px solid var(--line); border-radius: 6px; }
.pair { display: grid; gap: 1.5rem; align-items: start; grid-template-columns: minmax(0, 1fr); }
.tables { display: flex; flex-wrap: wrap; gap: 1.5rem 4rem; margin: 1.25rem 0; }
figure { margin: 1.5rem 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--soft); font-size: 0.85rem; margin-top: 0.4rem; max-width: 42rem; }
.table { overflow-x: auto; margin: 1rem 0; }
.tables .table { margin: 0; max-width: 100%; }
.table:focus-visible, a:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; min-width: 15rem; font-size: 0.875rem; line-height: 1.4; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.4rem; }
th, td { padding: 0.3rem 0; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--line); }
th + th, td + td, th + td { padding-left: 1.25rem; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 400; overflow-wrap: anywhere; min-width: 6.5rem; }
tbody tr:last-child > * { border-bottom: 0; }
.n { text-align: right; white-space: nowrap; }
thead .n { white-space: normal; }
.marks { margin: 0.4rem 0 0; color: var(--soft); font-size: 0.8rem; }
details { margin: 1rem 0; }
details p { font-size: 0.9rem; color: var(--soft); }
summary { cursor: pointer; color: var(--accent); font-size: 0.9rem; width: fit-content; }
footer { margin-top: 3rem; color: var(--soft); font-size: 0.85rem; }
@media (min-width: 52rem) {
  body { padding: 4rem 2rem 6rem; }
  .pair { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 2rem 3rem; }
}
@media (max-width: 30rem) {
  th + th, td + td, th + td { padding-left: 0.6rem; }
  table { font-size: 0.8125rem; }
  tbody th { min-width: 4.5rem; }
}
@media print { nav, summary { display: none; } }
"""
