"""How a torch module is called: which of its arguments are token ids, masks and positions, and what it returns."""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.check.functions import result_and_cache
from refllm.check.inputs import FAR
from refllm.check.misbehaviour import misbehaves
from refllm.check.taps import NEAR, is_array
from refllm.errors import InputError

IDS = ("input_ids", "idx", "ids", "tokens", "token_ids", "inputs", "input", "x")
POSITIONS = ("position_ids", "positions", "input_pos", "pos_ids")
_TRIED = 3  # tokens of the call that finds out


@dataclass(frozen=True)
class _Way:
    """How a module is called. targets: it computes all logits only if it is given targets. always: it is given usual
    positions, too; in_a_row: those of one sequence, [S]. flat: it is given the tokens of one sequence, without a batch.
    """

    targets: bool = False
    always: bool = False
    in_a_row: bool = False
    flat: bool = False


class Call:
    """Calls a module. takes: see `Candidate.takes`.

    ids, positions: the names of its arguments, "" for none; ids are then given by their place.
    """

    def __init__(self, module: Any) -> None:
        self.module, self.way = module, _Way()
        self.arguments = _arguments(module)
        required = [name for name, argument in self.arguments.items() if argument.default is argument.empty]
        self.ids = next((name for name in IDS if name in self.arguments), required[0] if required else "")
        self.positions = next((name for name in POSITIONS if name in self.arguments), "")
        has = {
            "mask": "attention_mask" in self.arguments,
            "positions": bool(self.positions),
            "cache": {"past_key_values", "use_cache"} <= self.arguments.keys(),
            "embeddings": "inputs_embeds" in self.arguments,
        }
        self.takes: tuple[str, ...] = ("batch", *(what for what, there in has.items() if there))
        self._settle()

    def tensor(self, array: np.ndarray) -> Any:
        """A tensor where the module is: int64, or of the module's dtype."""
        import torch

        parameter = next(p for p in self.module.parameters() if p.is_floating_point())
        if array.dtype.kind == "f":
            return torch.from_numpy(np.array(array, order="C")).to(parameter.device, parameter.dtype)
        return torch.from_numpy(np.array(array, np.int64, order="C")).to(parameter.device)

    def _settle(self) -> None:
        """Finds out, with a few tokens, which of several ways to be called the module has. Where none works, the usual
        one stays, and what it raises then is a finding."""
        import torch

        ids = self.tensor(np.arange(_TRIED)[None])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": ids.clone()}
        ways: list[dict[str, bool]] = [{}]
        ways += [{"targets": True}] if "targets" in self.arguments else []
        ways += [{"always": True}, {"always": True, "in_a_row": True}] if self.positions else []
        for way in [*ways, {"always": True, "flat": True}]:
            self.way = _Way(**way)
            result = self._tried(given)
            if result is not None and tuple(result.shape[:-1]) in ((1, _TRIED), (_TRIED,)):
                flattened = result.ndim == 2  # whatever it is given: the tokens of one sequence
                self.takes = tuple(what for what in self.takes if what == "positions" or not flattened)
                if self.way.in_a_row:  # rows that are padded differently have different positions
                    self.takes = tuple(what for what in self.takes if what != "mask")
                if self.positions and self._tried({**given, "position_ids": ids + FAR}) is None:
                    self.takes += (NEAR,)
                return
        self.way = _Way()

    def _tried(self, given: dict[str, Any]) -> Any:
        """The result, or None where the module raises."""
        import torch

        try:
            with torch.no_grad():
                return self({name: tensor.clone() for name, tensor in given.items()}, None, None)[0]
        except Exception:  # of whatever kind: this way is not its own
            return None

    def __call__(self, given: dict[str, Any], rows: Any, cache: Any, use_cache: bool = False) -> tuple[Any, Any]:
        """The result for every token, and the cache. rows: embeddings to take instead of ids."""
        usual = bool((given["position_ids"] == _arange(given["position_ids"])).all())
        arguments: dict[str, Any] = {}
        for name, argument in self.arguments.items():
            needed = argument.default is argument.empty
            if name == self.ids:
                arguments[name] = given["input_ids"] if rows is None else None
            elif name == self.positions and (needed or not usual or self.way.always):
                arguments[name] = self._positions(given["position_ids"])
            elif name == "attention_mask" and (needed or not bool(given["attention_mask"].all())):
                arguments[name] = given["attention_mask"]
            elif name == "start_pos" and needed:
                arguments[name] = 0
            elif name == "targets" and self.way.targets:
                arguments[name] = given["input_ids"].clone()
        if rows is not None:
            arguments["inputs_embeds"] = rows
        if use_cache:
            arguments |= {"past_key_values": cache, "use_cache": True, "attention_mask": given["attention_mask"]}
            arguments |= {self.positions: given["position_ids"]} if self.positions else {}
        if self.way.flat:
            arguments = {k: v[0] if hasattr(v, "shape") else v for k, v in arguments.items()}
        by_place = () if self.ids else (given["input_ids"],)
        out, cache = result_and_cache(self.module(*by_place, **arguments))
        return _logits(out), cache

    def _positions(self, rows: Any) -> Any:
        """The positions [B, S] as the module takes them."""
        if not self.way.in_a_row:
            return rows
        if bool((rows != rows[:1]).any()):
            raise InputError(f"{type(self.module).__name__} takes the positions of one sequence, [S]: give it one row")
        return rows[0]


def _arguments(module: Any) -> dict[str, inspect.Parameter]:
    """What its forward takes by name; nothing of one that cannot be asked, as those that are compiled."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        found = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return {}
    return {name: argument for name, argument in found.items() if argument.kind in by_name}


def _arange(positions: Any) -> Any:
    import torch

    return torch.arange(positions.shape[-1], device=positions.device)


def _logits(out: Any) -> Any:
    """The value per token in what a module returned: in a tuple the first that has an axis for tokens."""
    values = out if isinstance(out, tuple | list) else (out,)
    found = next((v for v in values if is_array(v) and len(v.shape) > 1), None)
    if found is None:
        kind = "nothing (None)" if out is None else f"a {type(out).__name__}"
        raise misbehaves("result", f"it returns {kind}; expected a tensor of logits, [B, S, vocabulary]")
    return found
