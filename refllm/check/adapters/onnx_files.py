"""ONNX files: what is read of them without running anything, and sessions of ONNX Runtime."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refllm.check.adapters.graph_names import Graph, Node, Shape
from refllm.errors import InputError

_SCOPES = "pkg.torch.onnx.name_scopes"
UNROUNDED = "InsertedPrecisionFreeCast_"
"""What ONNX Runtime puts before the name of a float16 value that it keeps in float32."""


def read(file: Path) -> Any:
    """The `onnx.ModelProto` of a file, without weights that lie in another. Raises InputError for what is none."""
    import onnx

    if not file.is_file():
        raise InputError(f"{file}: no such file; expected an ONNX file")
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception:  # of Google's protobuf, in several kinds
        model = None
    if model is None or not model.graph.node or not model.graph.output:
        raise InputError(f"{file} is no ONNX file, or a damaged one")
    return model


def dtype_of(model: Any, file: Path) -> str:
    """What the weights are in, for the most part. Raises InputError for formats that ONNX Runtime computes not in."""
    from onnx import TensorProto

    names = {getattr(TensorProto, name.upper()): name for name in ("float", "float16", "bfloat16", "double")}
    sizes: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        if tensor.data_type in names:
            size = 1
            for n in tensor.dims:
                size *= n
            sizes[names[tensor.data_type]] += size
    found = sizes.most_common(1)[0][0] if sizes else "float"
    if found not in ("float", "float16"):
        raise InputError(
            f"{file} is in {found.replace('double', 'float64')}, which cannot be checked with ONNX Runtime on a CPU: "
            "export the model in float32 or float16"
        )
    return "float32" if found == "float" else found


def graph_of(model: Any, optimised: Any = None) -> Graph:
    """The nodes of a model and the modules that they come from. optimised: the same model, if ONNX Runtime has been at
    it: it knows shapes of values that the file says nothing of."""
    graphs = [each.graph for each in (optimised, model) if each is not None]
    shapes = {name: shape for graph in graphs for name, shape in _shapes(graph)}
    nodes, weights = (
        [_node(node) for node in model.graph.node],
        frozenset(each.name for each in model.graph.initializer),
    )
    return Graph(nodes, shapes, tuple(value.name for value in model.graph.output), weights)


def _shapes(graph: Any) -> Iterator[tuple[str, Shape]]:
    """The values of floats whose shape is known as far as its rank."""
    from onnx import TensorProto

    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16) and tensor.HasField("shape"):
            shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
            yield value.name.removeprefix(UNROUNDED), shape


def _node(node: Any) -> Node:
    swaps = False
    for attribute in node.attribute:
        if node.op_type == "Transpose" and attribute.name == "perm":
            rank = len(attribute.ints)
            swaps = list(attribute.ints[-2:]) == [rank - 1, rank - 2]
    return Node(node.op_type, tuple(node.input), tuple(node.output), _path(node), swaps)


def _path(node: Any) -> str:
    """The module of a node: Torch's exporter writes all those around it, the older one names the node by it, with /."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes = ast.literal_eval(entry.value)
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return str(node.name.strip("/").rpartition("/")[0].replace("/", "."))


def session(file: Path, optimised: Path | None = None) -> Any:
    """A session on a CPU. optimised: where to write the graph that it makes of the file; None: it runs the file as it
    is. Raises InputError for a file that ONNX Runtime does not load."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if optimised is None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(optimised)
        of_weights = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{of_weights}_file_name", f"{optimised.stem}.data")
        options.add_session_config_entry(f"{of_weights}_min_size_in_bytes", "1024")
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own kinds, which share nothing
        said = str(error).strip().splitlines()[0]
        raise InputError(f"{file}: ONNX Runtime does not load it: {said}") from None


def left(names: dict[str, str], source: Any, optimised: Any) -> dict[str, str]:
    """The named values that an optimised graph has, by their names there: what the next operator reads.

    Where a conversion to float16 is gone, that is what was to be converted. What follows a node may be taken out, and
    its result renamed: then it is the result of the node of that name and kind.
    """
    there = {name for node in optimised.graph.node for name in node.output}
    converted = {node.output[0]: node.input[0] for node in source.graph.node if node.op_type == "Cast"}
    by_node = {(node.name, node.op_type): node.output[0] for node in optimised.graph.node if node.name}
    made_by = {node.output[0]: (node.name, node.op_type) for node in source.graph.node}
    found = {}
    for tap, name in names.items():
        other = converted.get(name), by_node.get(made_by.get(name, ("", "")))
        one = next((one for one in (name, f"{UNROUNDED}{name}", *other) if one in there), None)
        if one is not None:
            found[tap] = one
    return found


def with_outputs(model: Any, names: set[str]) -> None:
    """Makes values outputs of a model."""
    import onnx

    have = {result.name for result in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names - have))


def with_input(model: Any, name: str, value: Any) -> None:
    """Makes a value an input of a model: what makes it is taken out. value: an array of its dtype and rank."""
    import onnx

    graph = model.graph
    graph.node.remove(next(node for node in graph.node if name in node.output))
    for output in [each for each in graph.output if each.name == name]:
        graph.output.remove(output)
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * value.ndim))
