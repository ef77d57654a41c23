"""CONTRIBUTING.md shows what is there: its code stands in examples that other tests run, its links lead to files."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) >= 3
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_code_stands_in_an_example():
    examples = [path.read_text() for path in (ROOT / "tests" / "examples_of_extension").rglob("*.py")]
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    for block in blocks:
        assert any(block in example for example in examples)


def test_rooms_exist():
    tree = re.search(r"```\n(blocksparse/ .*?)```", TEXT, re.DOTALL)
    assert tree is not None
    home = ROOT
    for line in tree[1].splitlines():
        names = [name.strip(",/") for name in re.split(r"\s{2,}", line.strip())[0].split()]
        if not line.startswith(" "):
            home = ROOT / names[0]
        elif not line.startswith("   "):
            assert [name for name in names if not ((home / name).is_dir() or (home / f"{name}.py").is_file())] == []
        assert home.is_dir()
