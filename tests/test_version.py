"""One version everywhere."""

import re
from pathlib import Path

import pytest

import blocksparse
import hrbp
from hrbp.cli.main import main

ROOT = Path(__file__).parent.parent


def test_one_version_in_both_packages_and_the_citation(capsys):
    assert hrbp.__version__ == blocksparse.__version__
    assert f"\nversion: {blocksparse.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert "\nversion =" not in (ROOT / "pyproject.toml").read_text().partition("[tool")[0]
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith(f"hrbp {blocksparse.__version__}, PyTorch ")


def test_the_packages_name_is_the_one_to_cite():
    name = re.search(r'^name = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert name is not None
    assert name[1] in (ROOT / "CITATION.cff").read_text()
