"""README.md and docs/ show what is there: links lead to files and headings, code runs, commands parse."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

from hrbp.cli.main import make_parser
from hrbp.models import build

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
SCREEN = 60  # lines of a section of the README


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, place = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if place:
            assert place in [anchor(h) for h in re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)], link


def test_the_readme_leads_to_every_page():
    linked = {(ROOT / link).resolve() for link in LINK.findall((ROOT / "README.md").read_text()) if "://" not in link}
    assert {page.resolve() for page in PAGES[1:]} <= linked


def test_sections_of_the_readme_fit_a_screen():
    for section in re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.MULTILINE):
        assert len(section.splitlines()) <= SCREEN, section[:40]
    assert len((ROOT / "README.md").read_text().splitlines()) < 160


def test_commands_that_are_shown_can_be_given():
    seen = 0
    for page in PAGES:
        for line in (line for block in blocks(page, "bash") for line in block.splitlines()):
            words = shlex.split(line, comments=True)
            for start in (["hrbp"], ["-m", "hrbp"]):
                at = next((i for i in range(len(words)) if words[i : i + len(start)] == start), None)
                if at is not None:
                    make_parser().parse_args(words[at + len(start) :])
                    seen += 1
    assert seen >= 12


@pytest.fixture
def torchvision(monkeypatch):
    """A torchvision with a ResNet-18 of this library."""
    module = types.ModuleType("torchvision")
    module.models = types.SimpleNamespace(resnet18=lambda weights: build("resnet18", classes=1000, image_size=224))
    monkeypatch.setitem(sys.modules, "torchvision", module)


def test_the_pages_have_code():
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page, torchvision, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for code in blocks(page, "python"):
        if "export_onnx" in code:
            monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: None)
        scope = {"batches": [(torch.randn(2, 3, 64, 64), torch.tensor([1, 2]))]}
        exec(compile(code, str(page), "exec"), scope)
