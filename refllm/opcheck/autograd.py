"""A forward function as its backward operator: autograd follows it, and its gradients are what is judged.

    Autograd("rms_norm", my_rms_norm)(dy, x, weight, eps)      # (dx, dweight), as refllm.ops.rms_norm_backward has them

Beside the values there is what only autograd can get wrong, asked by `further`: a second backward pass over a graph
that was kept gives the same; a tensor that is frozen changes no gradient of the others, and its own is not computed; a
tensor that is two arguments at once has the sum of both gradients; and a forward pass that is run again (checkpointing)
gives what the first one gave.
"""

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from refllm.errors import InputError, RefllmError
from refllm.ops.backward_contracts import BACKWARD, FORWARDS, BackwardContract
from refllm.ops.contracts import without_axes

Further = tuple[str, str]
"""A property that is broken, and how, in one clause."""
_SMALL = 4096
"""Elements of all tensors up to which a call is made the ten more times that `further` takes."""
_PRODUCTS = {"linear": "weight", "rms_norm_qkv_rope": "w_qkv", "linear_cross_entropy": "weight"}
"""Operators with a gradient that is a matrix product, which can be counted: of which argument."""


class BrokenError(RefllmError):
    """What keeps a gradient from being had at all. property: of `refllm.opcheck.examine`."""

    def __init__(self, property: str, text: str) -> None:
        super().__init__(text)
        self.property = property


def find_differentiable(operator: str, dtype: str = "float32") -> BackwardContract:
    """The record of the backward pass of a forward operator. Raises InputError where there is none."""
    if operator not in FORWARDS:
        raise InputError(f"{operator} --backward: there is a backward pass of {', '.join(FORWARDS)}")
    if operator == "softmax" and dtype != "float32":
        raise InputError(
            "softmax --backward: its gradient is a function of its rounded result; check softmax_backward, or this "
            "with --dtype float32"
        )
    return BACKWARD[f"{operator}_backward"]


