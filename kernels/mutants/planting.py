"""How a mistake is planted in a plain Torch operator: by a change of its source, or around a call of the right one.

    changed("rms_normed", " + eps", "")    # in the function rms_normed of kernels/plain, whoever calls it
    before(as_if_dense)                    # the arguments are changed, then the right operator runs
    after(unwritten_tail(64))              # the right operator runs, then its results are changed
    instead(function)                      # a function that is written out

Each of these is a *way*: given the name of an operator it makes the wrong function.
"""

import ast
import functools
import itertools
import linecache
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from refllm.errors import RefllmError
from refllm.kernels import plain
from refllm.kernels.mutants import Mutant

Function = Callable[..., Any]
Way = Callable[[str], Function]
_FORWARD = ("norm", "activation", "rope", "attention", "loss")
_FILES = (*_FORWARD, "wide", "linear_backward", *(f"{name}_backward" for name in _FORWARD))
"""The files of kernels/plain, in an order in which each needs only those before it."""
_OWN_IMPORT = "from refllm.kernels.plain."
_counter = itertools.count(1)


def planter(operator: str) -> Callable[..., Mutant]:
    """plant(name, what, source, way, dtypes=..., equivalent=...): makes the `Mutant`s of one operator."""

    def plant(name: str, what: str, source: str, way: Way, **more: Any) -> Mutant:
        return Mutant(name, operator, "torch", what, source, functools.cache(lambda: way(operator)), **more)

    return plant


def instead(wrong: Function) -> Way:
    """A function that is written out, in place of the operator."""
    return lambda operator: lambda *arguments, **keywords: wrong(*arguments, **keywords)


# -- a change of the source --------------------------------------------------------------------------------------------


def changed(function: str, *replacements: str) -> Way:
    """Replaces text in the body of one function of kernels/plain: old, new, old, new ... Each old is there once.

    The new text may use `whole_tiles`, `scratch` and `narrow_sum` of this module. Building raises RefllmError if an
    old text is not there, or there twice: the function was changed, and the mutant must follow it.
    """

    def way(operator: str) -> Function:
        source, part = _source(), _function_text(function)
        new = part
        for old, replacement in zip(replacements[::2], replacements[1::2], strict=True):
            if new.count(old) != 1:
                raise RefllmError(f"mutant of {operator}: {old!r} is {new.count(old)} times in {function}, expected 1")
            new = new.replace(old, replacement)
        return _run(source.replace(part, new), operator)

    return way


@functools.cache
def _source() -> str:
    """All of kernels/plain as one text, so that a change in one file reaches the operators of another."""
    folder = Path(str(plain.__file__)).parent
    lines = "\n".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in _FILES).splitlines()
    return "\n".join(line for line in lines if not line.startswith(_OWN_IMPORT)) + "\n"


@functools.cache
def _tree() -> ast.Module:
    return ast.parse(_source())


def _function_text(name: str) -> str:
    """The body of a function, without its docstring, to the end of its last line."""
    for node in _tree().body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = node.body[1 if ast.get_docstring(node) else 0]
            return "\n".join(_source().splitlines()[first.lineno - 1 : node.end_lineno]) + "\n"
    raise RefllmError(f"kernels/plain has no function {name}")


def _run(source: str, operator: str) -> Function:
    file = f"<mutant {next(_counter)} of {operator}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # so that tracebacks show it
    names: dict[str, Any] = {"whole_tiles": whole_tiles, "scratch": scratch, "narrow_sum": narrow_sum}
    exec(compile(source, file, "exec"), names)
    return names[operator]


def whole_tiles(x: torch.Tensor, block: int, axis: int = -1) -> torch.Tensor:
    """x without the last, partial tile along `axis`; all of x where there is no whole tile."""
    length = x.shape[axis]
    return x.narrow(axis, 0, length - length % block if length > block else length)


