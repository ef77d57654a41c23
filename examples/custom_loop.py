"""A training loop of your own in which the masks change: python examples/custom_loop.py

Two lines make a loop one of sparse training: `hrbp.sparsify` before the optimizer is made, and `evolver.step()` after
`optimizer.step()`. The Evolver moves weights, gradients and the optimizer's state when masks change.
"""

import argparse

import torch
from torch import nn

import hrbp
from blocksparse import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=2000)
    args = parser.parse_args()

    keep_freed_memory()  # on a CPU, steps of large networks are 10% to 40% shorter
    torch.manual_seed(0)
    sets = [hrbp.data.load("shapes", split, count=args.images) for split in ("train", "test")]
    train, test = hrbp.data.Batches(sets[0], 100, train=True), hrbp.data.Batches(sets[1], 100, train=False)

    model = hrbp.models.build("resnet8", classes=len(sets[0].classes), image_size=16)
    hrbp.sparsify(model, 0.9, structure="hrbp++")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    steps = args.epochs * len(train)
    evolver = hrbp.Evolver(model, optimizer, "rigl", total_steps=steps, every=max(1, steps // 20))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    for epoch in range(args.epochs):
        model.train()
        changed = 0
        for x, y in train.epoch(epoch):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            changed += evolver.step() is not None  # before the gradients are cleared
            optimizer.zero_grad()
            schedule.step()
        model.eval()
        with torch.no_grad():
            right = sum((model(x).argmax(1) == y).sum().item() for x, y in test.epoch())
        share = right / len(sets[1])
        print(f"epoch {epoch + 1}/{args.epochs}  test accuracy {share:.1%}  updates of the masks {changed}")
    print(hrbp.summary(model))


if __name__ == "__main__":
    main()
