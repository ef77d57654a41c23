"""installed.py DIST SOURCE: wheel and sdist in DIST hold every file of the packages, and what is installed works.

Run in an environment in which the wheel is installed, from an empty folder: nothing of the checkout is on the path.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

dist, source = (Path(word).resolve() for word in sys.argv[1:])
tracked = subprocess.run(
    ["git", "ls-files", "blocksparse", "hrbp"], cwd=source, check=True, capture_output=True, text=True
)
needed = set(tracked.stdout.splitlines())
assert {".cu", ".cpp", ".h", ".json", ".typed", ".py"} == {Path(name).suffix for name in needed}
(wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
in_wheel = set(zipfile.ZipFile(wheel).namelist())
with tarfile.open(sdist) as archive:
    in_sdist = {name.partition("/")[2] for name in archive.getnames()}
for name, held in (("wheel", in_wheel), ("sdist", in_sdist)):
    assert not (missing := sorted(needed - held)), f"the {name} lacks {missing}"
others = {name.partition("/")[0] for name in in_wheel} - {"blocksparse", "hrbp"}
assert all(name.endswith(".dist-info") for name in others), f"the wheel holds {others} besides"
assert not any(Path.cwd().iterdir()), "the folder is not empty"

import torch  # noqa: E402

import blocksparse as bs  # noqa: E402
import hrbp  # noqa: E402

assert not Path(bs.__file__).is_relative_to(source), bs.__file__
assert hrbp.__version__ == bs.__version__
assert f"-{bs.__version__}-" in wheel.name
assert bs.available_backends()["cpu"] is None, bs.available_backends()["cpu"]  # compiles the C++ that the wheel holds
pattern = bs.BSRPattern.random((16, 16, 3, 3), (8, 1), 0.3)
layer = bs.BSRConv2d(pattern, padding="same", backend="cpu")
x = torch.randn(2, 16, 8, 8)
torch.testing.assert_close(layer(x), layer.to_dense()(x))
layer(x).sum().backward()
model = hrbp.models.build("resnet8", classes=10, width=0.5, image_size=16)
hrbp.sparsify(model, 0.8)
images = tuple(hrbp.data.load("shapes", split, count=256) for split in ("train", "test"))
result = hrbp.train(model, images, batch_size=64, epochs=1, out="run", evolve="rigl", evolve_options={"every": 1})
assert result.steps == 4
assert hrbp.load("run/model.pt") is not None
assert "layer1.0.conv1" in subprocess.check_output(["hrbp", "info", "run/model.pt"], text=True)
print(f"{wheel.name} and {sdist.name}: {len(needed)} files each; both packages work from an empty folder")
