"""What a weight is worth: scores by which masks are chosen."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.parameter import is_lazy

from blocksparse import BSRModule

from .arguments import any_case, check_sparsity
from .wrappers import copied

SALIENCIES = ("random", "magnitude", "snip", "grasp", "synflow", "magnitude+gradient")

GRASP_TEMPERATURE = 200.0  # Wang et al.'s: their cross entropy is that of logits / 200
SYNFLOW_ROUNDS = 100  # Tanaka et al.'s

Loss = Callable[[Any, Any], Tensor]


def saliency(
    model: nn.Module,
    names: Sequence[str],
    method: str = "random",
    *,
    batch: Any = None,
    loss: Loss | None = None,
    sparsity: float = 0.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores of the weights of some layers of a model, >= 0: the higher, the more a weight is worth keeping.

    With w the weights of the layers in `names`, L the mean loss over the batches, g = dL/dw and H its Hessian:

    - "random": uniform in [0, 1), drawn on the CPU in the order of `names`: the same on every device.
    - "magnitude": |w|.
    - "snip": |w * g|.
    - "grasp": max(S) - S with S = -w * (H g), half of what removing a weight does to |g|^2 to first order, and the
      maximum over all layers. GraSP keeps the lowest S; the difference keeps the order of sums over equally many
      cells, too.
    - "synflow": |w * dR/dw| / R, where R is the sum of the outputs on an input of ones, every parameter and buffer is
      replaced by its magnitude, BatchNorm subtracts no mean, and the model is in eval mode. Along a chain of layers
      without biases each layer's scores sum to 1. Zero weights score zero. With `sparsity`, that share of the
      weights is first pruned away over all layers in the method's 100 rounds (density (1 - sparsity)^(i/100) after
      round i, the last one left to the caller), without which it empties whole layers under distribution "global".
    - "magnitude+gradient": |w| / mean|w| + |g| / mean|g|, means over the layer: what RigL keeps and what it grows.

    The model's parameters, gradients, buffers, modes and the global random generators are the same after the call as
    before, also after an error. L is taken in the model's own modes (train or eval), without autocast; half-precision
    weights, buffers and inputs are widened to float32 first. Frozen weights are scored like any others, shared ones by
    their total gradient.

    Args:
        model: any module.
        names: modules of `model` with a `weight` (Conv2d, Conv1d, Linear), or with stored blocks, as in
            named_modules(). Of these the weights that are stored count, and all others are 0; they are scored on a
            dense copy of the model.
        method: one of the above.
        batch: (inputs, targets), or an iterable of such pairs (needed where inputs is a tuple or list), for all but
            "random" and "magnitude". Tensors are moved to the weights' device, floating-point ones to their dtype.
            "synflow" reads only the inputs' shape; "grasp" goes over the pairs twice and keeps them meanwhile.
        loss: (outputs, targets) -> mean loss over the batch; batches count by their size. Default: cross entropy, for
            "grasp" with the method's temperature, of outputs / 200.
        sparsity: the share that "synflow" prunes to, in [0, 1); the others do not read it.
        seed: of "random", and of random layers and batches during the call.

    Returns:
        Name -> score of the weight's shape, on its device, float32 (float64 for float64 weights).

    Raises:
        ValueError: unknown method or name, no batch where one is needed, a layer that the outputs do not depend on, a
            loss or score that is not finite.

    Source: Lee et al., SNIP (2019); Wang, Zhang, Grosse, GraSP (2020); Tanaka et al., SynFlow (2020), alg. 1; Evci et
    al., RigL (2020), for the two terms of "magnitude+gradient".
    """
    who = "saliency()"
    method = any_case(method, SALIENCIES)
    if method not in SALIENCIES:
        raise ValueError(f"{who}: method is {method!r}; it needs one of {', '.join(map(repr, SALIENCIES))}")
    check_sparsity(sparsity, who)
    model, masks = _plain(model)
    weights = _weights(model, names, who)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.rand(w.shape, generator=generator, dtype=_wide(w.dtype)) for w in weights.values()]
        scores = [score.to(w.device) for score, w in zip(drawn, weights.values(), strict=True)]
    elif method == "magnitude":
        scores = [w.detach().abs().to(_wide(w.dtype)) for w in weights.values()]
    elif batch is None:
        raise ValueError(f"{who}: method {method!r} needs batch, (inputs, targets) or an iterable of such pairs")
    else:
        stand_in = _StandIn(model, weights, {name: masks[name] for name in weights if name in masks}, seed)
        with stand_in.quiet():
            if method == "synflow":
                unique = _synflow(stand_in, batch, sparsity)
            elif method == "grasp":
                unique = _grasp(stand_in, batch, loss)
            else:
                unique = _first_order(stand_in, batch, loss, method)
        scores = [unique[stand_in.keys[name]].to(_wide(w.dtype)) for name, w in weights.items()]
    for name, score in zip(weights, scores, strict=True):
        if not bool(score.isfinite().all()):
            raise ValueError(f"{who}: the score of {name!r} holds NaN or infinity; look at its weights and gradients")
    return dict(zip(weights, scores, strict=True))


