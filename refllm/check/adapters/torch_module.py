"""Any torch module as a candidate: its parts are hooked where a map of names says (`torch_names`), nothing of its
computation is changed. Needs the package `torch`.

The map is the user's (`--names F`, `compare(..., names=F)`), else the shipped one that fits, Transformers' or litgpt's;
what it leaves out, or everything, is found in the module's weights (`torch_guess`).
"""

import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from refllm.check.adapters import torch_names
from refllm.check.adapters.torch_backward import backward
from refllm.check.adapters.torch_call import Call
from refllm.check.adapters.torch_guess import NO_PLACE, guess, rotating
from refllm.check.adapters.torch_names import Names, Place
from refllm.check.adapters.torch_rotations import Rotations, Show, must_rotate, tensors_of
from refllm.check.functions import DTYPES, scaled_rows
from refllm.check.inputs import Inputs
from refllm.check.misbehaviour import must_not_have_changed
from refllm.check.stacks import Opening
from refllm.check.taps import GRADIENTS, LOSS_SCALE, MICRO_BATCHES, Sink, cannot_run
from refllm.errors import InputError
from refllm.forward.taps import HEAD_TAPS, axes_of_values
from refllm.storage.input_file import read_object

_STREAM = re.compile(r"model\.layers\.\d+(\.residual_mid)?")
SHIPPED = {"transformers": "Transformers' names", "litgpt": "litgpt's names"}


def wrap(model: Any, opening: Opening) -> "TorchModuleCandidate":
    """A torch module as a candidate. Raises InputError for what is none, for a map that does not fit, and where the
    module has another dtype than was asked for."""
    import torch

    if not isinstance(model, torch.nn.Module):
        kind = type(model).__name__
        raise InputError(f"{opening.name or kind}: a {kind} is no torch.nn.Module; hand over the module itself")
    if hasattr(model, "_orig_mod"):
        raise InputError(
            f"{opening.name or 'the module'} is compiled, and shows no values; hand over what was compiled"
        )
    return TorchModuleCandidate(model, opening)


class TorchModuleCandidate:
    """A torch module, recorded by hooks. dtype: of most of its parameters. details: the map that was used; `note` is a
    sentence on it for the reader of a report.

    takes: what arguments of its forward there are for; "dtype" if the module was made by a function that was told it.
    """

    def __init__(self, module: Any, opening: Opening) -> None:
        import torch

        self.module, self.opening = module.eval(), opening
        self.name = opening.name or type(module).__name__
        self.dtype = _dtype_of(module)
        if opening.dtype not in ("float32", self.dtype):
            raise InputError(
                f"{self.name}: its parameters are {self.dtype}; hand over module.to(torch.{opening.dtype}), or leave "
                "--dtype out"
            )
        self.names = names_of(module, opening, self.dtype)
        self.call = Call(module)
        self.takes: tuple[str, ...] = (*self.call.takes, GRADIENTS, MICRO_BATCHES, LOSS_SCALE)
        missing = f"; {'; '.join(self.names.notes)}" if self.names.notes else ""
        self.details = {"torch": torch.__version__, "note": f"names: {self.names.said}{missing}"}

    def run(self, inputs: Inputs, sink: Sink) -> None:
        """See `Candidate.run`. Raises InputError for inputs that `cannot_run` has a reason for."""
        if reason := cannot_run(self, inputs):
            raise InputError(f"{self.name}: {inputs.label}: {reason}")
        if inputs.learning is not None:
            backward(self, inputs, sink)
            return
        embeds = scaled_rows(self.opening.folder, self.opening.head, self.dtype, inputs)
        cache = None
        for piece in inputs.pieces():
            given = {
                "input_ids": inputs.input_ids[:, piece],
                "attention_mask": inputs.mask[:, : piece.stop],
                "position_ids": inputs.positions[:, piece],
            }
            cache = self._call(given, None if embeds is None else embeds[:, piece], cache, bool(inputs.chunks), sink)

    def _call(self, given: dict[str, Any], embeds: Any, cache: Any, use_cache: bool, sink: Sink) -> Any:
        """One pass. Returns its cache."""
        import torch

        last = HEAD_TAPS.get(self.opening.head, "model.norm")
        head: list[Any] = []

        def tell(name: str, value: Any) -> None:
            if name == last:
                head.append(value)
            else:
                sink(name, value)

        tensors = {name: self.call.tensor(value) for name, value in given.items()}
        rows = None if embeds is None else self.call.tensor(embeds)
        with torch.no_grad(), recorded(self.module, self.names, lambda name, x, view: tell(name, view(x))):
            result, cache = self.call(tensors, rows, cache, use_cache)
        tokens = given["input_ids"].size
        # What is returned counts, unless that is less than the head has computed: of the last token, or a class.
        of_all = [value for value in (result, *head) if math.prod(value.shape[:-1]) == tokens]
        sink(last, of_all[0] if of_all else result)
        must_not_have_changed(given, {name: tensor.cpu().numpy() for name, tensor in tensors.items()})
        return cache


