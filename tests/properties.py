"""What the property tests share: the three backends behind one call, drawn tests for each, and when two results agree.

Two results that should be the same number are compared in units of their predicted rounding errors
(`refllm.accuracy.operator`), or bit for bit where that is promised.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from where_kernels_run import DEVICE, running

from refllm import kernels, ops
from refllm.accuracy.limits import chance
from refllm.accuracy.operator import predict
from refllm.inputs import to_numpy
from refllm.kernels import plain
from refllm.precision import FUSED
from refllm.strategies import Call, calls, corners

NUMPY, PLAIN, TRITON = BACKENDS = ("numpy", "plain", "triton")
DTYPES = ("bfloat16", "float16", "float32")
LARGEST, TYPICAL = 8.0, 2.0
"""Sigma that one element, and that the root mean square of all elements, may differ by. Of a million normal numbers the
largest is 5; results are sums of few roundings, whose tails are no longer."""


class Backend:
    """One backend in one dtype: `backend(operator, *arrays, **keywords)` gives a tuple of arrays.

    numpy: the definition, in float64. plain, triton: Torch tensors of the dtype; Triton runs interpreted without a GPU.
    """

    def __init__(self, name: str, dtype: str) -> None:
        self.name, self.dtype = name, "float64" if name == NUMPY else dtype

    def __call__(self, operator: str, *arguments: Any, **keywords: Any) -> tuple[np.ndarray, ...]:
        if self.name == NUMPY:
            with np.errstate(all="ignore"):
                return _tuple(getattr(ops, operator)(*arguments, **keywords))
        tensors = [self.tensor(x) for x in arguments]
        return self.on_tensors(operator, tensors, {name: self.tensor(x) for name, x in keywords.items()})

    def on_tensors(self, operator: str, tensors: Sequence[Any], keywords: dict[str, Any]) -> tuple[np.ndarray, ...]:
        """The same for arguments that are tensors already."""
        with running():
            form = getattr(plain if self.name == PLAIN else kernels, operator)
            return tuple(map(to_numpy, _tuple(form(*tensors, **keywords))))

    def tensor(self, x: Any) -> Any:
        """An array as a tensor: floating values in the dtype, others as they are."""
        if not isinstance(x, np.ndarray):
            return x
        tensor = torch.from_numpy(np.array(x)).to(DEVICE)
        return tensor.to(getattr(torch, self.dtype)) if tensor.is_floating_point() else tensor

    def sigma(self, operator: str, *arguments: Any, **keywords: Any) -> list[np.ndarray]:
        """The predicted rounding error of each output, element by element."""
        return [p.sigma for p in predict(operator, arguments, keywords, dtype=self.dtype, policy=FUSED)]


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def agree(a: np.ndarray, b: np.ndarray, *sigmas: np.ndarray | float) -> None:
    """a and b are the same numbers, up to errors of these sizes."""
    a, b = np.float64(a), np.float64(b)
    assert a.shape == b.shape
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    error = np.where((a == b) | np.isnan(a), 0, np.abs(np.where(a == b, 0, a) - np.where(a == b, 0, b)))
    sigma = np.sqrt(sum(np.square(np.float64(s)) for s in sigmas) + np.zeros(a.shape))
    assert not (error[sigma == 0]).any(), "these must be equal to the last bit"
    z = error[sigma > 0] / sigma[sigma > 0]
    assert z.max(initial=0) <= LARGEST, f"largest difference {z.max():.3g} sigma"
    typical = np.sqrt(np.mean(z * z) if z.size else 0)
    rows = a.size // a.shape[-1] if z.size and a.ndim else 1  # the error of a sum is common to a row
    assert typical <= TYPICAL * (1 + chance(rows, measured=2)), f"typical difference {typical:.3g} sigma"


def same(a: np.ndarray, b: np.ndarray) -> None:
    """a and b are the same to the last bit; NaN equals NaN, and 0 equals -0."""
    np.testing.assert_array_equal(a, b)


def some_calls(operator: str, *kinds: str, where: Callable[[Call], bool] = lambda _: True) -> st.SearchStrategy[Call]:
    """Calls of these kinds (all: the plain one) in any dtype, in which nothing is empty and `where` holds."""

    def full(call: Call) -> bool:
        return all(0 not in getattr(x, "shape", ()) for x in call.arguments) and where(call)

    def drawn() -> list[st.SearchStrategy[Call]]:
        return [calls(operator, dtype=dtype, kind=kind) for kind in kinds or ("plain",) for dtype in DTYPES]

    return st.deferred(lambda: st.one_of(drawn()).filter(full))  # hundreds of strategies: made where one is used


def known_call(operator: str, kind: str, dtype: str = "bfloat16") -> Call:
    """The fixed call of that kind, for an example that is to be there whatever is drawn."""
    (call,) = (c for c in corners(operator, dtype) if c.kind == kind)
    return call


class Chosen:
    """In the place of `st.data()` in a known example: what is drawn under a label is what was written down here."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def draw(self, strategy: Any, label: str) -> Any:
        """The value of that label; KeyError for one that the example does not choose."""
        return self._values[label]

    def __repr__(self) -> str:
        return f"Chosen({', '.join(f'{name}={value!r}' for name, value in self._values.items())})"


def how_many(few: int) -> settings:
    """So many examples in CI, and more in a long run in the proportion of its profile: the first one that Hypothesis
    draws is always the smallest, which shows little."""
    return settings(settings(), max_examples=few * settings().max_examples // settings.get_profile("ci").max_examples)


def for_every_backend(
    *, examples: int = 6, interpreted: int = 3, known: Sequence[Any] = (), **drawn: Any
) -> Callable[[Callable[..., None]], Any]:
    """Make f(backend, **drawn) a test of each backend.

    The argument `call`, if there is one, is a `Call`, and says the dtype; else `dtype` does. examples, interpreted: how
    many are drawn per run (`how_many`), the latter for Triton without a GPU. known: examples, as dictionaries, that
    come first: those that once failed, and one at the sizes that the property is about, which few draws may miss.
    """

    def decorate(f: Callable[..., None]) -> Any:
        @pytest.mark.hypothesis
        @pytest.mark.parametrize("name", BACKENDS)
        def test(name: str) -> None:
            def property_holds(**values: Any) -> None:
                dtype = values["call"].dtype if "call" in values else values["dtype"]
                f(Backend(name, dtype), **values)

            property_holds.__name__ = f"{f.__name__}_{name}"  # each draws examples of its own
            run = given(**drawn)(property_holds)
            for values in known:
                run = example(**values)(run)
            few = interpreted if name == TRITON and DEVICE == "cpu" else examples
            how_many(few)(run)()

        test.__name__, test.__doc__ = f.__name__, f.__doc__
        return test

    return decorate
