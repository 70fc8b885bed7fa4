"""The look of pages: one style sheet and one small script, both inside the page."""

from __future__ import annotations

import html

CSS = """
:root { color-scheme: light dark;
  --bg: #f6f7f9; --card: #ffffff; --text: #1b2130; --dim: #667085; --line: #e4e7ec; --accent: #3559e0; --pale: #a9b9f4;
  --bad: #c0362c; --warn-bg: #fff6e5; --warn: #8a5a00; --code: #f2f4f8; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #10131a; --card: #191d27; --text: #e7eaf1; --dim: #98a1b3; --line: #2a303d; --accent: #8aa2ff; --pale: #566aa8;
  --bad: #ff8a80; --warn-bg: #2d2514; --warn: #f0c674; --code: #12151d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
header h1 { margin: 0; font-size: 28px; letter-spacing: -.01em; overflow-wrap: anywhere; }
header p { margin: 4px 0 0; color: var(--dim); overflow-wrap: anywhere; }
.badge { display: inline-block; margin-left: 10px; padding: 2px 10px; border-radius: 99px; font-size: 13px; font-weight: 600;
  vertical-align: 5px; letter-spacing: 0; background: color-mix(in srgb, var(--accent) 14%, transparent);
  color: var(--accent); }
h2 { margin: 40px 0 12px; font-size: 19px; letter-spacing: -.005em; }
h3 { margin: 20px 0 10px; font-size: 15px; color: var(--dim); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 24px; }
.tile, .card, figure.chart { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 24px; line-height: 1.25; font-weight: 650; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: 13px; }
.tile small { display: block; color: var(--dim); font-size: 12px; }
.tile.bad b { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }
figure.chart { position: relative; margin: 0; padding: 14px 16px 8px; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-weight: 600; }
figcaption small { color: var(--dim); font-weight: 400; }
figure svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
.legend { position: absolute; right: 16px; top: 15px; font-size: 12px; color: var(--dim); }
.key { margin-left: 14px; }
.key.main::before, .key.raw::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 6px;
  vertical-align: 3px; background: var(--accent); }
.key.raw::before { background: var(--pale); }
.key.lost::before { content: ""; display: inline-block; width: 14px; height: 8px; border-radius: 2px; margin-right: 6px;
  background: var(--bad); opacity: .75; }
.column { fill: var(--accent); } .column.bad { fill: var(--bad); opacity: .75; }
.bars { list-style: none; margin: 0; padding: 6px 16px; }
.bars li { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 4fr) 92px; gap: 16px; align-items: center; padding: 8px 0;
  border-bottom: 1px solid var(--line); }
.bars li:last-child { border-bottom: 0; }
.bars small { display: block; color: var(--dim); font-size: 12px; }
.bars .what { overflow-wrap: anywhere; } .bars .what small { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2;
  overflow: hidden; }
.bars .track { height: 12px; border-radius: 6px; background: var(--code); overflow: hidden; }
.bars i { display: block; height: 100%; min-width: 2px; border-radius: 6px; background: var(--accent); }
.bars .bad i { background: var(--bad); opacity: .75; }
.bars .many { text-align: right; font-variant-numeric: tabular-nums; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); gap: 14px; align-items: start; }
.clip { margin: 0; overflow: hidden; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.clip img { display: block; width: 100%; background: #000; }
.clip p { margin: 0; padding: 8px 12px 2px; font-size: 13px; overflow-wrap: anywhere; display: -webkit-box;
  -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; }
.clip small { display: block; padding: 0 12px 10px; color: var(--dim); font-size: 12px; overflow-wrap: anywhere; }
.grid { stroke: var(--line); stroke-width: 1; } .axis { stroke: var(--dim); stroke-width: 1; opacity: .6; }
.tick { fill: var(--dim); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.line.raw { stroke: var(--pale); stroke-width: 1.1; } .dot { fill: var(--accent); } .dot.raw { fill: var(--pale); }
.pointer path { stroke: var(--dim); stroke-dasharray: 3 3; } .pointer circle { fill: var(--accent); stroke: var(--card);
  stroke-width: 2; }
figure output { position: absolute; display: none; pointer-events: none; padding: 6px 10px; border-radius: 8px; font-size: 12px;
  background: var(--text); color: var(--bg); white-space: pre; font-variant-numeric: tabular-nums;
  transform: translate(-50%, -115%); }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 14px; }
.video { margin: 0; overflow: hidden; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.video video { display: block; width: 100%; background: #000; }
.video p { margin: 0; padding: 8px 12px 10px; font-size: 13px; overflow-wrap: anywhere; }
.video .empty { padding: 36px 12px; text-align: center; border: 0; border-bottom: 1px solid var(--line); border-radius: 0; }
.scroll { overflow-x: auto; }
.scroll.tall { max-height: 420px; overflow-y: auto; }
table { width: 100%; border-collapse: collapse; font-size: 13.5px; }
th { position: sticky; top: 0; background: var(--card); color: var(--dim); font-weight: 600; text-align: left;
  white-space: nowrap; }
th, td { padding: 8px 14px; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.num { font-variant-numeric: tabular-nums; } td.value { min-width: 7.5em; } td.name { color: var(--dim); white-space: nowrap;
  } td.value { overflow-wrap: anywhere; }
.yes { color: #16803c; font-weight: 600; } .no { color: var(--bad); font-weight: 600; }
@media (prefers-color-scheme: dark) { .yes { color: #6fd28c; } }
details { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
details + details { margin-top: 12px; }
summary { cursor: pointer; padding: 12px 16px; font-weight: 600; }
details > pre, details > .scroll { border-top: 1px solid var(--line); }
pre { margin: 0; padding: 14px 18px; overflow-x: auto; background: var(--code); border-radius: 0 0 12px 12px;
  font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre .k { color: var(--accent); } pre .c { color: var(--dim); }
.note { margin: 8px 2px 0; color: var(--dim); font-size: 0.9em; }
.empty { margin: 0; color: var(--dim); padding: 14px 16px; background: var(--card); border: 1px dashed var(--line);
  border-radius: 12px; }
.warn { margin: 12px 0 0; padding: 10px 14px; border-radius: 10px; background: var(--warn-bg); color: var(--warn);
  font-size: 14px; }
footer { margin-top: 48px; color: var(--dim); font-size: 13px; }
@media (max-width: 700px) {
  .legend { position: static; } .legend .key:first-child { margin-left: 0; }
  .bars li { grid-template-columns: minmax(0, 1fr) 80px; } .bars .track { grid-row: 2; grid-column: 1 / -1; } figure.wide { overflow-x: auto; } figure.wide svg { width: 820px; } }
@media print { body { background: #fff; } details { break-inside: avoid; } }
"""

SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-lines]")) {

  const lines = JSON.parse(svg.dataset.lines), mark = svg.querySelector(".pointer"), tip = svg.parentNode.querySelector("output");
  const view = svg.viewBox.baseVal;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * view.width;
    const hits = lines.filter((l) => l.points.length).map((l) => ({ name: l.name,
      at: l.points.reduce((best, p) => Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best) }));
    if (!hits.length) return;
    const top = hits[hits.length - 1].at, circles = hits.map((h) => `<circle cx="${h.at[0]}" cy="${h.at[1]}" r="4"/>`);
    mark.innerHTML = `<path d="M${top[0]} 10V${view.height - 30}"/>` + circles.join("");
    tip.textContent = `step ${top[2]}\\n` + hits.map((h) => `${h.name}: ${h.at[3]}`).join("\\n");
    const outer = svg.parentNode.getBoundingClientRect();
    const left = box.left - outer.left + top[0] / view.width * box.width;
    tip.style.display = "block";
    tip.style.left = Math.min(Math.max(left, 70), outer.width - 70) + "px";
    tip.style.top = box.top - outer.top + Math.max(top[1], 60) / view.height * box.height + "px";
  });
  svg.addEventListener("pointerleave", () => { mark.innerHTML = ""; tip.style.display = "none"; });
}
for (const video of document.querySelectorAll("video")) {  // small videos would vanish under their controls
  video.controls = false;
  video.addEventListener("pointerenter", () => { video.controls = true; });
  video.addEventListener("pointerleave", () => { video.controls = false; });
}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document that loads nothing: the policy in its head would refuse it.

    Args:
        title: Plain text.
        body: HTML whose texts are escaped.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; media-src data:; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head>\n"
        f"<body><main>\n{body}\n</main><script>{SCRIPT}</script></body></html>\n"
    )
