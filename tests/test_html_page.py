"""Pages for a browser: what is in them, and in a real browser that their tables sort."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import processes
from hrbp.reports.html_page import table_lines, write_page
from hrbp.study.page import Parts, write_study

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
PNG = b"\x89PNG\r\n\x1a\n"


class Checked(HTMLParser):
    """Every tag that is opened is closed, in order; notes what a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.loads += [
            value for name, value in attrs if name in ("src", "srcset") or (tag == "link" and name == "href")
        ]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page(tmp_path: Path) -> Path:
    """Of a study."""
    rows = [
        ["dense", "0", "80.10", "1.00x"],
        ["hrbp++ <a|b>", "as 90", "9.50 +- 1.00", "-"],
        ["narrow", "90", "diverged", "0.5x"],
    ]
    parts = Parts(
        "two & three", ["", "sparsity %", "accuracy %", "step"], rows, ["a note"], ["A **sentence** of `code`."]
    )
    (tmp_path / "study.png").write_bytes(PNG)
    results = {"settings": {"model": "resnet8", "seeds": [0, 1]}, "machine": "here"}
    return write_study(tmp_path, parts, [results], "study.png", ["hrbp", "study", "--out", "a b"])


def test_a_page_is_whole_and_loads_nothing(tmp_path):
    text = page(tmp_path).read_text()
    checked = Checked(text)
    assert all(what.startswith("data:image/png;base64,") for what in checked.loads)
    assert len(checked.loads) == 1
    assert "<strong>sentence</strong> of <code>code</code>" in text
    assert "two &amp; three" in text
    assert "hrbp++ &lt;a|b&gt;" in text
    assert "hrbp study --out 'a b'" in "".join(checked.texts)
    assert "https://" not in text


def test_what_a_page_understands(tmp_path):
    lines = [
        "# One",
        "",
        "a paragraph",
        "on two lines",
        "- first",
        "  goes on",
        "- [second](x.md)",
        "",
        "```",
        "<code>",
        "```",
    ]
    write_page(tmp_path / "page.html", "t", [*lines, *table_lines(["a", "b"], [["1", "x|y"]]), "1. only"])
    text = (tmp_path / "page.html").read_text()
    Checked(text)
    assert "<p>a paragraph on two lines</p>" in text
    assert '<ul><li>first goes on</li><li><a href="x.md">second</a></li></ul>' in text
    assert "<pre><code>&lt;code&gt;</code></pre>" in text
    assert "<td>1</td><td>x|y</td>" in text
    assert "<ol><li>only</li></ol>" in text


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no chromium or google-chrome on the path")
@pytest.mark.parametrize(
    ("column", "clicks", "order"),
    [
        (0, 1, ["dense", "hrbp++", "narrow"]),
        (0, 2, ["narrow", "hrbp++", "dense"]),
        (1, 2, ["hrbp++", "narrow", "dense"]),
        (3, 1, ["narrow", "dense", "hrbp++"]),
        (3, 2, ["dense", "narrow", "hrbp++"]),
    ],
)
def test_a_browser_sorts_by_the_column_that_is_clicked(column, clicks, order, tmp_path):
    file = page(tmp_path)
    click = f'document.querySelectorAll("table")[0].querySelectorAll("th button")[{column}].click();'
    file.write_text(file.read_text().replace("</body>", f"<script>{click * clicks}</script></body>"))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}", "--dump-dom",
        file.as_uri(),
    ]  # fmt: skip
    done = processes.run(command)
    assert done.returncode == 0, done.stderr
    body = re.search(r"<tbody>(.*?)</tbody>", done.stdout, re.DOTALL)
    assert [name.split()[0] for name in re.findall(r"<tr><td>(.*?)</td>", body[1])] == order
    sort = "ascending" if clicks == 1 else "descending"
    assert len(re.findall(f'aria-sort="{sort}"', done.stdout)) == 1