class Autograd:
    """See the module docstring. Instances are called as the backward operator is."""

    def __init__(self, operator: str, function: Callable[..., Any]) -> None:
        self.operator, self.function, self.__wrapped__ = operator, function, function
        self.known = find_differentiable(operator)
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.__qualname__ = f"{getattr(function, '__qualname__', self.__name__)}, by autograd"
        self.__module__ = getattr(function, "__module__", type(function).__module__)

    def __call__(self, *arguments: Any, **keywords: Any) -> tuple[Any, ...]:
        """The gradients of the tensor arguments in order; None for what has none."""
        run = _Pass(self, arguments, keywords)
        return run.gradients()

    def further(self, make: Callable[[], tuple[list[Any], dict[str, Any]]]) -> Further | None:
        """The first of the other properties that is broken. make: the arguments of a call, anew each time."""
        import torch

        arguments, keywords = make()
        tensors = [x for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor)]
        if sum(x.numel() for x in tensors) > _SMALL or not all(x.numel() for x in tensors):
            return None
        with torch.no_grad():
            first = self._pass(make).gradients()
            for broken in self._questions(make, first):
                if broken is not None:
                    return broken
        return None

    def _pass(self, make: Any, function: Any = None, frozen: str = "") -> "_Pass":
        arguments, keywords = make()
        return _Pass(self, arguments, keywords, function, frozen)

    def _questions(self, make: Any, first: tuple[Any, ...]) -> Iterator[Further | None]:
        if not _is_compiled(self.function):  # a compiled backward pass gives its buffers away
            yield self._second_backward(make, first)
            yield self._recomputed(make, first)
        yield from (self._frozen(make, first, i) for i, d in enumerate(first) if d is not None)
        yield from (self._shared(make, i, j) for i, j in combinations(range(len(first)), 2))

    def _second_backward(self, make: Any, first: tuple[Any, ...]) -> Further | None:
        run = self._pass(make)
        run.gradients(retain=True)
        again = _attempt(run.again, "a second backward pass over a graph that was kept")
        if isinstance(again, str):
            return "second backward", again
        name = self._different(first, again)
        return _said(name, "second backward", f"a second backward pass over a graph that was kept gives another {name}")

    def _recomputed(self, make: Any, first: tuple[Any, ...]) -> Further | None:
        from torch.utils.checkpoint import checkpoint

        def function(*arguments: Any, **keywords: Any) -> Any:
            return checkpoint(self.function, *arguments, use_reentrant=False, **keywords)

        run = _attempt(lambda: self._pass(make, function=function).gradients(), "checkpointed, it")
        if isinstance(run, str):
            return "recomputation", run
        name = self._different(first, run)
        return _said(name, "recomputation", f"a forward pass that is run again (checkpointing) gives another {name}")

    def _frozen(self, make: Any, first: tuple[Any, ...], i: int) -> Further | None:
        import torch

        frozen = list(self.known.gradient_of.values())[i]
        others = [n for n, d in enumerate(first) if d is not None and n != i]
        if not others:
            return None
        run = _attempt(lambda: self._pass(make, frozen=frozen).gradients(), f"with {frozen} frozen, it")
        if isinstance(run, str):
            return "frozen tensor", run
        for n in others:
            if run[n] is None or not torch.equal(_plain(run[n]), _plain(first[n])):
                name = list(self.known.outputs)[n]
                return "frozen tensor", f"{name} is another one where {frozen} is frozen (asks for no gradient)"
        if frozen == _PRODUCTS.get(self.operator):
            full, less = (self._flops(make, name) for name in ("", frozen))
            if full and less >= full:
                return "needless gradient", f"the gradient of {frozen} is computed though it is frozen ({less} flops)"
        return None

    def _flops(self, make: Any, frozen: str) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self._pass(make, frozen=frozen).gradients()
        return int(counter.get_total_flops())

    def _shared(self, make: Any, i: int, j: int) -> Further | None:
        """One tensor as two arguments, beside a copy of it as the second."""
        import torch

        one, two = (list(self.known.gradient_of.values())[n] for n in (i, j))
        apart = self._pass(make)
        if not {one, two} <= set(apart.leaves):
            return None
        a, b = apart.leaves[one], apart.leaves[two]
        if a.shape != b.shape or a.dtype != b.dtype:
            return None
        apart.put(two, a.detach().clone())
        sums = apart.gradients()
        together = self._pass(make)
        together.share(one, two)
        found = together.gradients()
        if sums[i] is None or sums[j] is None or found[i] is None:
            return None
        want, got = (sums[i] + sums[j]).double(), found[i].double()
        if not (want.isfinite().all() and sums[i].isfinite().all() and sums[j].isfinite().all()):
            return None
        size = max(float(want.abs().max()), float(sums[i].abs().max()), float(sums[j].abs().max()))
        if torch.allclose(got, want, rtol=0, atol=4 * size * torch.finfo(a.dtype).eps, equal_nan=True):
            return None
        return "shared tensor", f"one tensor as {one} and {two} does not get the sum of both gradients"

    def _different(self, first: tuple[Any, ...], again: tuple[Any, ...]) -> str:
        import torch

        pairs = zip(self.known.outputs, first, again, strict=True)
        there = [(n, a, b) for n, a, b in pairs if a is not None]
        return next((n for n, a, b in there if b is None or not torch.equal(_plain(a), _plain(b))), "")


