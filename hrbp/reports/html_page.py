"""A page of one file for a browser, from Markdown: tables that sort, pictures inside, nothing that is loaded."""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ..files import whole_file

KINDS = {".png": "image/png", ".svg": "image/svg+xml"}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; } h3 { font-size: 1.05rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, td:has(code) { text-align: left; }
th, td:has(code) { white-space: normal; } th { vertical-align: bottom; } td code { overflow-wrap: anywhere; }
th button { font: inherit; font-weight: 600; border: 0; background: none; padding: 0; cursor: pointer; color: inherit; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
tbody tr:hover { background: #f4f6fa; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; } code { font-size: .92em; }
img { max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #e6e6e6; } th, td { border-color: #3a3d44; } pre { background: #22252b; }
  tbody tr:hover { background: #22252b; } a { color: #8ab4f8; } img { background: #fff; }
}
"""

# A click on a title sorts the rows by that column: by its first number where all cells have one or are empty, else by
# text; a second click turns the order around. Cells without a number come last.
SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const th = button.parentElement, table = th.closest("table"), body = table.tBodies[0];
    const column = [...th.parentElement.children].indexOf(th);
    const down = th.getAttribute("aria-sort") === "ascending";
    const text = row => row.cells[column].textContent.trim();
    const number = row => { const m = text(row).replace(/,/g, "").match(/-?\\d+(\\.\\d+)?/); return m ? +m[0] : NaN; };
    const rows = [...body.rows], given = rows.filter(row => !["", "-", "n/a"].includes(text(row)));
    const numeric = given.every(row => !isNaN(number(row)) && /^[-+<>\\d]|^as /.test(text(row)));
    const none = row => numeric ? isNaN(number(row)) : text(row) === "";
    rows.sort((a, b) => none(a) - none(b) || (none(a) ? 0 : (down ? -1 : 1) *
      (numeric ? number(a) - number(b) : text(a).localeCompare(text(b)))));
    for (const other of th.parentElement.children) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  });
}
"""


def write_page(path: str | os.PathLike[str], title: str, markdown: Sequence[str]) -> None:
    """Write one self-contained HTML page, whole or not at all.

    Args:
        path: of the page.
        title: of the window.
        markdown: lines. Understood are headings, paragraphs, lists, tables, fenced code, pictures on a line of their
            own (files beside the page: they go into it), and within a line code, bold, and links.

    Raises:
        OSError: a picture cannot be read, or the page not written.
    """
    body = "\n".join(_blocks(list(markdown), Path(path).parent))
    text = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
    with whole_file(path) as file:
        file.write(text.encode())


def table_lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of Markdown, and an empty one."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *body)]
    return [f"| {' | '.join(row)} |" for row in rows] + [""]


def _blocks(lines: list[str], folder: Path) -> list[str]:
    """HTML of a page's parts."""
    out: list[str] = []
    while lines:
        line = lines.pop(0)
        if not line.strip():
            continue
        if line.startswith("```"):
            code = _taken(lines, lambda text: not text.startswith("```"))
            lines[:1] = []
            out.append(f"<pre><code>{html.escape(chr(10).join(code))}</code></pre>")
        elif found := re.match(r"(#+) (.*)", line):
            level = min(len(found[1]), 6)
            out.append(f"<h{level}>{_inline(found[2])}</h{level}>")
        elif found := re.fullmatch(r"!\[(.*?)\]\((.*?)\)", line.strip()):
            out.append(_picture(folder / found[2], found[1]))
        elif line.startswith("|"):
            out.append(_table([line, *_taken(lines, lambda text: text.startswith("|"))]))
        elif re.match(r"- |\d+\. ", line):
            items = [line, *_taken(lines, lambda text: bool(re.match(r"- |\d+\. |  ", text)))]
            joined: list[str] = []
            for item in items:
                if item.startswith("  "):
                    joined[-1] += f" {item.strip()}"
                else:
                    joined.append(re.sub(r"^(- |\d+\. )", "", item))
            kind = "ul" if line.startswith("- ") else "ol"
            out.append(f"<{kind}>{''.join(f'<li>{_inline(item)}</li>' for item in joined)}</{kind}>")
        else:
            words = [line, *_taken(lines, lambda text: bool(text.strip()) and not re.match(r"\||#|- |```|!\[", text))]
            out.append(f"<p>{_inline(' '.join(word.strip() for word in words))}</p>")
    return out


def _taken(lines: list[str], belongs: Callable[[str], bool]) -> list[str]:
    """The lines at the beginning that belong to a part; they are removed."""
    taken = []
    while lines and belongs(lines[0]):
        taken.append(lines.pop(0))
    return taken


def _table(lines: list[str]) -> str:
    rows = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        for line in lines
        if not re.fullmatch(r"[|\-: ]+", line)
    ]
    head, *body = rows
    titles = "".join(
        f'<th scope="col"><button type="button">{_inline(cell) or "&nbsp;"}</button></th>' for cell in head
    )
    cells = "\n".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in body)
    return f'<div class="wide"><table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{cells}\n</tbody>\n</table></div>'


def _picture(file: Path, words: str) -> str:
    content = base64.b64encode(file.read_bytes()).decode()
    return f'<p><img alt="{html.escape(words)}" src="data:{KINDS[file.suffix.lower()]};base64,{content}"></p>'


def _inline(text: str) -> str:
    """Code, bold and links within a line."""
    parts = re.split(r"(`[^`]*`)", text)
    for i, part in enumerate(parts):
        if part.startswith("`") and len(part) > 1:
            parts[i] = f"<code>{html.escape(part[1:-1])}</code>"
        else:
            part = html.escape(part, quote=False)
            part = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", part)
            parts[i] = re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', part)
    return "".join(parts)
