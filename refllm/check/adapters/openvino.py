"""A model of OpenVINO (an .xml file with its weights beside it, or an ONNX file) as a candidate on a CPU.

Needs the package `openvino`, and `onnx` for the names in an ONNX file. Values become further results of the model.
OpenVINO then fuses less than it would: what both models return is compared when the file is opened.
"""

from pathlib import Path
from typing import Any

import numpy as np

from refllm import extras
from refllm.check.adapters.graph_candidate import Arrays, GraphCandidate, Wanted, difference
from refllm.check.adapters.graph_names import Graph, Node, Shape, named_values
from refllm.check.stacks import Opening
from refllm.errors import InputError

_ROOT = "__module."
"""What stands before the path of a module in the names that OpenVINO gives to the nodes of a torch module."""


def open_candidate(opening: Opening) -> "OpenVinoCandidate":
    """The model in a file. Raises InputError for what is none, or one that cannot be run."""
    import openvino

    file = Path(opening.given)
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected an .xml file of OpenVINO, with the .bin beside it, or .onnx")
    if file.suffix not in (".xml", ".onnx"):  # it would try one form after the other, aloud
        raise InputError(f"{file}: expected an .xml file of OpenVINO, with the .bin beside it, or .onnx")
    try:
        model = openvino.Core().read_model(file)
    except RuntimeError as error:
        raise InputError(f"{file}: OpenVINO does not read it: {_last_line(error)}") from None
    return OpenVinoCandidate(model, opening, file)


def wrap(model: Any, opening: Opening) -> "OpenVinoCandidate":
    """An `openvino.Model`; one that is compiled shows nothing."""
    if not hasattr(model, "get_ordered_ops"):
        raise InputError(f"a {type(model).__name__} cannot be checked: give the openvino.Model, or its file")
    return OpenVinoCandidate(model, opening, Path(model.get_friendly_name()))


class OpenVinoCandidate(GraphCandidate):
    """A model of OpenVINO. It is told to compute in float32: left alone it takes bfloat16 on some processors."""

    def __init__(self, model: Any, opening: Opening, file: Path) -> None:
        import openvino

        super().__init__(file, opening, "float32", {each.get_any_name(): _wanted(each) for each in model.inputs})
        self._model = model.clone()
        self._compiled: dict[tuple[Any, ...], Any] = {}
        names = named_values(_graph(self._model), self.config, opening.head)
        if file.suffix == ".onnx":
            names = self._of_onnx(file, opening)
        self.values = names
        probe, results = self.probe(), [_name(each.input_value(0)) for each in self._model.get_results()]
        theirs = self.outputs(results, probe)
        ours = self.outputs(list(dict.fromkeys([*self.values.values(), *results])), probe)
        narrow = " (weights in float16)" if _has_narrow_weights(self._model) else ""
        self.name = f"openvino {openvino.__version__.partition('-')[0]} {file.name}{narrow}"
        graph = f"the file with the values as further results, {difference({n: ours[n] for n in results}, theirs)}"
        self.details = {"openvino": openvino.__version__, "graph": graph}

    def outputs(self, names: list[str], given: Arrays, fed: tuple[str, np.ndarray] | None = None) -> Arrays:
        """See `GraphCandidate.outputs`."""
        import openvino

        key = fed is not None, *names
        if key not in self._compiled:
            model, parameters = self._model, self._model.get_parameters()
            if fed is not None:
                model, parameters = self._with_input(fed[0])
            made = {_name(output): output for output in _all_outputs(model)}
            part = openvino.Model([made[name] for name in names], parameters, "part")
            self._compiled[key] = openvino.Core().compile_model(part, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        given = given if fed is None else given | {_FED: fed[1]}
        compiled = self._compiled[key]
        by_place = [next(given[name] for name in each.get_names() if name in given) for each in compiled.inputs]
        found = compiled(by_place)
        return {name: np.array(found[i]) for i, name in enumerate(names)}

    def _with_input(self, name: str) -> tuple[Any, list[Any]]:
        """A copy of the model in which a value is an input, and its inputs."""
        import openvino

        model = self._model.clone()
        made = next(output for output in _all_outputs(model) if _name(output) == name)
        parameter = openvino.opset13.parameter(made.get_partial_shape(), made.get_element_type(), name=_FED)
        made.replace(parameter.output(0))
        parameter.output(0).set_names({_FED})
        return model, [*model.get_parameters(), parameter]

    def _of_onnx(self, file: Path, opening: Opening) -> dict[str, str]:
        """The values of an ONNX file, whose nodes say more of where they come from."""
        extras.require("--candidate openvino with an ONNX file", "onnx")
        from refllm.check.adapters import onnx_files

        names = named_values(onnx_files.graph_of(onnx_files.read(file)), self.config, opening.head)
        there = {name: _name(output) for output in _all_outputs(self._model) for name in output.get_names()}
        return {tap: there[name] for tap, name in names.items() if name in there}


_FED = "refllm_fed"


def _graph(model: Any) -> Graph:
    """The nodes of a model, and the modules of Torch that they come from."""
    shapes: dict[str, Shape] = {}
    nodes = []
    for op in model.get_ordered_ops():
        if op.get_type_name() not in ("Parameter", "Result"):
            inputs = tuple(_name(each.get_source_output()) for each in op.inputs())
            names = tuple(_name(output) for output in op.outputs())
            shapes |= {_name(o): _shape(o) for o in op.outputs() if o.get_element_type().is_real()}
            nodes.append(Node(op.get_type_name(), inputs, names, _path(op), _swaps(op)))
    return Graph(nodes, shapes, tuple(_name(each.input_value(0)) for each in model.get_results()))


def _all_outputs(model: Any) -> list[Any]:
    return [output for op in model.get_ordered_ops() for output in op.outputs()]


def _name(output: Any) -> str:
    """An output of a node by the node's name, and its number if it is not the first."""
    index = output.get_index()
    return str(output.get_node().get_friendly_name()) + (f":{index}" if index else "")


def _shape(output: Any) -> Shape:
    shape = output.get_partial_shape()
    return () if shape.rank.is_dynamic else tuple(n.get_length() if n.is_static else None for n in shape)


def _path(op: Any) -> str:
    """ "__module.model.layers.0.self_attn.q_proj/aten::linear/MatMul" -> the path of the module."""
    name = str(op.get_friendly_name())
    return name.removeprefix(_ROOT).partition("/")[0] if name.startswith(_ROOT) else ""


def _swaps(op: Any) -> bool:
    """Whether a node transposes the last two axes."""
    order = op.input_value(1).get_node() if op.get_type_name() == "Transpose" else None
    if order is None or order.get_type_name() != "Constant":
        return False
    axes = order.get_vector().tolist()
    return axes[-2:] == [len(axes) - 1, len(axes) - 2]


def _has_narrow_weights(model: Any) -> bool:
    """Whether weights are stored in float16, as OpenVINO does where nobody says otherwise."""
    weights = [op for op in model.get_ops() if op.get_type_name() == "Constant" and len(op.shape) > 1]
    return any(op.get_element_type().get_type_name() == "f16" for op in weights)


def _wanted(asked: Any) -> Wanted:
    """asked: an input of a model."""
    return Wanted(_shape(asked), asked.get_element_type().to_dtype().name)


def _last_line(error: Exception) -> str:
    return [line for line in str(error).splitlines() if line.strip()][-1].strip()
