"""Every way PyTorch has to ask for a derivative gives that of the dense convolution, or refuses: none gives zeros.

Forward mode (dual tensors, torch.func.jvp, linearize, jacfwd), backward mode (torch.func.grad, vjp, jacrev), batches of
either (vmap, is_grads_batched), and each of them over each other.
"""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)  # fmt: skip
from torch.utils._pytree import tree_leaves, tree_map_only

import blocksparse as bs
from blocksparse.layout import FORMATS, laid_out
from runners import RUNNERS

pytestmark = pytest.mark.device
OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)
CONV = (2, 1), (1, 0), (1, 2)
ONCE = "conv2d\\(\\) is differentiable once"


def op(x, values, pattern, bias, *conv, backend=None):
    return torch.ops.bsrconv.fprop(x, values, pattern.index, bias, pattern.shape, *map(list, conv), backend)


ENTRIES = {"conv2d": bs.conv2d, "op": op}
entries = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


def case(dtype=torch.float64, device="cpu", shape=(4, 2, 2, 1), blocksize=(2, 1), permuted=True, n=2, bias=True):
    """x, values, bias and the pattern of a small layer whose filters are permuted."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=generator) < 0.4
    order = torch.randperm(shape[0], generator=generator) if permuted else None
    pattern = bs.BSRPattern.from_mask(mask, blocksize, order).to(device)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=dtype).to(device)  # noqa: E731
    x, values = draw(n, shape[1], 3, 4), draw(pattern.nnzb, *blocksize)
    return (x, values, draw(shape[0])) if bias else (x, values), pattern


def both(entry, pattern, conv=CONV):
    """(sparse, dense) as functions of x, values and a bias."""

    def sparse(x, values, bias=None):
        return entry(x, values, pattern, bias, *conv)

    def dense(x, values, bias=None):
        return F.conv2d(x, pattern.to_dense(values), bias, *conv)

    return sparse, dense


def like(args):
    generator = torch.Generator().manual_seed(2)
    return tree_map_only(torch.Tensor, lambda t: torch.randn(t.shape, generator=generator).to(t), args)


def assert_same(got, needed, tolerance=1e-10):
    pairs = list(zip(tree_leaves(got), tree_leaves(needed), strict=True))
    assert pairs
    for a, b in pairs:
        assert b.abs().max() > 0  # nothing that zeros could pass
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- gradcheck


@pytest.mark.parametrize("wanted", ["x", "v", "b", "xv", "vb", "xvb"])
@pytest.mark.parametrize(
    ("shape", "blocksize", "conv", "layout"),
    [
        ((4, 6, 3, 2), (2, 1), ((2, 1), (1, 2), (1, 2)), "channels_last"),
        ((6, 4, 1, 1), (3, 2), ((2, 2), (0, 0), (1, 1)), "contiguous"),
        ((4, 4, 2, 3), (4, 4), ((1, 1), (2, 0), (1, 1)), "batch_last"),
    ],
)
def test_gradcheck_in_both_modes_and_in_batches(wanted, shape, blocksize, conv, layout):
    """Every subset of what may require a gradient; forward over backward, too."""
    for bias in (True, False) if "b" not in wanted else (True,):
        inputs, pattern = case(shape=shape, blocksize=blocksize, bias=bias)
        inputs = [laid_out(inputs[0], layout), *inputs[1:]]
        for t, name in zip(inputs, "xvb", strict=False):
            t.requires_grad_(name in wanted)
        sparse, _ = both(bs.conv2d, pattern, conv)
        options = {"check_batched_grad": True, "fast_mode": True}
        options |= {"check_forward_ad": True, "check_batched_forward_grad": True}
        assert torch.autograd.gradcheck(sparse, inputs, **options)
        options = {"check_rev_over_rev": False, "check_undefined_grad": False, "fast_mode": True}
        assert torch.autograd.gradgradcheck(sparse, inputs, check_fwd_over_rev=True, **options)


# ---------------------------------------------------------------- torch.func


def square(f):
    return lambda *args: f(*args).square().sum()


def cube(f):
    return lambda *args: f(*args).pow(3).sum()


def along(f, tangents):
    """The directional derivative of f along one direction, as a function of where."""
    return lambda *args: jvp(f, args, tangents[: len(args)])[1]


ALL = (0, 1, 2)
TRANSFORMS = {
    "jvp": lambda f, args, t: jvp(f, args, t),
    "linearize": lambda f, args, t: linearize(f, *args)[1](*t),
    "jacfwd": lambda f, args, t: jacfwd(f, ALL)(*args),
    "jacrev": lambda f, args, t: jacrev(f, ALL)(*args),
    "jacrev in chunks": lambda f, args, t: jacrev(f, ALL, chunk_size=3)(*args),
    "grad": lambda f, args, t: grad(square(f), ALL)(*args),
    "grad_and_value": lambda f, args, t: grad_and_value(square(f), ALL)(*args),
    "vjp": lambda f, args, t: (lambda y, back: back(y.sin()))(*vjp(f, *args)),
    "vjp in batches": lambda f, args, t: (lambda y, back: vmap(back)(torch.stack([y, y.sin()])))(*vjp(f, *args)),
    "jvp in batches": lambda f, args, t: vmap(lambda s: jvp(f, args, tuple(s * u for u in t)))(t[0].flatten()[:3]),
    "hessian": lambda f, args, t: hessian(square(f), ALL)(*args),
    "jacfwd(jacfwd)": lambda f, args, t: jacfwd(jacfwd(cube(f), ALL), ALL)(*args),
    "jacrev(jacfwd)": lambda f, args, t: jacrev(jacfwd(square(f), 2), ALL)(*args),
    "jvp(jvp(jvp))": lambda f, args, t: along(along(along(cube(f), t), t), t)(*args),
    "jvp(jvp(grad))": lambda f, args, t: along(along(grad(cube(f), ALL), t), t)(*args),
    "jvp(grad(jvp))": lambda f, args, t: along(grad(along(cube(f), t), ALL), t)(*args),
    "grad(jvp(jvp))": lambda f, args, t: grad(along(along(cube(f), t), t), ALL)(*args),
    "hessian-vector products in batches": lambda f, args, t: vmap(
        lambda s: jvp(grad(cube(f), ALL), args, tuple(s * u for u in t))[1]
    )(torch.ones(2).to(t[0])),
    "jvp within no_grad": lambda f, args, t: torch.no_grad()(jvp)(f, args, t),
    "grad within no_grad": lambda f, args, t: torch.no_grad()(grad(square(f), ALL))(*args),
}


@entries
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_gives_the_dense_result(entry, transform):
    args, pattern = case()
    t = like(args)
    sparse, dense = both(entry, pattern)
    assert_same(transform(sparse, args, t), transform(dense, args, t))


def test_what_a_no_grad_inside_a_transform_hides_stays_hidden():
    args, pattern = case()
    sparse, dense = both(bs.conv2d, pattern)

    def half(f):
        def g(x, values, bias):
            with torch.no_grad():
                hidden = f(x, values, bias)
            return (hidden * f(x, values, bias)).sum()

        return g

    for transform in (lambda f: grad(f, ALL), lambda f: hessian(f, ALL), lambda f: jacfwd(f, ALL)):
        assert_same(transform(half(sparse))(*args), transform(half(dense))(*args))


@entries
def test_the_second_backward_is_refused(entry):
    args, pattern = case()
    sparse, _ = both(entry, pattern)
    with pytest.raises(RuntimeError, match=ONCE):
        jacrev(jacrev(square(sparse)))(*args)
    with pytest.raises(RuntimeError, match=ONCE):
        grad(lambda x: grad(square(sparse))(x, *args[1:]).sum())(args[0])
    with pytest.raises(RuntimeError, match=ONCE):
        torch.autograd.functional.jvp(sparse, args, like(args))  # a backward of a backward
    with pytest.raises(RuntimeError, match=ONCE):
        torch.autograd.functional.hessian(square(sparse), args)


def test_a_backward_that_outlives_its_transform():
    """vjp's function runs where no transform is active, on tensors that still are that transform's."""
    args, pattern = case()
    sparse, dense = both(bs.conv2d, pattern)
    (y, back), (_, needed) = vjp(sparse, *args), vjp(dense, *args)
    assert_same(back(y.cos()), needed(y.cos()))
    got_out = []
    grad(lambda x: (got_out.append(x), x.sum())[1])(args[0])
    assert_same(sparse(got_out[0], *args[1:]), dense(*args))  # a tensor that has escaped, forward alone


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_jacobian_of_autograd_functional(strategy):
    args, pattern = case()
    sparse, dense = both(bs.conv2d, pattern)
    jacobian = torch.autograd.functional.jacobian
    assert_same(jacobian(sparse, args, vectorize=True, strategy=strategy), jacobian(dense, args))


@entries
def test_batched_gradients(entry):
    args, pattern = case()
    args = tuple(t.requires_grad_() for t in args)
    sparse, dense = both(entry, pattern)
    y = sparse(*args)
    dy = torch.randn(5, *y.shape, dtype=y.dtype)
    got = torch.autograd.grad(y, args, dy, is_grads_batched=True)
    assert_same(got, torch.autograd.grad(dense(*args), args, dy, is_grads_batched=True))


# ---------------------------------------------------------------- dual tensors


def profiled():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


AROUND = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "torch.profiler": profiled,
    "torch.autograd.profiler": torch.autograd.profiler.profile,
}


def dual_product(f, args, tangents, around=nullcontext, prepare=lambda t: t):
    """(y, its tangent) of f on dual tensors; where a tangent is None the tensor has none."""
    with fwd.dual_level():
        duals = [a if t is None else fwd.make_dual(prepare(a), t) for a, t in zip(args, tangents, strict=True)]
        with around():
            y, tangent = fwd.unpack_dual(f(*duals))
        return y.detach().clone(), None if tangent is None else tangent.detach().clone()


@entries
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("which", [w for n in ALL for w in itertools.combinations(ALL, n + 1)], ids=str)
def test_dual_tensors(entry, around, which):
    args, pattern = case()
    tangents = [t if i in which else None for i, t in enumerate(like(args))]
    sparse, dense = both(entry, pattern)
    needed = dual_product(dense, args, tangents)
    assert_same(dual_product(sparse, args, tangents, around), needed)
    requires = dual_product(sparse, args, tangents, around, lambda t: t.clone().requires_grad_())
    assert_same(requires, needed)
    if 2 not in which:  # without a bias
        needed = dual_product(dense, args[:2], tangents[:2])
        assert_same(dual_product(sparse, args[:2], tangents[:2], around), needed)


@entries
def test_a_tensor_without_a_tangent_gives_none(entry):
    args, pattern = case()
    sparse, _ = both(entry, pattern)
    assert dual_product(sparse, args, [None] * 3)[1] is None


@entries
def test_inference_mode_records_no_tangent_as_of_any_op(entry):
    """PyTorch's rule: the result has no tangent, which is not a tangent of zeros. torch.func.jvp works in it."""
    args, pattern = case()
    t = like(args)
    sparse, dense = both(entry, pattern)
    for f in (sparse, dense):
        assert dual_product(f, args, t, torch.inference_mode)[1] is None
    with torch.inference_mode():
        own = jvp(dense, args, t)
        if not own[1].any() and OLD_TORCH:
            pytest.skip("PyTorch before 2.12 loses tangents of its own convolution there, too")
        assert_same(jvp(sparse, args, t), own)