def scratch(x: torch.Tensor) -> torch.Tensor:
    """Memory like x that nobody has written to, as torch.empty gives it after other work."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def narrow_sum(terms: torch.Tensor, rows: int = 8) -> torch.Tensor:
    """The sum over the first axis, kept in bfloat16 after every `rows` rows, as blocks that add to one buffer do."""
    total = torch.zeros(terms.shape[1:], dtype=torch.bfloat16)
    for block in terms.split(rows):
        total = (total.to(terms.dtype) + block.sum(0)).bfloat16()
    return total.to(terms.dtype)


# -- around a right call -----------------------------------------------------------------------------------------------


def before(change: Callable[..., tuple[Any, ...]]) -> Way:
    """The right operator on other arguments: change(*arguments) gives the new positional ones."""

    def way(operator: str) -> Function:
        right = getattr(plain, operator)

        def wrong(*arguments: Any, **keywords: Any) -> Any:
            return right(*change(*arguments), **keywords)

        return wrong

    return way


def after(change: Callable[..., torch.Tensor | None], output: int = 0) -> Way:
    """Another result: change(y, *arguments) replaces output number `output` (the loss, if there is but one)."""

    def way(operator: str) -> Function:
        right = getattr(plain, operator)

        def wrong(*arguments: Any, **keywords: Any) -> Any:
            got = right(*arguments, **keywords)
            if not isinstance(got, tuple):
                return change(got, *arguments)
            if got[output] is None:
                return got
            return (*got[:output], change(got[output], *arguments), *got[output + 1 :])

        return wrong

    return way


def as_if_dense(number: int) -> Callable[..., tuple[Any, ...]]:
    """A `before`: argument `number` is read from its first address on, as if its elements lay one after another."""

    def change(*arguments: Any) -> tuple[Any, ...]:
        x = arguments[number]
        if not x.is_contiguous() and x.numel():
            held = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
            flat = x.as_strided((min(x.numel(), held),), (1,))
            x = torch.cat([flat, flat.new_full((x.numel() - len(flat),), 7.0)]).view(x.shape)
        return (*arguments[:number], x, *arguments[number + 1 :])

    return change


def strides_of(number: int, other: int) -> Callable[..., tuple[Any, ...]]:
    """A `before`: argument `number` is read from its first address on with the strides of argument `other`."""

    def change(*arguments: Any) -> tuple[Any, ...]:
        x, steps = arguments[number], arguments[other].stride()
        if x.stride() != steps and x.numel():
            at = torch.zeros(x.shape, dtype=torch.int64)
            for axis, (length, step) in enumerate(zip(x.shape, steps, strict=True)):
                at += (torch.arange(length) * step).view(-1, *[1] * (x.ndim - axis - 1))
            held = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
            found = x.as_strided((held,), (1,))[at.clamp(max=held - 1)]
            x = torch.where(at < held, found, torch.full_like(found, 7.0))
        return (*arguments[:number], x, *arguments[number + 1 :])

    return change


def refuse_empty(*arguments: Any) -> tuple[Any, ...]:
    """A `before`: a grid of no programs cannot be launched."""
    if not arguments[0].numel():
        raise RuntimeError("CUDA error: invalid configuration argument")
    return arguments


def unwritten_tail(block: int, axis: int = -1) -> Callable[..., torch.Tensor]:
    """An `after`: the last, partial tile along `axis` is never stored."""

    def change(y: torch.Tensor, *_: Any) -> torch.Tensor:
        out, done = scratch(y), whole_tiles(y, block, axis)
        out.narrow(axis, 0, done.shape[axis]).copy_(done)
        return out

    return change


def zero_tail(block: int, axis: int = -1) -> Callable[..., torch.Tensor]:
    """An `after`: the last, partial tile along `axis` stays at the zeros that the result was made with."""

    def change(y: torch.Tensor, *_: Any) -> torch.Tensor:
        out, done = torch.zeros_like(y), whole_tiles(y, block, axis)
        out.narrow(axis, 0, done.shape[axis]).copy_(done)
        return out

    return change


def kept_first(axis: int) -> Callable[..., torch.Tensor]:
    """An `after`: what comes after the first entry along `axis` is a copy of it, as with a stride of 0."""

    def change(y: torch.Tensor, *_: Any) -> torch.Tensor:
        return y if y.ndim <= -axis or not y.numel() else y.narrow(axis, 0, 1).expand_as(y).contiguous()

    return change


def over_input(number: int) -> Callable[..., torch.Tensor]:
    """An `after`: the result is also written over argument `number`, whose memory was used for it."""

    def change(y: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if 0 not in arguments[number].stride():
            arguments[number].copy_(y.to(arguments[number].dtype))
        return y

    return change


def in_memory_of(number: int) -> Callable[..., torch.Tensor]:
    """An `after`: the result is argument `number`, whose memory it was written into."""

    def change(y: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return y if 0 in arguments[number].stride() else arguments[number].copy_(y)

    return change


def added_to_before() -> Callable[..., torch.Tensor]:
    """An `after`: the buffer is not cleared, so that a result is added to that of the last call of the same shape."""
    kept: dict[tuple[int, ...], torch.Tensor] = {}

    def change(y: torch.Tensor, *_: Any) -> torch.Tensor:
        total = y + kept[shape] if (shape := tuple(y.shape)) in kept else y
        kept[shape] = total
        return total.clone()

    return change


def missing(*_: Any) -> None:
    """An `after`: no gradient is returned."""


def zeros(y: torch.Tensor, *_: Any) -> torch.Tensor:
    """An `after`: the gradient is 0 everywhere."""
    return torch.zeros_like(y)


def without_nan(y: torch.Tensor, *_: Any) -> torch.Tensor:
    """An `after`: a NaN becomes 0."""
    return torch.where(y.isnan(), torch.zeros_like(y), y)


def in_float32(y: torch.Tensor, *_: Any) -> torch.Tensor:
    """An `after`: the result is not in the dtype of the input."""
    return y.float()


def flattened(y: torch.Tensor, *_: Any) -> torch.Tensor:
    """An `after`: the leading axes are merged into one and not parted again."""
    return y.reshape(-1, y.shape[-1]) if y.shape[-1] else y.reshape(0, 0)


_calls = itertools.count()


def unsteady(y: torch.Tensor, *_: Any) -> torch.Tensor:
    """An `after`: every second time the last bit of the first element is another, as sums through atomics are.

    In float32 either is right; in a narrow format, where one rounding is all that is allowed, one of them is wrong.
    """
    other = torch.nextafter(y, torch.full_like(y, float("inf")))
    first = (torch.arange(y.numel()) == 0).view(y.shape)
    return torch.where(first, other, y) if next(_calls) % 2 else y
