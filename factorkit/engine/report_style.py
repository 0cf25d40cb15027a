"""The style sheet of the report: one column, light or dark as the reader's system is, narrow screens included."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #23272b; --faint: #6a7178; --line: #e2e5e8; --panel: #f6f7f8;
  --good: #1a7f4b; --mixed: #b26a00; --bad: #b3261e; --open: #6a7178; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181a; --ink: #dfe3e6; --faint: #98a0a7; --line: #2c3135;
  --panel: #1d2023; --good: #57c78b; --mixed: #e9a84a; --bad: #ff7b6b; --open: #98a0a7; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
header p { margin: 0; color: var(--faint); }
h1 { margin: 0; font-size: 1.7rem; font-weight: 600; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.1rem; font-weight: 600; }
h3 { margin: 1.25rem 0 .4rem; font-size: .9rem; font-weight: 600; }
.kicker { font-size: .8rem; letter-spacing: .04em; }
.missing, .note, small, figcaption { color: var(--faint); font-size: .85rem; }
.verdict { margin-top: 1.25rem; padding: .9rem 1.1rem; border-left: 4px solid var(--tone); background: var(--panel); }
.verdict h2 { margin: 0 0 .25rem; font-size: 1.25rem; color: var(--tone); }
.verdict p { margin: .15rem 0; overflow-wrap: anywhere; }
.good { --tone: var(--good); } .mixed { --tone: var(--mixed); } .bad { --tone: var(--bad); }
.open { --tone: var(--open); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(155px, 1fr)); gap: .75rem; }
.tile { padding: .6rem .8rem; border: 1px solid var(--line); border-radius: 4px; }
.tile span, .tile b, .tile small { display: block; }
.tile span { color: var(--faint); font-size: .8rem; }
.tile b { font-size: 1.35rem; font-weight: 600; }
figure { margin: 0; }
img { max-width: 100%; height: auto; display: block; }
article > figure img { border: 1px solid var(--line); }
.strip { display: flex; gap: .6rem; overflow-x: auto; padding: .6rem 0; }
.strip figure { flex: none; }
.strip img { height: 150px; width: auto; max-width: none; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1rem 1.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--faint); white-space: nowrap; }
.scores { min-width: 560px; }
.scores th { color: inherit; }
.ours > * { font-weight: 700; }
.oracle > * { color: var(--faint) !important; }
.bar { width: 200px; vertical-align: middle; }
.bar i { display: block; height: 8px; background: var(--faint); opacity: .55; }
.ours .bar i { background: var(--accent); opacity: 1; }
.events td:first-child, .events td:nth-child(3) { white-space: nowrap; }
@media (max-width: 420px) { .curves { grid-template-columns: 1fr; } }
"""
