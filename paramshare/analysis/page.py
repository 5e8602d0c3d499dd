"""The frame of an HTML page that needs nothing but itself: style for light and dark, wide and narrow, and the slider's script."""

import html
from collections.abc import Sequence

STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#5b6570;--line:#d9dee3;--card:#f4f6f8;--page:#fff;--link:#0b63b0}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#9aa5b1;--line:#343c45;--card:#1d2329;--page:#14181c;--link:#7db8f0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:24px 20px 48px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:40px 0 8px;padding-top:12px;border-top:1px solid var(--line)}
p{margin:6px 0;max-width:75ch}
.about,.small{color:var(--soft)}
.small{font-size:.87rem}
.note{border-left:3px solid #d9952b;padding-left:10px;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:10px;margin:18px 0}
.card{background:var(--card);border-radius:8px;padding:10px 14px}
.card b{display:block;font-size:1.5rem;line-height:1.3;font-weight:600}
.card span{display:block;color:var(--soft);font-size:.87rem}
.wide{overflow-x:auto;margin:8px 0}
table{border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums}
th,td{padding:4px 12px 4px 0;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
th{color:var(--soft);font-weight:500;white-space:normal;vertical-align:bottom}
td:first-child{white-space:normal}
.r{text-align:right}
tr.sum td{font-weight:600}
details{margin:8px 0}
summary{cursor:pointer;color:var(--link)}
.charts,.maps{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(330px,100%),1fr));gap:18px;align-items:start}
figure{margin:8px 0;min-width:0}
.chart{max-width:560px}
figcaption{font-weight:600;margin-bottom:4px;overflow-wrap:anywhere}
figcaption small{font-weight:400;color:var(--soft);display:block}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:11px}
@media (max-width:480px){.chart svg text{font-size:14px}}
.map svg text{font-size:10px}
.map svg .n{font-size:9px;text-anchor:middle}
.map svg .dark{fill:#111}
.map svg .light{fill:#fff}
.grid{stroke:var(--line)}
polyline{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
circle{fill:currentColor}
.level{stroke:currentColor;stroke-width:1.5;stroke-dasharray:3 4}
.c0{color:#2f7fc1}.c1{color:#e07b18}.c2{color:#2f9e58}.c3{color:#c2459a}.c4{color:#8b6cc9}.c5{color:#b59b00}
.keys{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:4px 0 0;padding:0;font-size:.87rem}
.keys li::before{content:"";display:inline-block;width:16px;margin-right:6px;vertical-align:middle;border-top:3px solid currentColor}
.keys .level::before{border-top-style:dotted}
.keys li{stroke:none}
.slider{display:flex;align-items:center;gap:12px;margin:10px 0;max-width:560px}
.slider[hidden]{display:none}
.slider input{flex:1;min-width:0}
.slider output{display:inline-block;min-width:3ch;font-weight:600}
.scale{display:flex;align-items:center;gap:8px;font-size:.87rem;color:var(--soft)}
.scale i{width:160px;height:10px;border-radius:3px}
.layers{display:flex;flex-wrap:wrap;gap:3px;margin:10px 0}
.layers i,.chip{background:hsl(var(--h) 55% 48%);border-radius:3px}
.layers i{width:18px;height:18px}
.layers .own,.keys .own::before{background:var(--line)}
.keys .bank::before{border:0;width:12px;height:12px;border-radius:3px;background:hsl(var(--h) 55% 48%)}
.chip{display:inline-block;color:#fff;min-width:1.6em;text-align:center;margin-right:2px;padding:0 3px;font-size:.8rem}
"""

# The slider repaints the squares of every map; without it the last snapshot stands there as it was written.
SCRIPT = """
(() => {
  const data = JSON.parse(document.getElementById("snapshots").textContent);
  const maps = [...document.querySelectorAll("figure.map")];
  const bar = document.getElementById("bar"), slider = document.getElementById("slider"), shown = document.getElementById("shown");
  const show = (t) => {
    shown.textContent = data.epochs[t];
    maps.forEach((map, number) => {
      const rects = map.querySelectorAll("rect"), numbers = map.querySelectorAll("text.n"), values = data.maps[number][t];
      const size = Math.round(Math.sqrt(rects.length));
      rects.forEach((rect, at) => {
        const i = Math.min(Math.floor(at / size), at % size), j = Math.max(Math.floor(at / size), at % size);
        const value = values[i * size - (i * (i - 1)) / 2 + j - i];
        rect.setAttribute("fill", data.colours[value]);
        if (numbers.length) {
          numbers[at].textContent = value === 100 ? "1" : "." + String(value).padStart(2, "0");
          numbers[at].setAttribute("class", "n " + (value > 60 ? "dark" : "light"));
        }
      });
    });
  };
  slider.addEventListener("input", () => show(Number(slider.value)));
  bar.hidden = false;
})();
"""


POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # nothing is fetched from anywhere


def page(title: str, body: Sequence[str], *, script: bool = False) -> str:
    """A whole page around its sections; `title` is text, `body` is HTML."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + (f"\n<script>{SCRIPT}</script>" if script else "")
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A section: a heading, and HTML below it."""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of text."""
    of_kind = f' class="{kind}"' if kind else ""
    return f"<p{of_kind}>{html.escape(text)}</p>"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), *, sums: int = 0, raw: Sequence[int] = ()) -> str:
    """A table in a box that scrolls by itself; the first row is its head.

    Args:
      rows: of text.
      right: columns aligned to the right.
      sums: so many rows at the end are sums.
      raw: columns that hold HTML below the head.
    """

    def row(cells: Sequence[str], tag: str, kind: str = "") -> str:
        inner = ""
        for i, cell in enumerate(cells):
            aligned = ' class="r"' if i in right else ""
            inner += f"<{tag}{aligned}>{cell if i in raw and tag == 'td' else html.escape(cell)}</{tag}>"
        return f"<tr{kind}>{inner}</tr>"

    head, *below = rows
    lines = [row(cells, "td", ' class="sum"' if i >= len(below) - sums else "") for i, cells in enumerate(below)]
    return f'<div class="wide"><table><thead>{row(head, "th")}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def details(summary: str, *parts: str) -> str:
    """Parts of HTML that a click on the summary, a text, unfolds."""
    return f"<details><summary>{html.escape(summary)}</summary>\n" + "\n".join(parts) + "\n</details>"
