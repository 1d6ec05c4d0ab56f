"""How a torch module is called: which of its arguments are token ids, masks and positions, and what it returns."""

import inspect
from typing import Any

import numpy as np

from refllm.check.adapters.torch_names import Place
from refllm.check.functions import result_and_cache
from refllm.check.misbehaviour import misbehaves
from refllm.check.taps import is_array

IDS = ("input_ids", "idx", "ids", "tokens", "token_ids", "inputs", "input", "x")
POSITIONS = ("position_ids", "positions", "input_pos", "pos_ids")
_TRIED = 3  # tokens of the call that finds out


class Call:
    """Calls a module. takes: see `Candidate.takes`.

    ids, positions: the names of its arguments, "" for none. targets: whether it computes all logits only if it is given
    targets. flat: whether it is given the tokens of one sequence, without a batch.
    """

    def __init__(self, module: Any) -> None:
        self.module, self.targets, self.flat = module, False, False
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
        ways = [(False, False), *([(True, False)] if "targets" in self.arguments else []), (False, True)]
        for self.targets, self.flat in ways:
            try:
                with torch.no_grad():
                    result, _ = self({name: tensor.clone() for name, tensor in given.items()}, None, None)
            except Exception:  # whatever the module raises in a way that is not its own
                continue
            if tuple(result.shape[:-1]) in ((1, _TRIED), (_TRIED,)):
                in_a_row = result.ndim == 2  # whatever it is given: the tokens of one sequence
                self.takes = tuple(what for what in self.takes if what == "positions" or not in_a_row)
                return
        self.targets = self.flat = False

    def __call__(self, given: dict[str, Any], rows: Any, cache: Any, use_cache: bool = False) -> tuple[Any, Any]:
        """The result for every token, and the cache. rows: embeddings to take instead of ids."""
        usual = bool((given["position_ids"] == _arange(given["position_ids"])).all())
        arguments: dict[str, Any] = {}
        for name, argument in self.arguments.items():
            needed = argument.default is argument.empty
            if name == self.ids:
                arguments[name] = given["input_ids"] if rows is None else None
            elif name == self.positions and (needed or not usual):
                arguments[name] = given["position_ids"]
            elif name == "attention_mask" and (needed or not bool(given["attention_mask"].all())):
                arguments[name] = given["attention_mask"]
            elif name == "start_pos" and needed:
                arguments[name] = 0
            elif name == "targets" and self.targets:
                arguments[name] = given["input_ids"].clone()
        if rows is not None:
            arguments["inputs_embeds"] = rows
        if use_cache:
            arguments |= {"past_key_values": cache, "use_cache": True, "attention_mask": given["attention_mask"]}
            arguments |= {self.positions: given["position_ids"]} if self.positions else {}
        if self.flat:
            arguments = {k: v[0] if hasattr(v, "shape") else v for k, v in arguments.items()}
        out, cache = result_and_cache(self.module(**arguments))
        return _logits(out), cache


def _arguments(module: Any) -> dict[str, inspect.Parameter]:
    """What its forward takes by name."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n: p for n, p in inspect.signature(module.forward).parameters.items() if p.kind in by_name}


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


def in_order(projection: Place | None, width: int) -> np.ndarray | None:
    """[width] int: which of the rotated dims of a head is each of the page's; None if they are in order.

    A projection whose rows are permuted within heads (as in files of Meta's own layout) makes heads with permuted dims.
    """
    if projection is None or projection.channels is None or len(projection.channels) % width:
        return None
    heads = projection.channels.reshape(-1, width)
    within = heads - heads.min(axis=1, keepdims=True)
    if (within != within[0]).any() or (np.sort(within[0]) != np.arange(width)).any():
        return None
    return None if (within[0] == np.arange(width)).all() else within[0]
