"""The house: imports run one way, and importing the library loads no backend and no GPU."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import processes

ROOT = Path(__file__).parent.parent

# What each file of blocksparse may import from the package itself (type-only imports count too).
ALLOWED = {
    "geometry": set(),
    "index": set(),
    "layout": set(),
    "pattern_checks": set(),
    "bsr": {"pattern_checks"},
    "cells": set(),
    "groups": {"index"},
    "pattern": {"bsr", "cells", "groups", "pattern_checks", "index"},
    "reference": {"geometry", "pattern"},
    "kernels/__init__": set(),
    "kernels/gpus": set(),
    "kernels/gpu_cost": {"geometry", "kernels/gpus"},
    "kernels/counted": set(),
    "kernels/measured": {"geometry", "kernels/counted"},
    "kernels/tiles": {"geometry", "index", "kernels/counted", "kernels/gpu_cost", "kernels/gpus"},
    "kernels/slots": {"geometry", "kernels/gpus", "kernels/tiles"},
    "kernels/slot_cost": {"geometry", "kernels/counted", "kernels/gpu_cost", "kernels/gpus", "kernels/slots"},
    "kernels/machine": set(),
    "kernels/cost_constants": {"kernels/machine"},
    "kernels/cost": {"geometry", "layout", "kernels/cost_constants"},
    "kernels/aten_conv": {"geometry", "layout"},
    "kernels/cpu_build": {"kernels/machine"},
    "kernels/cpu": {"geometry", "index", "layout", "kernels/cpu_build"},
    "kernels/cpu_norm": {"layout", "kernels/cpu", "kernels/cpu_build"},
    "kernels/torch_conv": {"geometry", "groups", "index", "layout", "kernels/aten_conv", "kernels/triton_bank"},
    "kernels/norm_cut": set(),
    "kernels/norm_cost": {"kernels/counted", "kernels/gpu_cost", "kernels/gpus", "kernels/norm_cut"},
    "kernels/triton_norm": {
        "layout",
        "kernels/gpus",
        "kernels/norm_cut",
        "kernels/triton_conv",
        "kernels/triton_norm_kernels",
    },
    "kernels/triton_norm_kernels": {"kernels/triton_gather"},
    "kernels/triton_gather": set(),
    "kernels/triton_kernels": {"kernels/triton_gather"},
    "kernels/triton_wgrad": {"kernels/triton_gather"},
    "kernels/triton_bank": {"geometry", "index", "layout", "kernels/triton_conv"},
    "kernels/triton_conv": {
        "geometry",
        "index",
        "layout",
        "kernels/tiles",
        "kernels/triton_gather",
        "kernels/triton_kernels",
        "kernels/triton_wgrad",
    },
    "kernels/cupy_conv": {"geometry", "index", "layout", "kernels/slots"},
    "backends/__init__": {
        "geometry",
        "index",
        "layout",
        "kernels/cost",
        "kernels/gpu_cost",
        "kernels/gpus",
        "kernels/measured",
    },
    "backends/torch": {"backends/__init__", "index", "layout", "kernels/gpu_cost", "kernels/torch_conv"},
    "backends/cpu": {"backends/__init__", "index", "layout", "kernels/cost", "kernels/cpu"},
    "backends/triton": {
        "backends/__init__",
        "index",
        "layout",
        "kernels/gpu_cost",
        "kernels/tiles",
        "kernels/triton_conv",
    },
    "backends/cupy": {
        "backends/__init__",
        "index",
        "layout",
        "kernels/gpu_cost",
        "kernels/gpus",
        "kernels/slots",
        "kernels/slot_cost",
        "kernels/cupy_conv",
    },
    "converted": {"backends/__init__", "geometry", "index", "layout", "kernels/gpu_cost"},
    "plan": {
        "backends/__init__",
        "converted",
        "geometry",
        "index",
        "layout",
        "pattern",
        "pattern_checks",
        "kernels/cost",
        "kernels/gpu_cost",
        "kernels/gpus",
    },
    "product_checks": {"geometry"},
    "batching": {"product_checks"},
    "derivatives": set(),
    "ops": {
        "batching",
        "derivatives",
        "pattern_checks",
        "product_checks",
        "geometry",
        "index",
        "layout",
        "plan",
        "kernels/cost",
    },
    "functional": {"geometry", "layout", "ops", "pattern", "pattern_checks"},
    "carry": {"pattern"},
    "dense_view": set(),
    "memory": set(),
    "indexed": set(),
    "version": set(),
    "bsr_module": {"carry", "dense_view", "geometry", "indexed", "pattern", "pattern_checks"},
    "bsr_conv": {"bsr_module", "carry", "geometry", "pattern"},
    "norm": {"derivatives", "kernels/cpu_norm", "kernels/triton_norm", "layout"},
    "modules": {"bsr_conv", "bsr_module", "carry", "functional", "geometry", "pattern"},
    "conv1d": {"bsr_conv", "functional", "geometry", "pattern"},
    "__init__": {
        "bsr_module",
        "carry",
        "conv1d",
        "reference",
        "functional",
        "geometry",
        "indexed",
        "layout",
        "memory",
        "modules",
        "norm",
        "pattern",
        "plan",
        "version",
    },
}

# The rooms of hrbp and the files in each, in order: a file imports files before it, never a room as a whole.
ROOMS: dict[str, list[str]] = {
    "": [
        "arguments", "columns", "density", "files", "networks", "models", "progress", "registry", "wrappers",
        "saliencies",
    ],
    "structures": [
        "grouping", "selection", "base", "regrouping", "elementwise", "grains", "groups", "mixed", "n_m",
        "transposable", "recognise", "registry",
    ],
    "layers": [
        "twin", "batch_last", "dense_conv", "semi_structured", "semi_training", "stored", "record", "gradients",
        "in_groups", "master", "view",
        "fused", "fused_norm",
    ],
    "methods": [
        "agreement", "averages", "decay", "dense_grad", "drift", "options", "base", "arriving", "exchanging",
        "following", "static", "set", "rigl", "hrbp", "gmp", "ste", "sr_ste", "subp", "registry", "evolver",
    ],
    "surgery": [
        "carry", "dataflow", "fresh", "candidates", "decision", "conversion", "prune", "semi_training",
        "folding", "symbols", "network_graph", "fusion", "training_fusion", "innermost",
    ],
    "formats": ["packed", "sealed", "weights", "pretrained", "model", "onnx_file"],
    "data": ["sets", "batches", "cifar", "digits", "folders", "generated", "loading"],
    "reports": [
        "dgrad", "health", "score", "stream", "mask_report", "model_report", "model_summary", "scnn", "network_costs",
        "picture", "study_picture", "worth_picture", "sad_picture", "sensitivity_picture", "html_page",
    ],
    "training": [
        "checkpoint", "devices", "log", "older", "result", "settings", "signals", "fused", "optimizer", "continuing",
        "trainer", "run",
    ],
    "study": [
        "folder", "spread", "rival", "timing", "variants", "page", "regularity_table", "study_table", "worth_table",
        "sr_ste_table", "ablation_table", "equal_accuracy", "sensitivity_table", "sensitivity", "runner", "regularity",
        "jobs", "study", "sr_ste", "ablation", "worth",
    ],
    "cli": ["parsing", "ending", "info", "regroup", "worth", "sr_ste", "ablation", "study", "train", "main"],
}  # fmt: skip
ORDER = [f"{room}/{file}" if room else file for room, files in ROOMS.items() for file in files]
LONGEST = 400  # lines of a file; a longer one says in its head why


def imported_files(path: Path, package_root: Path = ROOT / "blocksparse") -> set[str]:
    """Files of the package that `path` imports, at the top or inside a function."""
    package = path.parent.relative_to(package_root)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package
            for _ in range(node.level - 1):
                base = base.parent
            module = base / (node.module or "").replace(".", "/")
            if (package_root / module / "__init__.py").exists() and module != Path():
                own = module / "__init__"
            else:
                own = module
            for alias in node.names:
                whole = module / alias.name
                if (package_root / whole / "__init__.py").exists():
                    whole /= "__init__"
                inside = (package_root / whole).with_suffix(".py").exists()
                found.add((whole if inside else own).as_posix())
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found |= {f"absolute {name}" for name in names if name.split(".")[0] == "blocksparse"}
    return found


def test_every_file_has_its_place():
    files = {
        p.relative_to(ROOT / "blocksparse").with_suffix("").as_posix() for p in (ROOT / "blocksparse").rglob("*.py")
    }
    assert files == set(ALLOWED)


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_run_one_way(name):
    assert imported_files(ROOT / "blocksparse" / f"{name}.py") <= ALLOWED[name]


def files_of_hrbp() -> dict[str, Path]:
    return {p.relative_to(ROOT / "hrbp").with_suffix("").as_posix(): p for p in (ROOT / "hrbp").rglob("*.py")}


def hrbp_imports(name: str) -> set[str]:
    return {f for f in imported_files(ROOT / "hrbp" / f"{name}.py", ROOT / "hrbp") if not f.startswith("absolute ")}


def test_every_file_of_hrbp_has_its_place():
    doors = {f"{room}/__init__" for room in ROOMS if room} | {"__init__", "__main__"}
    assert set(files_of_hrbp()) == set(ORDER) | doors
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_hrbp_imports_run_one_way(name):
    assert hrbp_imports(name) <= set(ORDER[: ORDER.index(name)])


def test_a_room_opens_its_own_files_only():
    for room in ROOMS:
        if room:
            assert hrbp_imports(f"{room}/__init__") <= {f"{room}/{file}" for file in ROOMS[room]}
    assert hrbp_imports("__init__") <= {*ORDER, "data/__init__"}
    assert hrbp_imports("__main__") == {"cli/main"}


def test_no_module_has_the_name_of_a_public_function():
    """Or what `import hrbp.train` and `hrbp.train` mean would depend on who came first."""
    import importlib

    for room, files in ROOMS.items():
        package = importlib.import_module(f"hrbp.{room}" if room else "hrbp")
        modules = {*files, *(ROOMS if not room else ())}
        for name in modules & set(getattr(package, "__all__", ())):
            assert getattr(package, name) is sys.modules[f"{package.__name__}.{name}"], (room, name)


def test_a_long_file_says_why():
    suffixes = (".py", ".cu", ".cpp", ".h")
    files = [f for top in ("blocksparse", "hrbp") for f in (ROOT / top).rglob("*") if f.suffix in suffixes]
    assert len(files) > 100
    for path in files:
        text = path.read_text()
        head = ast.get_docstring(ast.parse(text)) or "" if path.suffix == ".py" else text[:2000]
        reason = f"More than {LONGEST} lines" in head
        assert reason == (len(text.splitlines()) > LONGEST), path


def test_hrbp_uses_public_names_only():
    import blocksparse

    for path in (ROOT / "hrbp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("blocksparse"):
                assert node.module == "blocksparse", path
                assert {alias.name for alias in node.names} <= set(blocksparse.__all__), path
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("blocksparse.") for alias in node.names), path


def test_blocksparse_knows_nothing_of_pruning():
    for path in (ROOT / "blocksparse").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not any(name.split(".")[0] == "hrbp" for name in names), path


# The rooms of bench/ and what each may import of it; "": the scripts, which do not import each other.
BENCH = {
    "counts": {"counts"},
    "shared": {"shared"},
    "layers": {"layers", "shared"},
    "pages": {"pages", "layers", "shared"},
    "stages": {"stages", "layers", "shared"},
    "": {"counts", "layers", "pages", "shared", "stages"},
}


def absolute_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_benchmarks_are_scripts_over_shared_parts():
    for room, allowed in BENCH.items():
        for path in (ROOT / "bench" / room).glob("*.py"):
            mine = {name.split(".")[1] for name in absolute_imports(path) if name.split(".")[0] == "bench"}
            assert mine <= allowed, path
    assert {p.name for p in (ROOT / "bench").iterdir() if (p / "__init__.py").exists()} == set(BENCH) - {""}
    for package in ("blocksparse", "hrbp"):
        for path in (ROOT / package).rglob("*.py"):
            assert not any(name.split(".")[0] == "bench" for name in absolute_imports(path)), path


def test_importing_loads_no_backend():
    code = """if True:
        import sys, torch
        before = set(sys.modules)
        import blocksparse, hrbp
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        assert not new & {"triton", "cupy", "scipy", "matplotlib"}, new
        assert not torch.cuda.is_initialized()
        assert not any("triton_conv" in name or "cupy_conv" in name for name in sys.modules)
        assert not any(name.startswith(("blocksparse.backends.", "blocksparse.kernels.cpu")) for name in sys.modules)
    """
    result = processes.run([sys.executable, "-c", code], cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_everything_is_packaged():
    """An editable install is a path, and would not show what a wheel lacks."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for top in ("blocksparse", "hrbp"):
        folders = {f.parent.relative_to(ROOT) for f in (ROOT / top).rglob("*.py")}
        assert {".".join(f.parts) for f in folders} == {p for p in settings["packages"] if p.split(".")[0] == top}
        data = {f for pattern in settings["package-data"][top] for f in (ROOT / top).glob(pattern)}
        files = {f for f in (ROOT / top).rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")}
        assert files == data
        assert ROOT / top / "py.typed" in data


def test_public_names_are_documented():
    import blocksparse

    for name in blocksparse.__all__:
        assert getattr(blocksparse, name).__doc__, name
