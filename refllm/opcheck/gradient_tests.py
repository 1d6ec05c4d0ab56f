"""How other projects test gradients, to be audited beside our own check (docs/mutants-backward.md).

    for name, test in gradient_tests("rms_norm_backward").items():
        test(fn)                # raises AssertionError if it dislikes fn, a function of the signature of the operator

Each test draws inputs as that project's own test does, in shapes of its list, and compares with its reference by its
limits. Where its shapes take minutes on a CPU they are smaller here, with fewer rows and words, which makes limits that
are absolute stricter. A project is left out where it does not test the gradients of an operator.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from refllm.opcheck.followed import followed
from refllm.ops.backward_contracts import BACKWARD, forward_name

Test = Callable[[Callable[..., Any]], None]
Rule = Callable[[Any, Any, Any], Any]
"""(got, reference, what Torch makes of it in the dtype of the test) -> whether that passes."""


@dataclass(frozen=True)
class Case:
    """One call of the forward operator, and the rule for its gradients.

    tensors: drawn anew for every run. rest: other positional arguments, after them. incoming: makes the gradient of a
    result. judged: the arguments whose gradients are compared; None: all that have one. of_weight: the rule for those
    of weights and biases, where that is another. reference: the dtype in which the reference computes, "" for that of
    the test. inside: makes a larger function of the operator, of which the gradients of all tensors are compared.
    """

    operator: str
    tensors: Callable[..., list[Any]]
    rule: Rule
    rest: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    incoming: Callable[[Any], Any] = lambda out: _torch().randn_like(out)
    judged: tuple[str, ...] | None = None
    of_weight: Rule | None = None
    reference: str = ""
    inside: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None

    @property
    def names(self) -> list[str]:
        """The arguments that may have a gradient, in order."""
        if self.inside is not None:
            return [f"tensor {i}" for i in range(len(self.tensors()))]
        return ["x" if name == "s" else name for name in BACKWARD[self.operator].gradient_of.values()]


def gradient_tests(operator: str) -> dict[str, Test]:
    """Title -> test(fn), for one backward operator: of each project that tests it, and torch.autograd.gradcheck."""
    found: dict[str, Test] = {}
    for title, cases in PROJECTS.items():
        own = [case for case in cases() if case.operator == operator]
        if own:
            found[title] = _test(operator, own)
    found[GRADCHECK] = lambda fn: _gradcheck(operator, fn)
    return found


def dtype_of(title: str, operator: str) -> str:
    """The dtype in which a test looks at an operator."""
    if title == "flash-linear-attention":
        return {"attention": "float16"}.get(forward_name(operator), "bfloat16" if "entropy" in operator else "float32")
    return title.rpartition(", ")[2] if ", " in title else "float32"


def _torch() -> Any:
    import torch

    return torch


# -- how a case is run -------------------------------------------------------------------------------------------------


def _test(operator: str, cases: list[Case]) -> Test:
    def test(fn: Callable[..., Any]) -> None:
        for case in cases:
            run(case, followed(operator, fn))

    return test


def run(case: Case, function: Callable[..., Any]) -> None:
    """Raises AssertionError at the first gradient that does not pass."""
    torch, right = _torch(), _eager(case.operator)
    if case.inside is not None:
        function, right = case.inside(function), case.inside(right)
    torch.manual_seed(0)
    tensors = case.tensors()
    with torch.no_grad():
        outs = right(*tensors, *case.rest, **case.keywords)
    incoming = [case.incoming(out) for out in (outs if isinstance(outs, tuple) else (outs,))]
    got = _gradients(case, function, tensors, incoming, "")
    wanted = _gradients(case, right, tensors, incoming, case.reference)
    narrow = _gradients(case, right, tensors, incoming, "") if case.reference else wanted
    for name, mine, exact, plain in zip(case.names, got, wanted, narrow, strict=True):
        if case.judged is None or name in case.judged:
            assert mine is not None, f"{name} has no gradient"
            rule = case.of_weight if case.of_weight and name in ("weight", "bias") else case.rule
            assert bool(rule(mine, exact, plain)), f"the gradient of {name}"


def _gradients(case: Case, function: Callable[..., Any], tensors: list[Any], incoming: list[Any], dtype: str) -> Any:
    """One gradient per argument that may have one, None where none is given; in another dtype if one is named."""
    torch = _torch()

    def own(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.detach().clone().to(getattr(torch, dtype) if dtype else x.dtype)

    arguments = [own(x) for x in (*tensors, *case.rest)]
    names = case.names if case.inside else list(BACKWARD[case.operator].forward.parameters)
    leaves = {name: x.requires_grad_() for name, x in zip(names, arguments, strict=False) if name in case.names}
    results = function(*arguments, **case.keywords)
    outs = results if isinstance(results, tuple) else (results,)
    given = [d if 0 in d.stride() else d.clone() for d in incoming]  # a gradient may be written over
    given = [d.to(out.dtype) if d.dtype != out.dtype else d for d, out in zip(given, outs, strict=True)]
    return torch.autograd.grad(outs, list(leaves.values()), given, allow_unused=True)


@cache
def _eager(operator: str) -> Callable[..., Any]:
    """The operator in calls of Torch, one after another, in whatever dtype."""
    import torch
    import torch.nn.functional as F

    from refllm.kernels import plain

    own: dict[str, Any] = {"linear": F.linear, "embedding": F.embedding, "softmax": lambda x: torch.softmax(x, -1),
           "attention": _attention, "decode_attention": _decoded, "layer_norm": _layer_norm,
           "add_layer_norm": lambda x, residual, *rest: (_layer_norm(residual + x, *rest), residual + x)}  # fmt: skip
    name = forward_name(operator)
    found: Callable[..., Any] = own.get(name) or plain.EAGER[name]
    return found


def _layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """The norm as on a GPU, where sums over rows are kept in float32; on a CPU Torch keeps them in the dtype of x."""
    torch = _torch()
    wide = [torch.promote_types(t.dtype, torch.float32) for t in (x, weight)]
    bias = None if bias is None else bias.to(wide[1])
    y = torch.nn.functional.layer_norm(x.to(wide[0]), x.shape[-1:], weight.to(wide[1]), bias, eps)
    return y.to(x.dtype)


def _attention(q: Any, k: Any, v: Any, *, scale: Any = None, causal: bool = True, key_mask: Any = None) -> Any:
    torch = _torch()
    (H, S, D), (K, T) = q.shape[1:], k.shape[1:3]
    k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    last = torch.arange(S)[:, None] + (T - S if causal else T)
    seen = torch.arange(T) <= last
    seen = seen if key_mask is None else seen & key_mask[:, None, None]
    s = (q @ k.mT * (D**-0.5 if scale is None else scale)).masked_fill(~seen, float("-inf"))
    return torch.softmax(s, -1).masked_fill(~seen.any(-1, keepdim=True), 0.0) @ v


def _decoded(q: Any, k: Any, v: Any, lengths: Any, *, scale: Any = None) -> Any:
    rows = ((slice(b, b + 1), int(n)) for b, n in enumerate(lengths))
    return _torch().cat([_attention(q[b], k[b, :, :n], v[b, :, :n], scale=scale) for b, n in rows])


# -- rules -------------------------------------------------------------------------------------------------------------


def _close(atol: float, rtol: float) -> Rule:
    return lambda got, right, _: _torch().allclose(got.double(), right.double(), atol=atol, rtol=rtol, equal_nan=True)


def _times(factor: float, atol: float) -> Rule:
    """An error that is so many times that of Torch in the same dtype, and a little more."""

    def rule(got: Any, right: Any, narrow: Any) -> Any:
        right = right.double()
        return (got - right).abs().max() <= factor * (narrow - right).abs().max() + atol

    return rule


def _ratio(limit: float) -> Rule:
    """The RMS error over the RMS of the reference; an error of at most 1e-6 passes."""

    def rule(got: Any, right: Any, _: Any) -> Any:
        off = (right - got).double().flatten()
        size = right.double().flatten().square().mean().sqrt()
        return off.abs().max() <= 1e-6 or off.square().mean().sqrt() / (size + 1e-8) < limit

    return rule


def _spacing(rtol: float) -> Rule:
    """torch.allclose with twice the error that adding 0.3 and taking it away makes in the dtype."""

    def rule(got: Any, right: Any, _: Any) -> Any:
        atol = 2 * float(((right + 0.3 - 0.3) - right).abs().max())
        return _torch().allclose(got, right, rtol=rtol, atol=atol)

    return rule


# -- projects ----------------------------------------------------------------------------------------------------------


def _normal(dtype: str, *shapes: tuple[int, ...], scale: float = 1.0) -> list[Any]:
    torch = _torch()
    return [(scale * torch.randn(shape)).to(getattr(torch, dtype)) for shape in shapes]


def _tables(dtype: str, S: int, D: int) -> list[Any]:
    torch = _torch()
    angles = torch.arange(S)[:, None] * 1e4 ** (-torch.arange(0, D, 2) / D)
    return [t.to(getattr(torch, dtype)) for t in (angles.cos(), angles.sin())]


def _labels(N: int, V: int, ignored: int) -> Any:
    torch = _torch()
    labels = torch.randint(0, V, (N,))
    labels[torch.randperm(N)[:ignored]] = -100
    return labels


def _in_a_network(swiglu: Callable[..., Any]) -> Callable[..., Any]:
    """The gated network around it, with matrices that are not scaled."""

    def network(x: Any, gate: Any, up: Any, down: Any) -> Any:
        return swiglu(x @ gate.T, x @ up.T) @ down.T

    return network


def _ones(out: Any) -> Any:
    return _torch().ones_like(out)


def _expanded(out: Any) -> Any:
    """The gradient that `.sum()` hands on: one number with strides of 0."""
    return _torch().ones((), dtype=out.dtype).expand(out.shape)


def _liger(dtype: str) -> Iterator[Case]:
    torch, narrow = _torch(), dtype == "bfloat16"
    rule = _close(2e-1, 2e-2) if narrow else _close(1e-4, 1e-6)
    one = getattr(torch, dtype)
    for x in ((2, 128, 512), (5, 123, 123)):
        ones = [torch.ones(x[-1], dtype=one)]
        yield Case("rms_norm_backward", lambda x=x, w=ones: _normal(dtype, x) + w, rule, (1e-6,))
        yield Case("add_rms_norm_backward", lambda x=x, w=ones: _normal(dtype, x, x) + w, rule, (1e-6,))
    for x in ((2, 2, 8), (9, 7, 41)):
        yield Case("rms_norm_backward", lambda x=x: _normal(dtype, x, x[-1:]), rule, (1e-6,), judged=("x",))
        yield Case("add_rms_norm_backward", lambda x=x: _normal(dtype, x, x, x[-1:]), rule, (1e-6,),
                   judged=("x", "residual"))  # fmt: skip
    fine = _close(2e-2, 2e-2) if narrow else _close(1e-5, 1e-5)
    for x in ((2, 8, 64), (4, 16, 128), (1, 1, 1023), (3, 7, 256), (1, 1, 1500)):
        yield Case("layer_norm_backward", lambda x=x: _normal(dtype, x, x[-1:], x[-1:]), fine, (1e-6,))
    rotation = _close(1e-1 if narrow else 1e-5, 1e-5)
    for B, S, H, K, D in ((1, 128, 32, 32, 64), (2, 128, 32, 8, 64), (3, 50, 73, 213, 92)):
        yield Case(
            "rope_backward",
            lambda B=B, S=S, H=H, K=K, D=D: [
                x.transpose(1, 2) for x in _normal(dtype, (B, S, H, D), (B, S, K, D))
            ] + _tables(dtype, S, D),
            rotation,
            keywords={"interleaved": False},
        )  # fmt: skip
    mlp = _close(1e4, 1e-2) if narrow else _close(1.0, 1e-5)
    for x, F in (((2, 64, 256), 512), ((6, 42, 123), 431)):
        yield Case("swiglu_backward", lambda x=x, F=F: _normal(dtype, x, (F, x[-1]), (F, x[-1]), (x[-1], F)), mlp,
                   inside=_in_a_network)  # fmt: skip
    square = _close(1e-1, 5e-2) if narrow else _close(1e-5, 1e-5)
    for shape in ((2, 8, 4096), (1, 1, 1023), (3, 7, 256), (2, 8)):
        yield Case("relu2_backward", lambda shape=shape: _normal(dtype, shape), square)
    loss = _close(1e-8, 5e-2 if narrow else 1e-6)
    for reduction in ("sum", "mean", "none"):
        for ignored in (0, 100):
            yield Case("cross_entropy_backward",
                       lambda ignored=ignored: [*_normal(dtype, (423, 3200)), _labels(423, 3200, ignored)], loss,
                       keywords={"reduction": reduction}, incoming=_ones)  # fmt: skip
    for N, E, V in ((128, 256, 1024), (188, 31, 123)):
        for reduction, limits in (("mean", (5e-3, 5e-2)), ("sum", (5.0, 50.0))):
            if not narrow:
                limits = {"mean": (1e-5, 5e-4), "sum": (1e-3, 5e-2)}[reduction]
            yield Case(
                "linear_cross_entropy_backward",
                lambda N=N, E=E, V=V: [*_normal(dtype, (N, E)), torch.rand(V, E).to(one), _labels(N, V, N // 3)],
                _close(*limits), keywords={"reduction": reduction}, incoming=_ones,
            )  # fmt: skip
    for shape in ((2, 8), (4, 16), (1, 1023), (3, 7, 256), (1, 4096)):
        yield Case("softmax_backward", lambda shape=shape: _normal(dtype, shape),
                   _close(5e-2, 5e-2) if narrow else _close(1e-5, 1e-5))  # fmt: skip
    if not narrow:
        yield Case("embedding_backward", lambda: [torch.randint(0, 100, (320,)), *_normal(dtype, (100, 64))],
                   _close(1e-6, 1e-5))  # fmt: skip


def _flash_attention(dtype: str) -> Iterator[Case]:
    torch, x = _torch(), (8, 64, 1024)
    of_batch = lambda out: torch.randn_like(out) / 8  # noqa: E731
    rule = _times(2, {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-4}[dtype])
    with_sum: dict[str, Any] = {"incoming": of_batch, "reference": "float32"}
    yield Case("rms_norm_backward", lambda: _normal(dtype, x, x[-1:]), rule, (1e-6,), **with_sum)
    yield Case("layer_norm_backward", lambda: _normal(dtype, x, x[-1:], x[-1:]), rule, (1e-6,), **with_sum)
    yield Case("add_rms_norm_backward", lambda: _normal(dtype, x, x, x[-1:]), rule, (1e-6,), **with_sum)
    yield Case("add_layer_norm_backward", lambda: _normal(dtype, x, x, x[-1:], x[-1:]), rule, (1e-6,), **with_sum)
    for interleaved in (False, True):
        for R in (64, 32):
            yield Case("rope_backward",
                       lambda R=R: [a.transpose(1, 2) for a in _normal(dtype, (4, 217, 4, 64), (4, 217, 4, 64))]
                       + _tables("float32", 217, R), _spacing(1e-3), keywords={"interleaved": interleaved})  # fmt: skip
    limits = (1e-6, 1e-5) if dtype == "float32" else (1e-4, 1e-3)
    yield Case("cross_entropy_backward", lambda: [*_normal(dtype, (512, 5025)), _labels(512, 5025, 10)],
               _close(*limits))  # fmt: skip
    for S, T, D in ((113, 203, 64), (128, 217, 59), (256, 128, 32), (108, 256, 96)):
        for causal in (False, True):
            for K in (6, 2, 1):
                yield Case(
                    "attention_backward",
                    lambda S=S, T=T, D=D, K=K: [
                        a.transpose(1, 2) for a in _normal(dtype, (1, S, 6, D), (1, T, K, D), (1, T, K, D))
                    ],
                    _times(3, 0.0), keywords={"causal": causal}, reference="float32",
                )  # fmt: skip


def _quack(dtype: str) -> Iterator[Case]:
    torch = _torch()
    atol = {"bfloat16": 1e-1, "float16": 1e-2, "float32": 1e-4}[dtype]
    eps = torch.finfo(getattr(torch, dtype)).eps

    def of_weight(M: int) -> Rule:
        def rule(got: Any, right: Any, narrow: Any) -> Any:
            limit = 5e-6 * M**0.5 if dtype == "float32" else 2 * eps * float(right.abs().max())
            return _close(limit, 1e-3)(got, right, narrow)

        return rule

    for M, N in ((1, 4096), (199, 760), (199, 192)):
        x, w = (M, N), (N,)
        yield Case("rms_norm_backward", lambda x=x, w=w: _normal(dtype, x, w), _close(atol, 1e-3), (1e-6,),
                   of_weight=of_weight(M))  # fmt: skip
        yield Case("add_rms_norm_backward", lambda x=x, w=w: _normal(dtype, x, x, w), _close(atol, 1e-3), (1e-6,),
                   of_weight=of_weight(M))  # fmt: skip
        limits = {"bfloat16": (2e-2, 2e-2), "float16": (5e-3, 5e-3), "float32": (1e-4, 1e-4)}[dtype]
        sums = (5e-6 if dtype == "float32" else 1e-3) * M**0.5
        yield Case("layer_norm_backward", lambda x=x, w=w: _normal(dtype, x) + _normal("float32", w, w),
                   _close(*limits), (1e-6,), of_weight=_close(sums, 1e-3), reference="float32")  # fmt: skip
    for M, N in ((1, 1024), (289, 668), (289, 192)):
        for ignored in (0, M * 3 // 10):
            yield Case("cross_entropy_backward",
                       lambda M=M, N=N, ignored=ignored: [*_normal(dtype, (M, N), scale=0.1), _labels(M, N, ignored)],
                       _close(5e-5, 1e-5 if dtype == "float32" else eps), keywords={"reduction": "none"},
                       reference="float32")  # fmt: skip
    for reduction in ("mean", "sum"):
        yield Case(
            "linear_cross_entropy_backward",
            lambda: [*_normal(dtype, (128, 512), scale=0.1), *_normal(dtype, (1536, 512), scale=512**-0.5),
                     _labels(128, 1536, 19)],
            _times(2, 1e-4), keywords={"reduction": reduction}, incoming=_ones, reference="float32",
        )  # fmt: skip
    limit = {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-4}[dtype]
    for x in ((1, 4096), (199, 760), (199, 192)):
        yield Case("softmax_backward", lambda x=x: _normal(dtype, x, scale=0.1), _close(limit, limit))


def _flag_gems(dtype: str) -> Iterator[Case]:
    torch = _torch()
    rtol = {"bfloat16": 0.016, "float16": 1e-3, "float32": 1.3e-6}[dtype]
    one = getattr(torch, dtype)

    def uniform(limit: float, *shapes: tuple[int, ...]) -> list[Any]:
        return [((2 * torch.rand(shape) - 1) * limit).to(one) for shape in shapes]

    def small(out: Any) -> Any:
        return ((2 * torch.rand(out.shape) - 1) * 0.01).to(out.dtype)

    for M, N in ((1, 2), (512, 256), (20, 4099)):
        yield Case("rms_norm_backward", lambda M=M, N=N: uniform(0.1, (M, N), (N,)), _close(1e-4, rtol), (1e-5,),
                   incoming=small, of_weight=_close(1e-4 * N, rtol))  # fmt: skip
    for M, N in ((200, 36), (512, 100), (1, 4099)):
        yield Case("layer_norm_backward", lambda M=M, N=N: _normal(dtype, (M, N), (N,), (N,)), _close(1e-4, rtol),
                   (1e-5,), of_weight=_close(1e-4 * M, rtol), reference="float64")  # fmt: skip
    for M, N in ((1, 2), (512, 256), (64, 4099)):
        for reduction in ("mean", "none", "sum"):
            yield Case("cross_entropy_backward",
                       lambda M=M, N=N: [*_normal(dtype, (M, N)), _labels(M, N, M // 10)], _close(1e-4 * N, rtol),
                       keywords={"reduction": reduction}, reference="float64")  # fmt: skip
        yield Case("softmax_backward", lambda M=M, N=N: _normal(dtype, (M, N)), _close(1e-4 * N, rtol),
                   reference="float64")  # fmt: skip


def _linear_attention() -> Iterator[Case]:
    """Norms, rotations and SwiGLU are tested in float32 there, losses in bfloat16, attention in float16."""
    near = _ratio(1e-3)
    for D in (50, 64, 128):
        x, w = (2, 2, 512, D), (D,)
        yield Case(
            "layer_norm_backward", lambda x=x, w=w: _normal("float32", x, w, w), near, (1e-5,), incoming=_expanded
        )
        yield Case("rms_norm_backward", lambda x=x, w=w: _normal("float32", x, w), near, (1e-5,), incoming=_expanded)
        yield Case("add_layer_norm_backward", lambda x=x, w=w: _normal("float32", x, x, w, w), near, (1e-5,),
                   incoming=_expanded)  # fmt: skip
        yield Case("add_rms_norm_backward", lambda x=x, w=w: _normal("float32", x, x, w), near, (1e-5,),
                   incoming=_expanded)  # fmt: skip
    for B, S, H, D in ((2, 64, 4, 64), (2, 111, 2, 128)):
        yield Case("rope_backward",
                   lambda B=B, S=S, H=H, D=D: [
                       a.transpose(1, 2) for a in _normal("float32", (B, S, H, D), (B, S, H, D))
                   ] + _tables("float32", S, D), _ratio(1e-5), keywords={"interleaved": False})  # fmt: skip
    for D in (64, 500):
        yield Case("swiglu_backward", lambda D=D: _normal("float32", (2, 128, D), (2, 128, D)), near)
    yield Case("cross_entropy_backward", lambda: [*_normal("bfloat16", (256, 3200)), _labels(256, 3200, 2)],
               _ratio(1e-2))  # fmt: skip
    yield Case("linear_cross_entropy_backward",
               lambda: [*_normal("bfloat16", (128, 256), (1000, 256)), _labels(128, 1000, 2)],
               _ratio(1e-2))  # fmt: skip
    for B, T, K, H, D, scale in ((1, 63, 1, 1, 64, 1.0), (3, 111, 2, 2, 100, 1.0), (1, 256, 2, 8, 60, 0.1)):
        yield Case(
            "attention_backward",
            lambda B=B, T=T, K=K, H=H, D=D: [
                a.transpose(1, 2) for a in _normal("float16", (B, T, H, D), (B, T, K, D), (B, T, K, D))
            ],
            _ratio(0.005), keywords={"scale": scale}, reference="float32",
        )  # fmt: skip


PROJECTS: dict[str, Callable[[], Iterator[Case]]] = {
    "Liger-Kernel, bfloat16": lambda: _liger("bfloat16"),
    "Liger-Kernel, float32": lambda: _liger("float32"),
    "FlashAttention, bfloat16": lambda: _flash_attention("bfloat16"),
    "quack, bfloat16": lambda: _quack("bfloat16"),
    "FlagGems, bfloat16": lambda: _flag_gems("bfloat16"),
    "flash-linear-attention": _linear_attention,
}
"""Title -> its cases. What a title says of a dtype is that of the test; else it chooses one for each operator."""
GRADCHECK = "gradcheck"


# -- torch.autograd.gradcheck ------------------------------------------------------------------------------------------


def _gradcheck(operator: str, fn: Callable[..., Any]) -> None:
    """The test as it is called: float64, a few rows, the usual limits. The forward pass runs in float64, whose
    differences are the reference, and `fn` in float32, the widest format that kernels take."""
    torch = _torch()
    torch.manual_seed(0)
    tensors, keywords = _small(operator)
    forward = _eager(operator)

    def in_float32(*arguments: Any, **named: Any) -> Any:
        narrow = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
        got = fn(*narrow, **named)
        return tuple(None if x is None else x.double() for x in (got if isinstance(got, tuple) else (got,)))

    def kept(*arguments: Any, **named: Any) -> Any:
        return (forward(*arguments, **named), None)

    names, asked = list(BACKWARD[operator].forward.parameters), BACKWARD[operator].gradient_of.values()
    arguments = [
        x.requires_grad_() if name in asked or (name == "x" and "s" in asked) else x
        for name, x in zip(names, tensors, strict=False)
    ]
    function = followed(operator, in_float32, kept if BACKWARD[operator].kept else forward)
    assert torch.autograd.gradcheck(lambda *given: function(*given, **keywords), arguments)


def _small(operator: str) -> tuple[list[Any], dict[str, Any]]:
    """A call of the forward operator in float64."""
    torch, name = _torch(), forward_name(operator)
    d = "float64"
    x, w = (3, 6), (6,)
    heads = [*_normal(d, (2, 4, 3, 8), (2, 2, 3, 8))]
    if "norm" in name and "rope" not in name:
        adds, biased = name.startswith("add"), "layer" in name
        return [*_normal(d, *[x] * (1 + adds), *[w] * (1 + biased)), 1e-6], {}
    if name == "rope":
        return heads + _tables(d, 3, 8), {"interleaved": False}
    if name == "norm_rope":
        return heads + _normal(d, (4, 8), (2, 8)) + [*_tables(d, 3, 8), 1e-6], {"norm": "rms", "interleaved": False}
    if name == "rms_norm_qkv_rope":
        matrix = _normal(d, (2, 3, 6), (6,), (32, 6), (32,))
        return [*matrix, *_tables(d, 3, 4), 1e-6], {"num_heads": 4, "num_kv_heads": 2, "interleaved": False}
    if name == "attention":
        return _normal(d, (2, 4, 3, 8), (2, 2, 3, 8), (2, 2, 3, 8)), {}
    if name == "decode_attention":
        return [*_normal(d, (2, 4, 2, 8), (2, 2, 5, 8), (2, 2, 5, 8)), torch.tensor([5, 5])], {}
    if name == "cross_entropy":
        return [*_normal(d, (4, 6)), _labels(4, 6, 1)], {}
    if name == "linear_cross_entropy":
        return [*_normal(d, (4, 6), (5, 6)), _labels(4, 5, 1)], {}
    if name == "linear":
        return _normal(d, x, (4, 6), (4,)), {}
    if name == "embedding":
        return [torch.tensor([0, 2, 1]), *_normal(d, (4, 6))], {}
    return _normal(d, *[x] * (1 + (name == "swiglu"))), {}