class _Pass:
    """One forward pass, and the backward pass through it. leaves: the arguments that are to have a gradient."""

    def __init__(
        self, of: Autograd, arguments: Any, keywords: dict[str, Any], function: Any = None, frozen: str = ""
    ) -> None:
        import torch

        self.of, self.function, self.frozen = of, function or of.function, frozen
        known = of.known
        given = {without_axes(name): x for name, x in known.bound(list(arguments), keywords).items()}
        self.incoming = [given[name] for name in known.incoming if given.get(name) is not None]
        self.given = {name: given.get(name) for name in known.forward.parameters if name in given}
        for name, d in zip(known.forward.arguments, self.incoming, strict=False):
            if name not in given:  # a rotation does not depend on what it rotates, and a softmax is given itself
                self.given[name] = _stand_in(d, given.get("p"))
        self.said = {n for n in keywords if n in known.forward.parameters}
        self.leaves: dict[str, Any] = {}
        for name in known.gradient_of.values():
            x = self.given.get(name)
            if isinstance(x, torch.Tensor):
                self.put(name, x)
        if given.get("dlse") is not None:
            self.given["return_lse"] = True
            self.said |= {"return_lse"}

    def put(self, name: str, x: Any) -> None:
        """x as an argument, a leaf in the same memory."""
        self.leaves[name] = self.given[name] = x.detach().requires_grad_(name != self.frozen)

    def share(self, one: str, two: str) -> None:
        """The first as both."""
        self.given[two] = self.given[one]
        del self.leaves[two]

    def gradients(self, retain: bool = False) -> tuple[Any, ...]:
        """One per tensor argument, None for what has none."""
        import torch

        parameters = self.of.known.forward.parameters.values()
        names = [(without_axes(p.name), p.kind is p.KEYWORD_ONLY) for p in parameters]
        arguments = [self.given[name] for name, named in names if not named and name in self.given]
        keywords = {name: self.given[name] for name, named in names if named and name in self.said}
        with torch.enable_grad():
            out = self.function(*arguments, **keywords)
        out = tuple(out) if isinstance(out, tuple | list) else (out,)
        self._through(out)
        return self._backward(retain)

    def again(self) -> tuple[Any, ...]:
        """The backward pass once more, over the graph that was kept."""
        return self._backward(retain=False)

    def _through(self, out: tuple[Any, ...]) -> None:
        """Checks what came back, and pairs it with the incoming gradients."""
        names = list(self.of.known.forward.outputs)
        if len(out) != len(self.incoming):
            raise BrokenError("result", f"it returns {len(out)} results; the contract has {len(self.incoming)}")
        self.pairs = []
        for name, y, d in zip(names[: len(out)], out, self.incoming, strict=True):
            if not hasattr(y, "requires_grad"):
                raise BrokenError("result", f"{name} is a {type(y).__name__}; autograd follows tensors alone")
            if tuple(y.shape) != tuple(d.shape):
                raise BrokenError("result", f"{name} has the shape {list(y.shape)}; expected {list(d.shape)}")
            if not y.requires_grad and self.frozen:
                continue
            if not y.requires_grad:
                raise BrokenError("missing gradient", f"no gradient flows back through {name}: it requires none")
            self.pairs.append((y, d.to(y.dtype)))

    def _backward(self, retain: bool) -> tuple[Any, ...]:
        import torch

        leaves = {name: x for name, x in self.leaves.items() if x.requires_grad}
        ys, ds = zip(*self.pairs, strict=True)
        found = torch.autograd.grad(ys, list(leaves.values()), ds, allow_unused=True, retain_graph=retain)
        by_name = dict(zip(leaves, found, strict=True))
        return tuple(by_name.get(of) for of in self.of.known.gradient_of.values())


def _stand_in(d: Any, p: Any) -> Any:
    """What was rotated, which no gradient depends on; or the scores that have these weights."""
    import torch

    if p is not None:
        return p.log()
    ramp = torch.linspace(-1, 1, max(1, d.numel()), device=d.device)[: d.numel()]
    return ramp.reshape(d.shape).to(d.dtype)


def _said(name: str, property: str, text: str) -> Further | None:
    return (property, text) if name else None


def _attempt(run: Callable[[], Any], subject: str) -> Any:
    """What it returns, or a sentence about what it raised."""
    try:
        return run()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{subject} raises {type(error).__name__}: {lines[0]}"[:300]


def _is_compiled(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable") or hasattr(function, "_orig_mod")


def _plain(x: Any) -> Any:
    """Numbers that can be compared: NaN equals NaN."""
    return x.detach().double().nan_to_num(nan=1.25e300)
