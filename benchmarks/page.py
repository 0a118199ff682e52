"""Page: the frame of a report, one HTML file that loads nothing.

Tables sort without a script: each header is a radio button, and a checked one orders the rows of
its grid through custom properties that the rows carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["Column", "page", "sortable"]

STYLE = """
:root{color-scheme:light dark;--bg:#f7f7f4;--card:#fff;--ink:#1c2126;--muted:#5b6570;--rule:#c9ccc8;
--grid:#e6e7e2;--accent:#0b6b6b;--wash:#eaf3f2;--bad:#a3271b;--badwash:#fbecea;--good:#1d6b3f;
--c1:#a86400;--c2:#1d66ad;--c3:#147a55;--c4:#8439a0;--c5:#c23b22;--c6:#5f7a00;--c7:#5b6570}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1c2125;--ink:#e7e9ea;--muted:#a0a9b1;
--rule:#4a5259;--grid:#2b3136;--accent:#5cc4bd;--wash:#17302f;--bad:#ff9c8f;--badwash:#3a1f1c;
--good:#74cf9b;--c1:#f0a63f;--c2:#74b4f2;--c3:#4fcb9c;--c4:#cc94ec;--c5:#ff8b74;--c6:#b5cf4d;
--c7:#a0a9b1}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:0 24px 64px}
header.top{padding:44px 0 8px}
h1{font-size:2.1rem;line-height:1.15;letter-spacing:-.02em;margin:0 0 10px;text-wrap:balance}
h2{font-size:1.45rem;letter-spacing:-.01em;line-height:1.25;margin:56px 0 6px}
h3{font-size:1.12rem;margin:34px 0 4px;line-height:1.35}
h4{font-size:.95rem;margin:0 0 2px;line-height:1.4}
p{margin:0 0 12px;max-width:72ch}
a{color:var(--accent);text-underline-offset:2px}
code{font:.87em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.eyebrow{font-size:.78rem;letter-spacing:.08em;text-transform:uppercase;color:var(--muted);margin:0 0 6px}
.lead{font-size:1.12rem;max-width:66ch}
.muted,.note{color:var(--muted)}
.note{font-size:.86rem;line-height:1.5;max-width:88ch}
.num{font-variant-numeric:tabular-nums}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:1px;background:var(--grid);
border:1px solid var(--grid);border-radius:10px;overflow:hidden;margin:22px 0 0;padding:0}
.facts div{background:var(--card);padding:12px 16px}
.facts dt{font-size:.78rem;color:var(--muted)}
.facts dd{margin:0;font-size:1.15rem;font-weight:600;font-variant-numeric:tabular-nums}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:22px 0 0;font-size:.92rem}
.card{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:20px 22px;margin:14px 0}
.findings{padding-left:1.1em;margin:0}
.findings li{margin:0 0 10px;max-width:78ch}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:16px}
.pair .card{margin:0;min-width:0}
.glossary{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:20px 34px;margin:0}
.glossary dt{font-weight:600}
.glossary dd{margin:2px 0 0;font-size:.93rem;color:var(--muted)}
.about{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:10px 0 0;font-size:.93rem}
.about dt{color:var(--muted)}
.about dd{margin:0;min-width:0;max-width:80ch}
.scroll{overflow-x:auto;margin:0 -22px;padding:0 22px;scrollbar-width:thin}
.t{display:grid;grid-template-columns:var(--cols);font-size:.9rem;min-width:max-content;width:100%}
.t thead,.t tbody{display:contents}
.t tr{display:grid;grid-template-columns:subgrid;grid-column:1/-1;align-items:center;
border-bottom:1px solid var(--grid)}
.t thead tr{order:-1;border-bottom:1.5px solid var(--rule);align-items:end}
.t th,.t td{padding:7px 14px 7px 0;text-align:right;font-variant-numeric:tabular-nums;font-weight:400}
.t th:last-child,.t td:last-child{padding-right:0}
.t th.l,.t td.l{text-align:left}
.t tbody th{position:sticky;left:-22px;background:var(--card);padding-left:22px;margin-left:-22px;z-index:1;text-align:left}
.t thead th{font-size:.8rem;color:var(--muted);line-height:1.3;vertical-align:bottom}
.t tr.base{background:var(--wash)}.t tr.base th{background:var(--wash)}
.t label{cursor:pointer;display:inline-block;border-radius:4px}
.t label:hover{color:var(--ink)}
.t input{position:absolute;opacity:0;pointer-events:none}
.t label:has(input:checked){color:var(--accent);font-weight:600}
.t label:has(input:checked)::after{content:" \\25BE"}
.t label:has(input:focus-visible){outline:2px solid var(--accent);outline-offset:2px}
.name{display:flex;gap:8px;align-items:center;font-weight:600;white-space:nowrap}
.methods{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:8px 34px;margin:0}
.methods div{display:grid;grid-template-columns:14px 1fr;gap:0 9px;align-items:center}
.methods dt{font-weight:600;font-size:.93rem}.methods dd{grid-column:2;margin:0;font-size:.88rem;color:var(--muted)}
.stack{display:inline-grid;justify-items:end;gap:1px}
.bar{display:inline-block;width:44px;height:7px;border-radius:4px;background:var(--grid);overflow:hidden;margin-left:8px;
vertical-align:middle}
.bar i{display:block;height:100%;background:var(--c5)}
svg{display:block}
svg text{fill:var(--ink);font-family:inherit}
svg text.muted{fill:var(--muted)}svg text.strong{font-weight:600}
svg text.halo{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
svg text.num{font-variant-numeric:tabular-nums}
.chart{width:100%;max-width:580px;height:auto;margin:0 auto}
.cell{width:150px;height:16px}
.glyph{width:14px;height:14px;flex:none}
.grid{stroke:var(--grid)}.rule{stroke:var(--rule)}
.zero{stroke:var(--ink);stroke-width:1.2}
.stroke{fill:none;stroke-width:2;stroke-linecap:round;stroke-linejoin:round}
.wide{stroke-width:3.4;opacity:.55}.curve{stroke-width:1.8;opacity:.9}
.hollow{fill:var(--card);stroke-width:1.3}
.fill{stroke:var(--card);stroke-width:1}
.c1.fill{fill:var(--c1)}.c2.fill{fill:var(--c2)}.c3.fill{fill:var(--c3)}.c4.fill{fill:var(--c4)}
.c5.fill{fill:var(--c5)}.c6.fill{fill:var(--c6)}.c7.fill{fill:var(--c7)}
.c1.stroke,.c1.hollow{stroke:var(--c1)}.c2.stroke,.c2.hollow{stroke:var(--c2)}
.c3.stroke,.c3.hollow{stroke:var(--c3)}.c4.stroke,.c4.hollow{stroke:var(--c4)}
.c5.stroke,.c5.hollow{stroke:var(--c5)}.c6.stroke,.c6.hollow{stroke:var(--c6)}
.c7.stroke,.c7.hollow{stroke:var(--c7)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.84rem;margin:0 0 12px;padding:0;list-style:none}
.legend li{display:flex;gap:6px;align-items:center}
.checks{list-style:none;margin:0;padding:0;font-size:.93rem}
.checks li{display:grid;grid-template-columns:20px 1fr;gap:8px;padding:4px 0}
.ok{color:var(--good);font-weight:700}.no{color:var(--bad);font-weight:700}
.shots{display:grid;grid-template-columns:minmax(120px,max-content) minmax(0,1fr);gap:7px 16px;align-items:center;font-size:.88rem}
.shots img{width:100%;max-width:560px;image-rendering:pixelated;border-radius:3px;display:block}
.shots .pairhead{grid-column:1/-1;color:var(--muted);font-size:.84rem;margin:8px 0 0}
.fail{border-left:3px solid var(--bad);background:var(--badwash);border-radius:0 8px 8px 0;padding:10px 14px;margin:10px 0}
.fail pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:4px 0 0;font:.84rem/1.45 ui-monospace,Menlo,Consolas,monospace}
pre.cmd{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:12px 14px;overflow-x:auto;
font:.86rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:6px 0 12px}
.badge{font-size:.74rem;border:1px solid var(--rule);border-radius:99px;padding:1px 8px;color:var(--muted);
white-space:nowrap;font-weight:400}
footer{margin-top:56px;border-top:1px solid var(--grid);padding-top:14px;font-size:.86rem;color:var(--muted)}
@media (max-width:600px){main{padding:0 16px 48px}h1{font-size:1.6rem}h2{margin-top:44px}header.top{padding-top:28px}
.card{padding:16px}.scroll{margin:0 -16px;padding:0 16px}.t tbody th{left:-16px;padding-left:16px;margin-left:-16px}
.about{grid-template-columns:1fr;gap:0}.about dd{margin-bottom:6px}
.shots{grid-template-columns:1fr;gap:3px}.shots img{margin-bottom:8px}}
@media print{:root{color-scheme:light}body{background:#fff;font-size:11px}main{max-width:none;padding:0}
nav,.t label::after{display:none!important}.card{break-inside:avoid;border-color:#ccc}h2{break-before:auto}
h2,h3{break-after:avoid}.scroll{overflow:visible}.facts{border-color:#ccc}a{color:inherit}.t{min-width:0}}
"""


class Column:
    """One column of a sortable table.

    Args:
        title: Its heading.
        cells: HTML of its cells.
        ranks: Place of every row when sorted by this column; None where sorting makes no sense.
        left: Whether it is set to the left.
    """

    def __init__(
        self,
        title: str,
        cells: Sequence[str],
        ranks: Sequence[int] | None = None,
        *,
        left: bool = False,
    ) -> None:
        self.title = title
        self.cells = list(cells)
        self.ranks = None if ranks is None else list(ranks)
        self.left = left


def sortable(
    name: str, caption: str, columns: Sequence[Column], classes: Sequence[str], chosen: int = 0
) -> str:
    """Return a table whose headers sort it, without a script.

    Args:
        name: Unique in the page.
        caption: What the table holds, for those who do not see it.
        columns: The first one names the rows.
        classes: CSS class of every row.
        chosen: The column by which it is sorted at first.
    """
    rules, heads = [], []
    for i, column in enumerate(columns):
        side = ' class="l"' if column.left else ""
        if column.ranks is None:
            head = escape(column.title)
        else:
            checked = " checked" if i == chosen else ""
            head = (
                f'<label><input type="radio" name="{name}" class="k{i}"{checked}>'
                f"{escape(column.title)}</label>"
            )
            rules.append(f"#{name}:has(.k{i}:checked) tbody tr{{order:var(--k{i})}}")
        heads.append(f'<th role="columnheader" scope="col"{side}>{head}</th>')
    rows = []
    for j, cls in enumerate(classes):
        order = ";".join(
            f"--k{i}:{column.ranks[j]}" for i, column in enumerate(columns) if column.ranks
        )
        cells = [f'<th role="rowheader" scope="row">{columns[0].cells[j]}</th>']
        cells += [
            f'<td role="cell"{" class=l" if column.left else ""}>{column.cells[j]}</td>'
            for column in columns[1:]
        ]
        rows.append(f'<tr role="row" class="{cls}" style="{order}">{"".join(cells)}</tr>')
    widths = " ".join(["minmax(max-content,1fr)", *["max-content"] * (len(columns) - 1)])
    return (
        f"<style>{''.join(rules)}</style>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="t" id="{name}" role="table" aria-label="{escape(caption)}"'
        f' style="--cols:{widths}"><thead role="rowgroup"><tr role="row">{"".join(heads)}</tr>'
        f'</thead><tbody role="rowgroup">{"".join(rows)}</tbody></table></div>'
    )


def page(title: str, body: str) -> str:
    """Return a whole HTML document around a body."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