def test_tangents_of_any_layout_and_zero_tensors():
    (x, values, bias), pattern = case()
    sparse, dense = both(bs.conv2d, pattern)
    args = (x.contiguous(memory_format=torch.channels_last), values, bias)
    tangents = [x.new_ones(()).expand_as(x), values.mT.contiguous().mT.cos(), None]
    assert_same(dual_product(sparse, args, tangents), dual_product(dense, args, tangents))
    zero = torch._efficientzerotensor(x.shape, dtype=x.dtype)
    tangents = [zero, tangents[1], None]
    assert_same(dual_product(sparse, args, tangents), dual_product(dense, args, tangents))


def test_backward_through_a_dual_product():
    """Forward mode is itself differentiable: the gradient of a directional derivative."""
    args, pattern = case()
    t = like(args)

    def slope(f):
        leaves = [a.clone().requires_grad_() for a in args]
        with fwd.dual_level():
            y, tangent = fwd.unpack_dual(f(*map(fwd.make_dual, leaves, t)))
            return torch.autograd.grad((y * tangent).sum(), leaves)

    sparse, dense = both(bs.conv2d, pattern)
    assert_same(slope(sparse), slope(dense))


def test_a_gradient_has_a_tangent():
    """Forward over backward without torch.func: Hessian-vector products."""
    args, pattern = case()
    t = like(args)

    def product(f):
        leaves = [a.clone().requires_grad_() for a in args]
        with fwd.dual_level():
            loss = cube(f)(*map(fwd.make_dual, leaves, t))
            grads = torch.autograd.grad(loss, leaves, create_graph=True)
            return [fwd.unpack_dual(g).tangent.detach().clone() for g in grads]

    sparse, dense = both(bs.conv2d, pattern)
    assert_same(product(sparse), product(dense))


