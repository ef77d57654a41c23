"""A trained network of torchvision becomes sparse and is fine-tuned: python examples/finetune_torchvision.py

The steps are those of any fine-tuning; `hrbp.sparsify` is the one line that is new. Masks are chosen by the magnitude
of the trained weights. Where torchvision is not installed, this library's own ResNet with fresh weights takes the place
of the trained one.

--steps, --size and --batch make it as short as a test wants; the images here are random, put your own loader there.
"""

import argparse

import torch
from torch import nn

import hrbp


def network(name: str, classes: int, pretrained: bool) -> nn.Module:
    """A network of torchvision with a new classifier; this library's own where there is no torchvision."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        print(f"torchvision cannot be imported ({error}); hrbp's own resnet18 with fresh weights takes its place")
        return hrbp.models.build("resnet18", classes=classes, image_size=224)
    model = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    model.fc = nn.Linear(model.fc.in_features, classes)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18", help="a ResNet of torchvision, default resnet18")
    parser.add_argument("--fresh", action="store_true", help="fresh weights: nothing is downloaded")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=96, help="of the images")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = network(args.network, classes=10, pretrained=not args.fresh)
    hrbp.sparsify(model, args.sparsity, structure="block", blocksize=(16, 16), saliency="magnitude", min_density=0.05)
    print(hrbp.summary(model))

    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    model.train()
    for step in range(args.steps):
        x, y = torch.randn(args.batch, 3, args.size, args.size), torch.randint(10, (args.batch,))  # your batch
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{args.steps}  loss {loss.item():.3f}")

    x = torch.randn(1, 3, args.size, args.size)
    fused = hrbp.fuse(model.eval())  # for inference: batch norms, ReLUs and residual sums in the convolutions
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-3)
    dense = hrbp.dense_state_dict(model)  # torch.save(dense, "dense.pt"): a file for PyTorch without this library
    print(f"fused for inference; {len(dense)} dense tensors for plain PyTorch")


if __name__ == "__main__":
    main()
