"""Block-sparse convolution without any training library: python examples/blocksparse_alone.py

A pattern says which blocks of a filter bank are stored; values hold them. Forward product and both gradients run on the
stored blocks alone.
"""

import time

import torch

import blocksparse as bs


def main() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(128, 128, 3, padding=1)
    pattern = bs.BSRPattern.random((128, 128, 3, 3), blocksize=(32, 32), density=0.1)
    sparse = bs.BSRConv2d.from_dense(conv, pattern)
    print(f"{pattern}\nparameters: {sparse.values.numel():,} of {conv.weight.numel():,}")

    # The same numbers as a dense convolution with zeros.
    x = torch.randn(4, 128, 14, 14, requires_grad=True)
    y, needed = sparse(x), torch.nn.functional.conv2d(x, sparse.weight, sparse.bias, padding=1)
    torch.testing.assert_close(y, needed, rtol=1e-4, atol=1e-4)

    # Gradients exist at the stored blocks only: [nnzb, 32, 32].
    y.sum().backward()
    print(f"gradient of the values: {tuple(sparse.values.grad.shape)}")

    # Which backend runs each product here, and why.
    print(bs.explain(x, sparse.values, pattern, padding=1))

    # The mask may change; values that stay are kept.
    sparse.set_pattern(bs.BSRPattern.random((128, 128, 3, 3), (32, 32), 0.1))

    times = {}
    for name, layer in (("dense", conv), ("sparse", sparse)):
        layer(x).sum().backward()
        start = time.perf_counter()
        for _ in range(5):
            layer(x).sum().backward()
        times[name] = (time.perf_counter() - start) / 5
    print(f"forward + backward: dense {1e3 * times['dense']:.2f} ms, sparse {1e3 * times['sparse']:.2f} ms")


if __name__ == "__main__":
    main()