def test_autocast_casts_tangents_too():
    args, pattern = case(torch.float32)
    t = like(args)
    sparse, dense = both(bs.conv2d, pattern)
    with torch.autocast("cpu", torch.bfloat16):
        y, tangent = jvp(sparse, args, t)
    assert y.dtype == tangent.dtype == torch.bfloat16
    _, needed = jvp(dense, args, t)
    torch.testing.assert_close(tangent.float(), needed, rtol=5e-2, atol=0.1)


# ---------------------------------------------------------------- vmap


def batched(t, dim, samples=3):
    return t if dim is None else torch.stack([t * (i + 1.5) for i in range(samples)], dim)


@entries
@pytest.mark.parametrize(
    "dims", [d for d in itertools.product([None, 0, 1, -1], repeat=3) if any(x is not None for x in d)]
)
def test_vmap_over_any_argument(entry, dims):
    args, pattern = case()
    args = tuple(map(batched, args, dims))
    sparse, dense = both(entry, pattern)
    assert_same(vmap(sparse, dims)(*args), vmap(dense, dims)(*args))
    assert_same(vmap(sparse, dims, 1)(*args), vmap(dense, dims, 1)(*args))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("n", [1, 2])
def test_per_sample_gradients(layout, n):
    args, pattern = case(n=n)
    xs = torch.stack([args[0].cos(), args[0], args[0].sin()]).flatten(0, 1)
    xs = laid_out(xs, layout).unflatten(0, (3, n))
    sparse, dense = both(bs.conv2d, pattern)

    def samples(f):
        return vmap(grad(lambda weights, x: cube(f)(x, *weights)), (None, 0))(args[1:], xs)

    got = samples(sparse)
    assert_same(got, samples(dense))
    weights = [t.clone().requires_grad_() for t in args[1:]]
    one_by_one = [torch.autograd.grad(cube(sparse)(x, *weights), weights) for x in xs]
    assert_same(got, [torch.stack(grads) for grads in zip(*one_by_one, strict=True)])