def names_of(module: Any, opening: Opening, dtype: str) -> Names:
    """Where the values are in a module: the user's map, else a shipped one that fits; and what they leave out, found in
    the weights."""
    from refllm.models.auto import load

    model = load(opening.folder, head=opening.head, dtype=dtype, low_memory=True)
    modules, written, where = dict(module.named_modules()), {}, ""
    said = next((name for name in SHIPPED if torch_names.fits(torch_names.shipped(name), modules)), "")
    if opening.names is not None:
        where = f"--names {opening.names}"
        written, said = read_object(opening.names, InputError), str(opening.names)
    elif said:
        written, said = torch_names.shipped(said), SHIPPED[said]
    names = torch_names.resolve(written, modules, model.config, model.head, where)
    names.said = said or "found in its weights"
    without = {key for key, place in written.items() if place is None}
    values = axes_of_values(model.config, model.head)
    wanted = [name for name in values if not name.endswith(NO_PLACE) and torch_names.template(name) not in without]
    if not names.places.keys() >= set(wanted):
        found = guess(module, model.weights, model.config, model.head)
        names.notes = [] if said else found.notes
        for name in wanted:
            if name in found.places:
                names.places.setdefault(name, found.places[name])
        names.notes += torch_names.not_found([name for name in wanted if name not in names.places])
    if where:
        must_rotate(names.rotations, module, where)
    if not (where and names.rotations):
        names.rotations += rotating(module)
    return names


def _dtype_of(module: Any) -> str:
    """The dtype of most of its numbers. Raises InputError for one that cannot be judged, and for a module without."""
    counts: dict[str, int] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point():
            name = str(parameter.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + parameter.numel()
    found = max(counts, key=lambda name: counts[name], default="none")
    if found not in (*DTYPES, "float64"):
        kind = type(module).__name__
        raise InputError(f"{kind}: its parameters are of {found}; expected a module in {', '.join(DTYPES)}")
    return found


# --------------------------------------------------------------------------------------------------------------- hooks


@contextmanager
def recorded(module: Any, names: Names, show: Show) -> Iterator[None]:
    """A context in which `show` is told every value of the module's forward passes that has a place."""
    with ExitStack() as stack:
        modules = dict(module.named_modules())
        rotations = Rotations(show, names.places, names.heads)
        for name, place in names.places.items():
            stack.callback(_hook(modules[place.path], name, place, show).remove)
            attention, _, projection = name.rpartition(".")
            if projection in ("q_proj", "k_proj"):
                hook = rotations.projected(attention, projection[0])
                stack.callback(modules[place.path].register_forward_hook(hook).remove)
        stack.enter_context(rotations.watched(module, names.rotations))
        yield


def _hook(part: Any, name: str, place: Place, show: Show) -> Any:
    if place.side == "output":

        def made(_module: Any, _args: Any, out: Any) -> None:
            value = _added(tensors_of(out)) if _STREAM.fullmatch(name) else _first(tensors_of(out))
            show(name, value, (lambda x: x) if place.channels is None else lambda x: x[..., place.channels])

        return part.register_forward_hook(made)

    if _STREAM.fullmatch(name):  # a norm that adds what it is given returns the sum beside its result

        def summed(_module: Any, args: Any, kwargs: Any, out: Any) -> None:
            returned = tensors_of(out)
            value = returned[1] if len(returned) == 2 else _added(tensors_of([*args, *kwargs.values()]))
            show(name, value, lambda x: x)

        return part.register_forward_hook(summed, with_kwargs=True)

    def given(_module: Any, args: Any, kwargs: Any) -> None:
        show(name, _first(tensors_of([*args, *kwargs.values()])), lambda x: x)

    return part.register_forward_pre_hook(given, with_kwargs=True)


def _first(tensors: list[Any]) -> Any:
    return tensors[0] if tensors else None


def _added(tensors: list[Any]) -> Any:
    """The residual stream: the first tensor; where serving engines hand the hidden state and the stream on, to be added
    later, their sum."""
    pair = len(tensors) == 2 and tensors[0].shape == tensors[1].shape
    return tensors[0] + tensors[1] if pair else _first(tensors)