def _plain(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model whose layers of stored blocks are dense, and name -> their mask; itself where it has none."""
    if not any(isinstance(module, BSRModule) for module in model.modules()):
        return model, {}
    model, masks = copied(model), {}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    made: dict[nn.Module, Any] = {}  # one for each, also of those with several names
    with torch.random.fork_rng(devices):  # a layer draws weights when it is made
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, BSRModule):
                dense = made[module] = made[module] if module in made else module.to_dense()
                masks[name] = module.pattern.to_mask().view(dense.weight.shape)
                parent, _, own = name.rpartition(".")
                if name:
                    setattr(model.get_submodule(parent), own, dense)
                else:
                    model = dense
    return model, masks


def _weights(model: nn.Module, names: Sequence[str], who: str) -> dict[str, nn.Parameter]:
    if isinstance(names, str) or not names:
        raise ValueError(f"{who}: names is {names!r}; it needs a list of at least one module name")
    modules = dict(model.named_modules(remove_duplicate=False))
    weights = {}
    for name in names:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=3) or list(modules)[1:4]
            raise ValueError(f"{who}: the model has no module {name!r}; near it: {', '.join(map(repr, near))}")
        weight = modules[name]._parameters.get("weight")
        if weight is not None and is_lazy(weight):
            raise ValueError(
                f"{who}: {name} is a {type(modules[name]).__name__} that has not seen its input yet; run the model once"
                " first"
            )
        if weight is None or not weight.is_floating_point():
            raise ValueError(
                f"{who}: module {name!r} is a {type(modules[name]).__name__} without a floating-point parameter"
                " 'weight'; it needs a Conv2d, Conv1d or Linear (remove parametrizations first)"
            )
        weights[name] = weight
    return weights


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class _StandIn:
    """Runs a model on tensors that stand in for its parameters and buffers, so that its own are never written to.

    Attributes:
        state: what stands in, by the model's names: detached, half precision widened, buffers copied.
        keys: the scored weights' names in `state`; shared weights have one.
        leaves: the scored weights by that name, each once, ready for autograd.
    """

    def __init__(self, model: nn.Module, weights: dict[str, nn.Parameter], masks: dict[str, Tensor], seed: int) -> None:
        self.model, self.seed = model, seed
        self.state: dict[str, Tensor] = {}
        key_of = {}
        for key, parameter in model.named_parameters():
            self.state[key] = parameter.detach().to(_wide(parameter.dtype))
            key_of[id(parameter)] = key
        for key, buffer in model.named_buffers():
            self.state[key] = buffer.detach().clone().to(_wide(buffer.dtype))
        self.keys = {name: key_of[id(weight)] for name, weight in weights.items()}
        self.masks = {self.keys[name]: mask for name, mask in masks.items()}
        first = next(iter(weights.values()))
        self.device, self.dtype = first.device, _wide(first.dtype)
        self.cuda = sorted({t.device.index for t in self.state.values() if t.device.type == "cuda"})

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {key: self.state[key].requires_grad_() for key in self.keys.values()}

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Gradients on, autocast off; the global generators and the model's modes are restored at the end."""
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            with (
                torch.random.fork_rng(self.cuda),
                torch.enable_grad(),
                torch.autocast(self.device.type, enabled=False),
            ):
                self.reseed()
                yield
        finally:
            for module, training in modes:
                module.training = training

    def reseed(self) -> None:
        """Only the generators that `quiet` restores. Done before each pass, so that each drops the same units."""
        torch.default_generator.manual_seed(self.seed)
        for index in self.cuda:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(self.seed)

    def bring(self, data: Any) -> Any:
        """A tensor on the weights' device and, where it is floating-point, in their dtype; anything else as it is."""
        if not isinstance(data, Tensor):
            return data
        return data.to(self.device, self.dtype if data.is_floating_point() else data.dtype)

    def __call__(self, inputs: Any) -> Any:
        kept = {key: self.state[key] * mask for key, mask in self.masks.items()}
        return functional_call(self.model, self.state | kept, (inputs,))

    def check_reached(self, reached: set[str]) -> None:
        """ValueError unless all scored weights are among those that autograd found on the way to the outputs."""
        for name, key in self.keys.items():
            if key not in reached:
                raise ValueError(
                    f"saliency(): the outputs do not depend on the weight of {name!r}; leave it out of names"
                )


def pairs(batch: Any) -> Iterator[tuple[Any, Any]]:
    """The pairs of one pair or of an iterable of pairs; at least one."""
    one = isinstance(batch, tuple | list) and len(batch) == 2 and not isinstance(batch[0], tuple | list)
    empty = True
    for pair in [batch] if one else batch:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"saliency(): batch gives a {type(pair).__name__}; it needs pairs (inputs, targets)")
        yield pair[0], pair[1]
        empty = False
    if empty:
        raise ValueError("saliency(): batch is empty; it needs at least one pair (inputs, targets)")