@pytest.mark.parametrize("runner", RUNNERS, ids="-".join)
def test_jvp_and_per_sample_gradients_on_every_backend(runner):
    backend, device = runner
    args, pattern = case(torch.float32, device, (16, 16, 3, 3), (8, 8), permuted=False)
    t = like(args)
    sparse = lambda *args: bs.conv2d(*args[:2], pattern, args[2], 1, 1, backend=backend)  # noqa: E731
    dense = lambda *args: F.conv2d(args[0], pattern.to_dense(args[1]), args[2], 1, 1)  # noqa: E731
    tolerance = 3e-2 if device == "cuda" else 1e-3  # tf32
    assert_same(jvp(sparse, args, t), jvp(dense, args, t), tolerance)
    gradients = [vmap(grad(lambda v, x, f=f: square(f)(x[None], v, args[2])), (None, 0)) for f in (sparse, dense)]
    assert_same(*(g(args[1], args[0]) for g in gradients), tolerance)


def test_vmap_in_vmap_and_over_nothing():
    args, pattern = case()
    sparse, dense = both(bs.conv2d, pattern)
    xs = batched(batched(args[0], 0), 1, 2)
    values = batched(args[1], 2)
    nest = lambda f: vmap(vmap(f, (0, None, None)), (1, 2, None))  # noqa: E731
    assert_same(nest(sparse)(xs, values[:, :, :2], args[2]), nest(dense)(xs, values[:, :, :2], args[2]))
    for dims in ((0, None, None), (None, 0, None), (0, 0, 0)):
        none = [t if d is None else t.new_empty(0, *t.shape) for t, d in zip(args, dims, strict=True)]
        assert vmap(sparse, dims)(*none).shape == (0, *dense(*args).shape)


def test_vmap_names_the_shape_of_a_sample():
    args, pattern = case()
    xs = batched(args[0], 0)
    sparse, _ = both(bs.conv2d, pattern)
    with pytest.raises(ValueError, match=r"x has shape \(3, 4\); it needs 4 dimensions .*unsqueeze\(0\)"):
        vmap(sparse, (0, None, None))(args[0][:, 0], *args[1:])
    with pytest.raises(ValueError, match=r"conv2d\(\): x has 1 channels \(shape \(2, 1, 3, 4\)\)"):
        vmap(sparse, (0, None, None))(xs[:, :, :1], *args[1:])
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); it needs \(4,\) = \(K,\)"):
        vmap(sparse, (0, None, 0))(xs, args[1], torch.randn(3, 3, dtype=xs.dtype))
    with pytest.raises(ValueError, match=r"dy has shape \(2, 4, 1, 2\)"):
        vmap(lambda dy: bs.conv2d_dgrad(dy, args[1], pattern, args[0].shape, *CONV))(
            torch.randn(3, 2, 4, 1, 2).double()
        )
    with pytest.raises(ValueError, match=r"dy has shape \(2, 4, 1, 2\)"):
        vmap(lambda dy: bs.conv2d_wgrad(args[0], dy, pattern, *CONV))(torch.randn(3, 2, 4, 1, 2).double())


