"""The page of a study: one HTML file with its answer, table, figure, settings, and the command that repeats it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..columns import columns
from ..reports.html_page import table_lines, write_page

PAGE = "study.html"


@dataclass(frozen=True)
class Parts:
    """What is shown of a study: in a terminal one below the other, and on a page."""

    title: str
    head: list[str]
    lines: list[list[str]]
    notes: list[str]
    sentences: list[str]
    further: Sequence[Parts] = ()  # more tables, below the first
    figure: str = ""  # file name of that of such a further table

    def text(self) -> str:
        """As a terminal shows it."""
        shown = [self.title, "", columns([self.head, *self.lines]), "", *self.notes, "", *self.sentences]
        return "\n\n".join(["\n".join(shown).rstrip(), *(each.text() for each in self.further)])


def write_study(
    out: Path, parts: Parts, studies: Sequence[Mapping[str, Any]], figure: str, command: Sequence[str]
) -> Path:
    """Write the page of a study, or of several in one table, into a folder; returns its path.

    Args:
        out: the folder.
        parts: what is shown.
        studies: contents of results.json.
        figure: name of the figure in the folder; one that is not there is left out.
        command: the words that repeat the study.
    """
    text = ["# Study: " + parts.title, "", *(f"- {sentence}" for sentence in parts.sentences), "", "## Table", ""]
    text += [
        "A click on a title sorts.",
        "",
        *table_lines(parts.head, parts.lines),
        *(f"- {n}" for n in parts.notes),
        "",
    ]
    for each in parts.further:
        text += [f"## {each.title}", "", *table_lines(each.head, each.lines), *(f"- {n}" for n in each.notes), ""]
        text += [*(f"- {sentence}" for sentence in each.sentences), ""]
        if each.figure and (out / each.figure).exists():
            text += [f"![{each.title}]({each.figure})", ""]
    if (out / figure).exists():
        text += ["## Figures", "", f"![accuracy against sparsity, size and time]({figure})", ""]
    for results in studies:
        settings = [[name, _shown(value)] for name, value in results["settings"].items()]
        of = f" of {results['settings']['model']} on {results['settings']['data']}" if len(studies) > 1 else ""
        text += [f"## Settings{of}", "", f"Measured on {results['machine']}.", ""]
        text += table_lines(["setting", "value"], settings)
    text += ["## Repeat it", "", "```", shlex.join(command), "```"]
    write_page(out / PAGE, parts.title, text)
    return out / PAGE


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text.replace('`', '')}`"