def _size(inputs: Any, targets: Any) -> int:
    for data in (inputs, targets):
        if isinstance(data, Tensor) and data.dim():
            return data.shape[0]
    raise ValueError("saliency(): neither inputs nor targets is a tensor; one of them must tell the size of the batch")


def _cross_entropy(temperature: float = 1.0) -> Loss:
    def loss(outputs: Any, targets: Any) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise ValueError(
                f"saliency(): the model returns a {type(outputs).__name__}; cross entropy needs a tensor: pass loss"
            )
        return cross_entropy(outputs / temperature, targets)

    return loss


def _mean_gradients(
    stand_in: _StandIn, batch: Any, loss: Loss, along: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """g = dL/dw of the mean loss L over all samples, or, `along` a direction v, the product H v of its Hessian."""
    stand_in.reseed()
    leaves = stand_in.leaves
    totals = {key: torch.zeros_like(w) for key, w in leaves.items()}
    reached: set[str] = set()
    samples = 0
    for pair in pairs(batch):
        inputs, targets = map(stand_in.bring, pair)
        value = loss(stand_in(inputs), targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise ValueError(f"saliency(): the loss has {what}; it needs one number, the mean over the batch")
        if not bool(value.isfinite()):
            raise ValueError(f"saliency(): the loss is {value.item()}; look at the weights and the batch")
        gradients = _gradients([value], leaves, create_graph=along is not None)
        reached |= gradients.keys()
        if along is not None:
            gradients = _gradients(list(gradients.values()), leaves, [along[key] for key in gradients])
        size = _size(inputs, targets)
        for key, gradient in gradients.items():
            totals[key] += size * gradient
        samples += size
    stand_in.check_reached(reached)
    return {key: total / samples for key, total in totals.items()}


def _gradients(
    outputs: Sequence[Tensor],
    leaves: dict[str, Tensor],
    along: Sequence[Tensor | None] = (None,),
    create_graph: bool = False,
) -> dict[str, Tensor]:
    """d (sum of outputs . along) / d leaves, for the leaves that the outputs depend on."""
    pairs = [(output, v) for output, v in zip(outputs, along, strict=True) if output.requires_grad]
    if not pairs:
        return {}
    found = torch.autograd.grad(
        [output for output, _ in pairs],
        list(leaves.values()),
        [v for _, v in pairs],
        create_graph=create_graph,
        allow_unused=True,
    )
    return {key: gradient for key, gradient in zip(leaves, found, strict=True) if gradient is not None}


def _first_order(stand_in: _StandIn, batch: Any, loss: Loss | None, method: str) -> dict[str, Tensor]:
    gradients = _mean_gradients(stand_in, batch, _cross_entropy() if loss is None else loss)
    scores = {}
    for key, w in stand_in.leaves.items():
        size, slope = w.detach().abs(), gradients[key].abs()
        scores[key] = size * slope if method == "snip" else _by_mean(size) + _by_mean(slope)
    return scores


def _by_mean(x: Tensor) -> Tensor:
    return x / x.mean().clamp_min(torch.finfo(x.dtype).tiny)  # all zeros stay zeros


def _grasp(stand_in: _StandIn, batch: Any, loss: Loss | None) -> dict[str, Tensor]:
    every = list(pairs(batch))
    loss = _cross_entropy(GRASP_TEMPERATURE) if loss is None else loss
    gradients = _mean_gradients(stand_in, every, loss)
    products = _mean_gradients(stand_in, every, loss, gradients)
    changes = {key: -w.detach() * products[key] for key, w in stand_in.leaves.items()}
    largest = max(change.max().item() for change in changes.values())
    return {key: largest - change for key, change in changes.items()}


def _synflow(stand_in: _StandIn, batch: Any, sparsity: float) -> dict[str, Tensor]:
    inputs, _ = next(pairs(batch))
    if not isinstance(inputs, Tensor):
        raise ValueError(f"saliency(): inputs is a {type(inputs).__name__}; 'synflow' needs a tensor")
    for key, t in stand_in.state.items():
        if t.is_floating_point():  # float64: R grows by a fan-in per layer and passes float32's range
            mean = key.rpartition(".")[2] == "running_mean"
            stand_in.state[key] = torch.zeros_like(t, dtype=torch.float64) if mean else t.double().abs()
    stand_in.model.eval()
    leaves = stand_in.leaves
    ones = torch.ones((1, *inputs.shape[1:]), dtype=torch.float64, device=stand_in.device)
    cells = sum(w.numel() for w in leaves.values())
    rounds = SYNFLOW_ROUNDS if sparsity else 1
    for i in range(1, rounds + 1):
        outputs = stand_in(ones)
        if not isinstance(outputs, Tensor):
            raise ValueError(f"saliency(): the model returns a {type(outputs).__name__}; 'synflow' needs a tensor")
        flow = outputs.sum()
        total = flow.item()
        if not 0 < total < math.inf:
            raise ValueError(
                f"saliency(): with |weights| and an input of ones the outputs sum to {total}; 'synflow' needs a"
                " positive, finite sum: a path of non-zero weights from input to output, no normalisation that centres"
            )
        gradients = _gradients([flow], leaves)
        stand_in.check_reached(set(gradients))
        scores = {key: (w.detach() * gradients[key]).abs() / total for key, w in leaves.items()}
        if i < rounds:
            kept = max(1, round(cells * (1 - sparsity) ** (i / rounds)))
            last = torch.cat([s.flatten() for s in scores.values()]).topk(kept, sorted=False).values.min()
            with torch.no_grad():
                for key, w in leaves.items():
                    w.mul_(scores[key] >= last)
    return scores