# ---------------------------------------------------------------- linear, modules


def linear_case():
    pattern = bs.BSRPattern.random((6, 4, 1, 1), (3, 2), 0.5)
    return (torch.randn(5, 4).double(), torch.randn(pattern.nnzb, 3, 2).double(), torch.randn(6).double()), pattern


@pytest.mark.parametrize(
    "transform", ["jvp", "linearize", "jacfwd", "jacrev", "grad", "hessian", "jacfwd(jacfwd)", "jvp in batches"]
)
def test_linear(transform):
    args, pattern = linear_case()
    f, dense = (
        (lambda x, v, b: bs.linear(x, v, pattern, b)),
        (lambda x, v, b: F.linear(x, pattern.to_dense(v)[:, :, 0, 0], b)),
    )
    t = like(args)
    assert_same(TRANSFORMS[transform](f, args, t), TRANSFORMS[transform](dense, args, t))


def modules():
    conv, linear = bs.BSRConv2d(case()[1], *CONV), bs.BSRLinear(linear_case()[1])
    return [(conv, torch.randn(2, 2, 3, 4)), (linear, torch.randn(5, 4))]


@pytest.mark.parametrize("which", [0, 1])
def test_modules_through_functional_call(which):
    module, x = modules()[which]
    module, x = module.double(), x.double()
    dense = module.to_dense()
    params = dict(module.named_parameters())
    tangents = like({k: v.detach() for k, v in params.items()})

    def sparse_call(params, x):
        return functional_call(module, params, (x,))

    def dense_call(params, x):
        weight = module.pattern.to_dense(params["values"]).view(dense.weight.shape)
        return functional_call(dense, {"weight": weight, "bias": params["bias"]}, (x,))

    args, t = ({k: v.detach() for k, v in params.items()}, x), (tangents, like(x))
    assert_same(jvp(sparse_call, args, t), jvp(dense_call, args, t))
    assert_same(linearize(sparse_call, *args)[1](*t), jvp(dense_call, args, t)[1])
    per_sample = [
        vmap(grad(lambda p, x, f=f: cube(f)(p, x[None])), (None, 0))(*args) for f in (sparse_call, dense_call)
    ]
    assert_same(*per_sample)
    # A module as it stands, whose parameters require gradients.
    assert_same(jvp(module, (x,), (t[1],)), jvp(dense, (x,), (t[1],)))
    assert_same(dual_product(module, (x,), (t[1],), profiled), jvp(dense, (x,), (t[1],)))


def test_frozen_values_have_a_tangent_of_x_alone():
    module, x = modules()[0]
    module, x = module.double().requires_grad_(False), x.double()
    assert_same(jvp(module, (x,), (x.cos(),)), jvp(module.to_dense(), (x,), (x.cos(),)))
    assert_same(grad(square(module))(x), grad(square(module.to_dense()))(x))


@pytest.mark.parametrize("which", [0, 1])
def test_an_ensemble_of_modules_with_patterns_of_their_own(which):
    """stack_module_state stacks the index, too: every member has its own blocks."""
    module, x = modules()[which]
    members = [copy.deepcopy(module) for _ in range(3)]
    for member in members[1:]:
        k, c, r, s = member.weight_shape
        nnzb, bk, bc = member.values.shape
        new = bs.BSRPattern.random((k, c, r, s), (bk, bc), nnzb * bk * bc / (k * c * r * s))
        order = module.pattern.row_order
        member.set_pattern(bs.BSRPattern(new.shape, (bk, bc), new.indptr, new.indices, order))
        member.reset_parameters()
    state = stack_module_state(members)

    def call(params, buffers, x):
        return functional_call(module, (params, buffers), (x,))

    needed = torch.stack([member(x) for member in members])
    assert_same(vmap(call, (0, 0, None))(*state, x), needed, 1e-5)
    grads = vmap(grad(square(call)), (0, 0, None))(*state, x)
    for i, member in enumerate(members):
        needed = torch.autograd.grad(member(x).square().sum(), tuple(member.parameters()))
        assert_same([grads[name][i] for name, _ in member.named_parameters()], needed, 1e-5)


