"""ONNX Runtime against the pages: files that Torch's exporter makes of Transformers' models, and files made by hand.

An export takes seconds. `make test` makes one in each format; `make test-stacks STACK=onnx` makes all families, and
every bug.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import RESULTS
from exported import BUGS, model_and_inputs, planted, to_onnx
from harness import LLAMA, Bug, Checks, must_be_named, must_hold
from onnx import TensorProto, helper, numpy_helper

from refllm import golden
from refllm.check import compare
from refllm.check.adapters.graph_names import Graph, Node, named_values
from refllm.check.adapters.onnx import OnnxCandidate
from refllm.check.adapters.onnx_files import left
from refllm.check.candidates import record
from refllm.check.inputs import Inputs
from refllm.check.run import load
from refllm.check.stacks import Opening, wrap
from refllm.config import AutoConfig
from refllm.errors import InputError
from refllm.forward.taps import axes_of_values

ALL_OF_THEM = RESULTS in os.environ
CHECKPOINTS = ("helium-tiny", "stablelm-tiny-parallel", "stablelm-tiny-sequential", "arcee-tiny")
CHECKS = Checks("onnx", (LLAMA, *(CHECKPOINTS * ALL_OF_THEM)), ("float32", "float16"))
IDS = np.random.default_rng(0).integers(0, 600, size=48)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(checkpoint, dtype) -> the file, made once."""
    folder, made = tmp_path_factory.mktemp("onnx"), {}

    def file(checkpoint: str, dtype: str) -> Path:
        if (checkpoint, dtype) not in made:
            made[checkpoint, dtype] = folder / f"{checkpoint}-{dtype}.onnx"
            to_onnx(model_and_inputs(golden.path(checkpoint), dtype), made[checkpoint, dtype])
        return made[checkpoint, dtype]

    return file


@pytest.mark.parametrize(("checkpoint", "dtype"), CHECKS.right())
def test_right_models_hold(checkpoint: str, dtype: str, exported: Any) -> None:
    file = exported(checkpoint, dtype)
    reports = must_hold(
        CHECKS,
        checkpoint,
        dtype,
        f"onnx:{file}",
        input_ids=IDS,
        isolate=False,
        stress=ALL_OF_THEM and checkpoint != "helium-tiny",
    )
    lost = 1 if checkpoint.startswith("stablelm") else 0  # the last sum is fused into the last norm
    assert len(reports[0].taps) == len(_shown(checkpoint)) - lost


def _shown(checkpoint: str) -> list[str]:
    """Every value of a model but scores and their softmax, and the sum that a parallel residual does not have."""
    config: Any = AutoConfig.from_pretrained(golden.path(checkpoint))
    without = (".scores", ".probs", *([".residual_mid"] if getattr(config, "use_parallel_residual", False) else []))
    return [name for name in axes_of_values(config, "causal_lm") if not name.endswith(without)]


if ALL_OF_THEM:

    @pytest.mark.parametrize(("bug", "dtype"), CHECKS.planted(BUGS))
    def test_bugs_of_the_source_are_named(bug: Bug, dtype: str, tmp_path: Path) -> None:
        file = planted(to_onnx, bug, dtype, tmp_path / "bug.onnx")
        must_be_named(CHECKS, bug, dtype, f"onnx:{file}", isolate=False)

    def test_an_epsilon_that_the_exporter_drops_is_found(exported: Any) -> None:
        """onnxscript takes 1e-8 for nothing to add; if this fails, it no longer does, and the page can say so."""
        file = exported("helium-tiny", "float32")
        reports = compare(golden.path("helium-tiny"), f"onnx:{file}", stress=True, isolate=False)
        failing = {report.inputs: report.first_failure.name for report in reports if report.first_failure}
        assert failing == {"small embeddings": "model.layers.0.input_layernorm"}


# ------------------------------------------------------------------------------------------------- bugs in the graph


def _of_layer(model: Any, kind: str, at: str) -> Any:
    """The first node of a kind in a module."""
    scopes = "pkg.torch.onnx.name_scopes"
    return next(
        node
        for node in model.graph.node
        if node.op_type == kind and any(p.key == scopes and f"'{at}'" in p.value for p in node.metadata_props)
    )


def swap_gate_and_up(model: Any) -> None:
    at = "model.layers.1.mlp"
    gate, up = (_of_layer(model, "MatMul", f"{at}.{name}_proj") for name in ("gate", "up"))
    nodes = list(model.graph.node)
    nodes.insert(nodes.index(gate), nodes.pop(nodes.index(up)))  # before all that will read it
    other = {gate.output[0]: up.output[0], up.output[0]: gate.output[0]}
    for node in nodes:
        node.input[:] = [other.get(name, name) for name in node.input]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def lose_the_mask(model: Any) -> None:
    softmax = _of_layer(model, "Softmax", "model.layers.1.self_attn")
    added = next(node for node in model.graph.node if softmax.input[0] in node.output)
    softmax.input[0] = added.input[0]


