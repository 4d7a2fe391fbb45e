"""How report.html looks: light and dark, wide and narrow, on paper. A module, so that it travels wherever the code does."""

STYLE = """\
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1f2328; --quiet: #59636e; --grid: #d9dde2; --soft: #f4f6f8; --link: #0059b3;
  --blue: #0072b2; --orange: #d98e00; --green: #00875f; --red: #c9500a; --purple: #b4558c; --grey: #59636e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --ink: #e6eaef; --quiet: #9aa5b1; --grid: #343c46; --soft: #1d232a; --link: #7fc1ff;
    --blue: #56b4e9; --orange: #f0b429; --green: #35c79a; --red: #ff8a4c; --purple: #e79fc8; --grey: #9aa5b1;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; padding-bottom: .25rem; font-size: 1.2rem; border-bottom: 1px solid var(--grid); }
a { color: var(--link); }
code, pre, .samples tbody th { width: auto; }
.samples .text { font: .85rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
code { overflow-wrap: anywhere; }
pre { margin: .6rem 0; padding: .7rem .9rem; background: var(--soft); border-radius: 6px; overflow-x: auto; }
blockquote { margin: .6rem 0; padding: .4rem .9rem; border-left: 4px solid var(--red); background: var(--soft); overflow-wrap: anywhere; }
.verdict { margin: .5rem 0 1rem; font-size: 1.1rem; }
.verdict strong { padding: .1rem .6rem; border: 2px solid; border-radius: 1rem; margin-right: .4rem; }
.good { color: var(--green); } .busy { color: var(--blue); } .pause { color: var(--orange); } .bad { color: var(--red); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .6rem; margin: 0; }
.figures div { padding: .6rem .8rem; background: var(--soft); border-radius: 6px; }
.figures dt { color: var(--quiet); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: 1.2rem 0 0; padding: 0; list-style: none; font-size: .9rem; }
.wide, .picture { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; margin: .6rem 0; font-size: .93rem; }
th, td { padding: .35rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }
thead th { color: var(--quiet); font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 500; white-space: nowrap; }
tbody th:nth-last-child(2) { width: 32%; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.samples tbody th { width: auto; }
.samples .text { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.prompt { color: var(--quiet); } .mark { color: var(--orange); font-weight: 700; }
figure { margin: .6rem 0; }
figcaption { color: var(--quiet); font-size: .88rem; }
.picture svg { display: block; width: 100%; min-width: 40rem; height: auto; font-family: inherit; }
.picture svg * { stroke-linejoin: round; stroke-linecap: butt; }
.point rect { fill: transparent; }
.point rect:hover { fill: var(--ink); fill-opacity: .1; }
summary { cursor: pointer; color: var(--link); }
footer { margin-top: 3rem; color: var(--quiet); font-size: .85rem; }
@media (max-width: 40rem) {
  body { padding-top: 1rem; }
  th, td { padding: .3rem .45rem; }
  thead th, tbody th { white-space: normal; }
  .figures { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
}
@media print {
  :root { --paper: #fff; --ink: #000; --quiet: #444; --grid: #ccc; --soft: #f4f4f4; --link: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  figure, tr, .figures div { break-inside: avoid; }
  h2 { break-after: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .picture svg { min-width: 0; }
}
"""
