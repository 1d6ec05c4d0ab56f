"""A call, or what came out of it, that was dumped from a real run: a safetensors file of the operator's arguments.

Tensors have the names of the contract (x, weight, q, k, ...; `refllm check-op --list`); what is no tensor (eps, causal,
num_heads) stands in the metadata of the file, or is said beside it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from refllm.errors import CheckpointError, InputError
from refllm.inputs import to_numpy
from refllm.opcheck.api import OpReport, check_op
from refllm.ops.contracts import contract_of
from refllm.storage import input_file
from refllm.storage.safetensors_format import read_header
from refllm.strategies.arrays import FLOATS, Array
from refllm.strategies.call import Call, argument_names

_INTEGERS = ("int64", "int32", "int16", "int8", "uint8")


@dataclass(frozen=True)
class Dumped(Array):
    """An array that is read from a file. file, name: where it is, and what it is called there."""

    file: str = ""
    name: str = ""

    def _base(self) -> np.ndarray:
        return np.asarray(_tensors(self.file)[0][self.name], np.float64)

    def code(self, name: str, device: str = "cpu", numpy: bool = False) -> list[str]:
        """Python lines that read it; they need safetensors."""
        there = "" if device == "cpu" else f".to({device!r})"
        return [
            "from safetensors import safe_open",
            f'with safe_open({self.file!r}, "{"np" if numpy else "pt"}") as file:',
            f"    {name} = file.get_tensor({self.name!r}){there}",
        ]


def check_dumped(
    operator: str,
    file: str | os.PathLike[str],
    candidate: Any = None,
    *,
    output: str | Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    arrays: str = "torch",
    **options: Any,
) -> OpReport:
    """Judge a call that was dumped from a real run: what a candidate makes of it, or the result that was dumped too.

    file: a safetensors file of the arguments. output: the names of the results in it, in the order of the contract;
    then no candidate is run. values: of what is no tensor, by name, beside those in the metadata. options: of
    `refllm.check.check_op`. All levels count, and nothing is made smaller.

    Raises InputError for a file that is no such call.
    """
    where = os.path.abspath(os.fspath(file))
    output = (output,) if isinstance(output, str) else tuple(output)
    call = _call(operator, where, dict(values or {}), output)
    if (candidate is None) == (not output):
        raise InputError(f"{file}: name a candidate that is to make the call, or the --output that was recorded")
    fixed: dict[str, Any] = {"calls": [call], "dtype": call.dtype, "level": "hostile", "shrink": False}
    fixed["max_examples"] = options.pop("max_examples", 100)
    if candidate is not None:
        return check_op(operator, candidate, arrays=arrays, **fixed, **options)
    results = tuple(_tensors(where)[0][name] for name in output)

    def recorded(*_: Any, **__: Any) -> Any:
        return results if len(results) > 1 else results[0]

    recorded.__qualname__ = f"{os.path.basename(where)}:{', '.join(output)}"
    told = check_op(operator, recorded, arrays="numpy", deep=False, isolate=False, **fixed, **options)
    # There is no candidate that a program could call.
    return replace(told, repro="", findings=tuple(replace(one, repro="") for one in told.findings))


def _tensors(where: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a file that is not trusted; bfloat16 as that of ml_dtypes. Raises InputError."""
    try:
        status = os.stat(where)
    except OSError as error:
        raise InputError(f"{where} cannot be read as tensors: {error.strerror}") from None
    return _read(where, (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=2)
def _read(where: str, stamp: tuple[int, int]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """See `_tensors`. stamp: of the file as it is now."""
    import ml_dtypes  # noqa: F401 (gives NumPy its bfloat16)
    from safetensors import SafetensorError, safe_open

    try:
        input_file.must_be_regular(where)
        with open(where, "rb") as raw:
            infos, metadata = read_header(raw, where)
        with safe_open(where, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in infos}, metadata
    except (OSError, SafetensorError, CheckpointError, ValueError, TypeError) as error:
        raise InputError(f"{where} cannot be read as tensors: {getattr(error, 'strerror', None) or error}") from None


def _call(operator: str, where: str, values: dict[str, Any], output: Sequence[str]) -> Call:
    known = contract_of(operator)
    tensors, metadata = _tensors(where)
    values = {name: _value(text) for name, text in metadata.items() if name in known.parameters} | values
    strange = [name for name in tensors if name not in (*known.arguments, *known.outputs, *output)]
    strange += [name for name in values if name not in known.parameters]
    if strange or any(name not in tensors for name in output):
        said = strange or [name for name in output if name not in tensors]
        raise InputError(f"{where}: {', '.join(said)}: expected the arguments of {known.text}, and what --output names")

    def argument(name: str) -> Any:
        if name in tensors:
            return _array(tensors[name], where, name)
        parameter = known.parameters[name]
        if name in values:
            return values[name]
        if parameter.default is parameter.empty and known.kind(name) != "bias":
            raise InputError(
                f"{where}: {name} is missing; expected a tensor or a value of that name for {known.text} "
                f"(--value {name}=...)"
            )
        return None if parameter.default is parameter.empty else parameter.default

    positional = argument_names(operator)
    named = [name for name in known.parameters if name not in positional]
    given = [name for name in named if name in tensors or name in values or _needed(known.parameters[name])]
    arguments = tuple(argument(name) for name in positional)
    first = arguments[0]
    if not isinstance(first, Dumped) or first.dtype not in FLOATS:
        raise InputError(f"{where}: {positional[0]}: expected a tensor of floating-point numbers")
    return Call(operator, first.dtype, arguments, tuple((name, argument(name)) for name in given), "dumped")


def _needed(parameter: Any) -> bool:
    return bool(parameter.default is parameter.empty)


def _array(x: np.ndarray, where: str, name: str) -> Dumped:
    dtype = "int64" if x.dtype.name in _INTEGERS else x.dtype.name
    if dtype not in (*FLOATS, "int64", "bool"):
        raise InputError(f"{where}: {name} is {dtype}; expected {', '.join(FLOATS)}, integers or booleans")
    finite = to_numpy(x.astype(np.float32) if dtype == "bfloat16" else x)
    planted = () if np.isfinite(finite).all() else (((), float("nan")),)
    return Dumped(tuple(x.shape), dtype, planted=planted, file=where, name=name)


def _value(text: str) -> Any:
    """A number, true, false, null, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def values_of(words: Sequence[str]) -> dict[str, Any]:
    """What NAME=VALUE says. Raises InputError for anything else."""
    wrong = next((word for word in words if "=" not in word), None)
    if wrong is not None:
        raise InputError(f"--value {wrong}: expected NAME=VALUE, as eps=1e-6")
    return {name.strip(): _value(text.strip()) for name, _, text in (word.partition("=") for word in words)}
