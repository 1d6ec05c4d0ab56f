"""An ONNX file as a candidate, run by ONNX Runtime on a CPU. Needs the packages `onnx` and `onnxruntime`.

What is run is the graph that ONNX Runtime makes of the file: it fuses nodes and, in float16, drops conversions between
them. Asked for the values of the file itself, it would fuse and drop less, and the graph that is checked would not be
the user's. So it optimises the file first; those of the named values that are left become outputs of the optimised
graph, which is then run as it is. What both return is compared when the file is opened.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from refllm.check.adapters import onnx_files
from refllm.check.adapters.graph_candidate import Arrays, GraphCandidate, Wanted, difference
from refllm.check.adapters.graph_names import named_values
from refllm.check.stacks import Opening
from refllm.errors import InputError


def open_candidate(opening: Opening) -> "OnnxCandidate":
    """The graph in a file. Raises InputError for what is none, or one that cannot be run."""
    return OnnxCandidate(Path(opening.given), opening)


def wrap(model: Any, opening: Opening) -> "OnnxCandidate":
    """An `onnx.ModelProto`, or a session of ONNX Runtime that was made of a file."""
    path = getattr(model, "_model_path", None)
    if path is not None:
        return OnnxCandidate(Path(path), opening)
    if not hasattr(model, "SerializeToString"):
        raise InputError(f"a {type(model).__name__} cannot be checked: give the ONNX file, or an onnx.ModelProto")
    import onnx

    with tempfile.TemporaryDirectory(prefix="refllm-") as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(model, file, save_as_external_data=True, location="model.data")
        return OnnxCandidate(file, opening)


class OnnxCandidate(GraphCandidate):
    """An ONNX file. Its weights, constants folded, lie in a temporary file as long as it is open."""

    def __init__(self, file: Path, opening: Opening) -> None:
        import onnx
        import onnxruntime

        source = onnx_files.read(file)
        computes_in = onnx_files.dtype_of(source, file)
        self._folder = tempfile.TemporaryDirectory(prefix="refllm-")
        optimised = Path(self._folder.name) / "optimised.onnx"
        as_it_is = onnx_files.session(file, optimised)
        super().__init__(file, opening, computes_in, {each.name: _wanted(each) for each in as_it_is.get_inputs()})
        self._graph = onnx.load(optimised, load_external_data=False)
        names = named_values(onnx_files.graph_of(source, self._graph), self.config, opening.head)
        self.values = onnx_files.left(names, source, self._graph)
        onnx_files.with_outputs(self._graph, set(self.values.values()))
        self._session, self._fed = self._of_graph("shown"), None
        probe, results = self.probe(), [each.name for each in as_it_is.get_outputs()]
        theirs = dict(zip(results, as_it_is.run(results, probe), strict=True))
        self.name = f"onnxruntime {onnxruntime.__version__} {file.name}"
        self.details = {
            "onnxruntime": onnxruntime.__version__,
            "made by": f"{source.producer_name} {source.producer_version}".strip(),
            "graph": f"the file as ONNX Runtime optimises it, {difference(self.outputs(results, probe), theirs)}",
            "not shown": ", ".join(tap for tap in names if tap not in self.values),
        }

    def outputs(self, names: list[str], given: Arrays, fed: tuple[str, np.ndarray] | None = None) -> Arrays:
        """See `GraphCandidate.outputs`."""
        import onnxruntime

        session = self._session
        if fed is not None:
            if self._fed is None:
                onnx_files.with_input(self._graph, fed[0], fed[1])
                self._fed = self._of_graph("fed")
            session, given = self._fed, given | {fed[0]: fed[1]}
        options = onnxruntime.RunOptions()
        options.only_execute_path_to_fetches = True
        return dict(zip(names, session.run(names, given, options), strict=True))

    def _of_graph(self, name: str) -> Any:
        import onnx

        file = Path(self._folder.name) / f"{name}.onnx"
        onnx.save(self._graph, file)
        return onnx_files.session(file)


def _wanted(asked: Any) -> Wanted:
    """asked: an input of a session."""
    words = {"float": "float32", "double": "float64"}
    kind = asked.type.removeprefix("tensor(").removesuffix(")")
    return Wanted(tuple(n if isinstance(n, int) else None for n in asked.shape), words.get(kind, kind))