# ---------------------------------------------------------------- the gradients as functions of their own


def gradient_functions(pattern, x_shape):
    stride, padding, dilation = CONV

    def dgrad(dy, values):
        return bs.conv2d_dgrad(dy, values, pattern, x_shape, *CONV)

    def dense_dgrad(dy, values):
        return torch.nn.grad.conv2d_input(x_shape, pattern.to_dense(values), dy, stride, padding, dilation)

    def wgrad(x, dy):
        return bs.conv2d_wgrad(x, dy, pattern, *CONV)

    def dense_wgrad(x, dy):
        weight = x.new_zeros(pattern.shape)
        return pattern.values_from_dense(vjp(lambda w: F.conv2d(x, w, None, *CONV), weight)[1](dy)[0])

    return {"dgrad": (dgrad, dense_dgrad), "wgrad": (wgrad, dense_wgrad)}


@pytest.mark.parametrize("kind", ["dgrad", pytest.param("wgrad", marks=pytest.mark.slow)])
def test_the_gradients_are_bilinear(kind):
    (x, values, _), pattern = case()
    dy = bs.conv2d(x, values, pattern, None, *CONV).cos()
    f, dense = gradient_functions(pattern, x.shape)[kind]
    args = (dy, values) if kind == "dgrad" else (x, dy)
    t = like(args)
    assert_same(jvp(f, args, t), jvp(dense, args, t))
    assert_same(linearize(f, *args)[1](*t), jvp(dense, args, t)[1])
    assert_same(jacfwd(f, (0, 1))(*args), jacfwd(dense, (0, 1))(*args))
    assert_same(jacfwd(jacfwd(cube(f), (0, 1)), (0, 1))(*args), jacfwd(jacfwd(cube(dense), (0, 1)), (0, 1))(*args))
    for around, which in itertools.product(AROUND.values(), [(0,), (1,), (0, 1)]):
        tangents = [u if i in which else None for i, u in enumerate(t)]
        assert_same(dual_product(f, args, tangents, around), dual_product(dense, args, tangents))
    for dims in itertools.product([None, 0, 2], repeat=2):
        if dims != (None, None):
            many = list(map(batched, args, dims))
            assert_same(vmap(f, dims)(*many), torch.stack([
                dense(*(a if d is None else a.select(d, i) for a, d in zip(many, dims, strict=True))) for i in range(3)
            ]))  # fmt: skip
    for transform in (grad(square(f)), grad(square(f), 1), jacrev(f)):
        with pytest.raises(RuntimeError, match=ONCE):
            transform(*args)
    with pytest.raises(RuntimeError, match=ONCE):
        f(args[0].requires_grad_(), args[1]).sum().backward()


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(
    ("transform", "backend"),
    [
        pytest.param(
            t, b, marks=[pytest.mark.slow] if (t in ("hessian", "jacfwd", "jacrev")) == (b == "aot_eager") else []
        )
        for t in ("jvp", "grad", "jacfwd", "jacrev", "hessian", "jvp in batches")
        for b in ("eager", "aot_eager")
    ],
)
def test_a_compiled_transform(transform, backend):
    """In one graph. What Dynamo leaves in it knows nothing of Python's count of levels."""
    args, pattern = case()
    t = like(args)
    sparse, dense = both(bs.conv2d, pattern)
    run = TRANSFORMS[transform]
    if OLD_TORCH and transform in ("jacfwd", "hessian"):
        with pytest.raises(torch._dynamo.exc.UserError):
            torch.compile(lambda args, t: run(dense, args, t), backend=backend, fullgraph=True)(args, t)
        pytest.skip("PyTorch before 2.12 does not compile jacfwd of its own convolution, either")
    compiled = torch.compile(lambda args, t: run(sparse, args, t), backend=backend, fullgraph=True)
    assert_same(compiled(args, t), run(dense, args, t))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_dual_tensors(backend):
    torch._dynamo.reset()
    args, pattern = case()
    t = like(args)
    sparse, dense = both(bs.conv2d, pattern)

    def run(args, t):
        with fwd.dual_level():
            y = fwd.unpack_dual(sparse(*map(fwd.make_dual, args, t)))
            return y.primal.clone(), y.tangent.clone()

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for _ in range(2):
        assert_same(compiled(args, t), dual_product(dense, args, t))