def larger_epsilon(model: Any) -> None:
    add = _of_layer(model, "Add", "model.layers.1.post_attention_layernorm")
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1e-3), "larger"))
    add.input[1] = "larger"


IN_THE_GRAPH = (
    Bug("gate and up swapped in the graph", swap_gate_and_up, "layers.1.mlp.act"),
    Bug("mask lost in the graph", lose_the_mask, "layers.1.self_attn.context"),
    Bug("epsilon 1e-3 in the graph", larger_epsilon, "layers.1.post_attention_layernorm"),
)


@pytest.mark.parametrize("bug", IN_THE_GRAPH, ids=str)
def test_bugs_of_the_graph_are_named(bug: Bug, exported: Any) -> None:
    model = onnx.load(exported(LLAMA, "float32"))
    bug.plant(model)
    must_be_named(CHECKS, bug, "float32", model, input_ids=IDS)


# -------------------------------------------------------------------------------------------------- graphs made by hand

LAST = "lm_head"


def graph(nodes: list[Any], inputs: dict[str, Any], results: dict[str, Any], weights: dict[str, np.ndarray]) -> Any:
    """A model; what comes in and goes out as name -> (dtype, shape)."""
    ends = [[helper.make_tensor_value_info(name, *kind) for name, kind in each.items()] for each in (inputs, results)]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    made = helper.make_graph(nodes, "by hand", *ends, initializer=tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


IDS_IN = {"input_ids": (TensorProto.INT64, ["b", "s"])}


def embedding_and_head(dtype: Any = np.float32, inputs: Any = IDS_IN, more: Any = ()) -> Any:
    """Rows of llama-tiny's embedding and their products with it: no language model, but one that computes."""
    table = load(golden.path(LLAMA), "float32").weights.rows("embed_tokens.weight", np.arange(640)).astype(dtype)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["model.embed_tokens"]),
        helper.make_node("MatMul", ["model.embed_tokens", "head"], ["scores of tokens"]),
        *more,
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    results = {"scores of tokens": (kind, ["b", "s", 640])}
    return graph(nodes, inputs, results, {"table": table, "head": table.T.copy()})


def opened(model: Any) -> OnnxCandidate:
    candidate = wrap(model, Opening("", golden.path(LLAMA)))
    assert isinstance(candidate, OnnxCandidate)
    return candidate


def test_a_file_without_modules_shows_what_is_called_as_we_call_it_and_its_logits() -> None:
    candidate = opened(embedding_and_head())
    assert candidate.values == {"model.embed_tokens": "model.embed_tokens", LAST: "scores of tokens"}
    assert candidate.takes == ("batch", "embeddings")
    assert "the same to the bit" in candidate.details["graph"]
    report = compare(golden.path(LLAMA), embedding_and_head(), input_ids=IDS)[0]
    assert report.verdict == "fails"
    assert report.first_failure is not None
    assert report.first_failure.name == LAST
    assert "model.layers.2" in report.first_failure.hidden


def test_what_a_compiler_takes_out_hides_no_value() -> None:
    """Heads [B, 2, S, 16] that are expanded to the shape that they have, then tiled: no compiler leaves the expanding,
    and ONNX Runtime calls what it keeps in float32 by the node, not by the value."""
    at = "layers.0.self_attn"
    nodes = [
        Node("Add", ("a", "b"), ("turned",), at),
        Node("Expand", ("turned", "shape"), ("wide",), at),
        Node("Tile", ("wide", "times"), ("tiled",), at),
        Node("Transpose", ("tiled",), ("keys",), at, swaps=True),
        Node("MatMul", ("q", "keys"), ("scores",), at),
        Node("Softmax", ("scores",), ("weights",), at),
    ]
    shapes = {"turned": (1, 2, None, 16), "wide": (1, 2, None, 16), "tiled": (1, 6, None, 16), "keys": (1, 6, 16, None)}
    config = AutoConfig.from_pretrained(golden.path("helium-tiny"))
    names = named_values(Graph(nodes, shapes, ("weights",)), config, "causal_lm")
    assert names["model.layers.0.self_attn.k_rope"] == "turned"

    def model(result: str) -> Any:
        return graph([helper.make_node("Add", ["a", "b"], [result], name="node_turned")], {}, {}, {})

    renamed = "InsertedPrecisionFreeCast_node_turned"
    assert left({"k": "turned"}, model("turned"), model(renamed)) == {"k": renamed}


