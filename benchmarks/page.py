"""Page: the frame of a report, one HTML file that loads nothing.

Tables sort without a script: each header is a radio button, and a checked one orders the rows of
its grid through custom properties that the rows carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

__all__ = ["Column", "page", "sortable"]


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
    style = files("benchmarks").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