def test_embeddings_are_fed_and_runs_end_where_they_may() -> None:
    model, candidate = load(golden.path(LLAMA), "float32"), opened(embedding_and_head())
    plain = record(candidate, model, Inputs(IDS[None])).taps
    twice = record(candidate, model, Inputs(IDS[None], embeds_scale=2.0)).taps
    for name in plain:
        np.testing.assert_allclose(twice[name], 2 * plain[name], rtol=1e-5)
    assert list(record(candidate, model, Inputs(IDS[None], until="model.embed_tokens")).taps) == ["model.embed_tokens"]


def test_a_cache_is_handed_on() -> None:
    """Logits are here the number of tokens that the cache holds; 3 key/value heads of 16."""
    past, present = "past_key_values.0.key", "present.0.key"
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["keys"]),
        helper.make_node("Transpose", ["keys"], ["heads"], perm=[0, 2, 1, 3]),
        helper.make_node("Concat", [past, "heads"], [present], axis=2),
        helper.make_node("Shape", [present], ["held"], start=2, end=3),
        helper.make_node("Cast", ["held"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["ones", "input_ids"], ["one"]),
        helper.make_node("Mul", ["one", "number"], ["logits"]),
    ]
    kind = (TensorProto.FLOAT, ["b", 3, "t", 16])
    results = {"logits": (TensorProto.FLOAT, ["b", "s", 640]), present: kind}
    weights = {"table": np.zeros((640, 3, 16), np.float32), "ones": np.ones((640, 640), np.float32)}
    candidate = opened(graph(nodes, IDS_IN | {past: kind}, results, weights))
    assert "cache" in candidate.takes
    inputs = Inputs(IDS[None, :6], chunks=(3, 1, 2))
    logits = record(candidate, load(golden.path(LLAMA), "float32"), inputs).taps[LAST]
    assert logits[0, :, 0].tolist() == [3, 3, 3, 4, 6, 6]


# -------------------------------------------------------------------------------------------------------------- refused

UNKNOWN = helper.make_node("NoSuchOperator", ["scores of tokens"], ["nothing"])
REFUSED = {
    "bfloat16": (
        lambda: embedding_and_head(__import__("ml_dtypes").bfloat16),
        "is in bfloat16, which cannot be checked",
    ),
    "float64": (lambda: embedding_and_head(np.float64), "is in float64, which cannot be checked"),
    "no ids": (
        lambda: graph(
            [helper.make_node("Neg", ["x"], ["y"])],
            {"x": (TensorProto.FLOAT, [2])},
            {"y": (TensorProto.FLOAT, [2])},
            {},
        ),
        "takes no input_ids, but x: no language model",
    ),
    "another input": (
        lambda: embedding_and_head(inputs=IDS_IN | {"pixel_values": (TensorProto.FLOAT, [1])}),
        "takes pixel_values, of which nothing is known; expected input_ids, attention_mask",
    ),
    "an unknown operator": (lambda: embedding_and_head(more=(UNKNOWN,)), "ONNX Runtime does not load it: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_checked_is_said_in_a_sentence(name: str) -> None:
    make, says = REFUSED[name]
    with pytest.raises(InputError, match=says) as refused:
        opened(make())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [None, b"", b"GGUF\3\0\0\0", b"not a model at all, but a text that is longer"])
def test_what_is_no_onnx_file_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    if content is not None:
        file.write_bytes(content)
    says = "no such file" if content is None else "is no ONNX file, or a damaged one"
    with pytest.raises(InputError, match=says):
        compare(golden.path(LLAMA), f"onnx:{file}", isolate=False)


def test_another_dtype_than_the_files_is_refused(tmp_path: Path) -> None:
    model = embedding_and_head()
    with pytest.raises(InputError, match=r"is in float32: use --dtype float32, not float16"):
        compare(golden.path(LLAMA), model, dtype="float16", input_ids=IDS)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(InputError, match="computes in float32 or float16 on a CPU, not in bfloat16"):
        compare(golden.path(LLAMA), f"onnx:{tmp_path / 'm.onnx'}", dtype="bfloat16", isolate=False)


def test_a_fixed_shape_asks_for_as_many_tokens(tmp_path: Path) -> None:
    fixed = {"input_ids": (TensorProto.INT64, [1, 4])}
    onnx.save(embedding_and_head(inputs=fixed), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert opened(session).takes == ("embeddings",)
    with pytest.raises(
        InputError, match="input_ids is fixed to 1 x 4, and 1 x 48 is to be run: export it with dynamic"
    ):
        compare(golden.path(LLAMA), session, input_ids=IDS)
    assert compare(golden.path(LLAMA), session, input_ids=IDS[:4])[0].verdict == "fails"
