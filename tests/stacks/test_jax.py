"""Functions of JAX against the pages: a port of somebody's own, operator by operator and compiled, and bugs in it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax_port as port
import numpy as np
import pytest
from harness import Bug, Checks, must_be_named, must_hold

from refllm import golden
from refllm.check import compare
from refllm.check.inputs import stressed
from refllm.check.misbehaviour import MisbehavesError
from refllm.errors import InputError

ARCEE, HELIUM, LLAMA = "arcee-tiny", "helium-tiny", "llama-tiny"
PARALLEL, SEQUENTIAL = "stablelm-tiny-parallel", "stablelm-tiny-sequential"
CHECKS = Checks("jax", (ARCEE, HELIUM, LLAMA, PARALLEL, SEQUENTIAL), ("float32", "bfloat16", "float16"))
IDS = np.random.default_rng(0).integers(0, 600, size=48)
FILE = Path(port.__file__)


@pytest.mark.parametrize("how", ["forward", "compiled"])
@pytest.mark.parametrize(("checkpoint", "dtype"), CHECKS.right())
def test_right_models_hold(checkpoint: str, dtype: str, how: str) -> None:
    must_hold(CHECKS, checkpoint, dtype, f"jax:{FILE}:{how}", input_ids=IDS, isolate=False)


def test_everything_that_can_be_stressed_holds() -> None:
    """Caches and scaled embeddings too, since the function has arguments for them."""
    more = {"input_ids": IDS[:32], "isolate": False, "stress": True}
    reports = must_hold(CHECKS, LLAMA, "bfloat16", f"jax:{FILE}:compiled", **more)
    assert {inputs.label for inputs in stressed(IDS[None])} <= {report.inputs for report in reports}


# ------------------------------------------------------------------------------------- other ways of writing it right


def norm_in_one_pass(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """As Flax has it: the mean square less the square of the mean, and the weight on the root."""
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.maximum(0, jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean))
    y = (wide - mean) * (jax.lax.rsqrt(variance + eps) * weight)
    return (y if bias is None else y + bias).astype(x.dtype)


def rotate_in_the_format(x: Any, positions: Any, config: Any) -> Any:
    angles = positions[:, None, :, None].astype(jnp.float32) * port.frequencies(config)
    cos, sin = ((f(angles) * port.stretch(config)).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x[..., : 2 * cos.shape[-1]], 2, axis=-1)
    pair = [a * cos - b * sin, b * cos + a * sin, x[..., 2 * cos.shape[-1] :]]
    return jnp.concatenate(pair, axis=-1)


def library_attention(q: Any, k: Any, v: Any, seen: Any, scale: float) -> Any:
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, mask=seen, scale=scale).transpose(0, 2, 1, 3)


def scaled_queries(q: Any, k: Any, v: Any, seen: Any, scale: float) -> Any:
    return port.attend(q * jnp.asarray(scale, q.dtype), k, v, seen, 1.0)


def scores_in_the_format(q: Any, k: Any, v: Any, seen: Any, scale: float) -> Any:
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = jnp.where(seen, (q @ k.swapaxes(-1, -2) * scale).astype(jnp.float32), -jnp.inf)
    return jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v


def activation_in_float32(gate: Any, up: Any) -> Any:
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def square_in_float32(up: Any) -> Any:
    return jnp.square(jax.nn.relu(up.astype(jnp.float32))).astype(up.dtype)


def bias_in_float32(x: Any, weight: Any, bias: Any) -> Any:
    y = jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32)
    return (y if bias is None else y + bias).astype(x.dtype)


def head_in_float32(x: Any, weight: Any, bias: Any) -> Any:
    return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32)


RIGHT: dict[str, tuple[str, dict[str, Callable[..., Any]]]] = {
    "layer norm in one pass": (SEQUENTIAL, {"layer_norm": norm_in_one_pass}),
    "rotation in the format": (SEQUENTIAL, {"rotate_q": rotate_in_the_format, "rotate_k": rotate_in_the_format}),
    "attention of the library": (SEQUENTIAL, {"attend": library_attention}),
    "queries scaled first": (SEQUENTIAL, {"attend": scaled_queries}),
    "scores in the format": (LLAMA, {"attend": scores_in_the_format}),
    "activation in float32": (HELIUM, {"swiglu": activation_in_float32}),
    "square in float32": (ARCEE, {"relu2": square_in_float32}),
    "bias in float32": (HELIUM, {"linear": bias_in_float32}),
    "head in float32": (LLAMA, {"head": head_in_float32}),
}


def function_with(parts: dict[str, Any], checkpoint: str) -> Any:
    """The port with other parts, compiled: that is where values are read before they are rounded."""
    run = jax.jit(partial(port.model, port.config_of(str(golden.path(checkpoint))), port.PARTS | parts))

    def forward(checkpoint: str, ids: Any, mask: Any, positions: Any, tap: Any, dtype: str) -> None:
        arrays = (jnp.asarray(x, jnp.int32) for x in (ids, mask, positions))
        values, _ = run(port.weights_of(checkpoint, dtype), *arrays)
        for name, value in values.items():
            tap(name, value)

    return forward


@pytest.mark.parametrize("way", RIGHT)
def test_other_ways_of_writing_it_hold(way: str) -> None:
    checkpoint, parts = RIGHT[way]
    (report,) = compare(golden.path(checkpoint), function_with(parts, checkpoint), dtype="bfloat16")
    assert report.verdict == "holds", (report.unsaid, report.first_failure)


# ---------------------------------------------------------------------------------------------------------------- bugs


def wrong(name: str, change: Callable[..., Any]) -> dict[str, Any]:
    """A part that does something to the right one: change(part, *arguments)."""
    return {name: partial(change, port.PARTS[name])}


def swapped(part: Any, gate: Any, up: Any) -> Any:
    return part(up, gate)


def eps_outside(part: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
    wide = x.astype(jnp.float32)
    root = jnp.sqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True)) + eps * 100
    return (wide / root).astype(x.dtype) * weight


def in_the_format(part: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.asarray(eps, x.dtype)) * weight


def one_less(part: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
    n = x.shape[-1]
    return part(x, weight * ((n - 1) / n) ** 0.5, bias, eps)


def other_pairs(part: Any, x: Any, positions: Any, config: Any) -> Any:
    return part(x, positions, config | {"model_type": "llama" if config["model_type"] == "helium" else "helium"})


def from_one(part: Any, x: Any, positions: Any, config: Any) -> Any:
    return part(x, positions + 1, config)


def unscaled(part: Any, x: Any, positions: Any, config: Any) -> Any:
    return part(x, positions, config | {"rope_parameters": config["rope_parameters"] | {"rope_type": "default"}})


def narrow_angles(part: Any, x: Any, positions: Any, config: Any) -> Any:
    angles = positions[:, None, :, None].astype(x.dtype) * jnp.asarray(port.frequencies(config), x.dtype)
    return port.turned(x, jnp.cos(angles), jnp.sin(angles), config["model_type"] == "helium")


def not_turned(part: Any, x: Any, positions: Any, config: Any) -> Any:
    return x


def tiled(part: Any, q: Any, k: Any, v: Any, seen: Any, scale: float) -> Any:
    k, v = (jnp.tile(x, (1, q.shape[1] // x.shape[1], 1, 1)) for x in (k, v))
    return part(q, k, v, seen, scale)


def softmax_of_queries(part: Any, q: Any, k: Any, v: Any, seen: Any, scale: float) -> Any:
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = jnp.where(seen, q @ k.swapaxes(-1, -2) * scale, -1e4)
    return jax.nn.softmax(scores, axis=-2) @ v


def half_scale(part: Any, q: Any, k: Any, v: Any, seen: Any, scale: float) -> Any:
    return part(q, k, v, seen, scale**2)


def sees_the_next(part: Any, mask: Any, queries: int) -> Any:
    return jnp.roll(part(mask, queries), -1, axis=2).at[:, :, -1].set(True)


def gelu(part: Any, gate: Any, up: Any) -> Any:
    return jax.nn.gelu(gate) * up


def relu(part: Any, up: Any) -> Any:
    return jax.nn.relu(up)


def without_bias(part: Any, x: Any, weight: Any, bias: Any) -> Any:
    return part(x, weight, None)


def upside_down(part: Any, x: Any, weight: Any, bias: Any) -> Any:
    return part(x, weight[::-1], bias)


BUGS = (
    Bug("eps outside the root", wrong("rms_norm", eps_outside), "0.input_layernorm"),
    Bug("norm in the format", wrong("rms_norm", in_the_format), "0.input_layernorm", HELIUM, "bfloat16"),
    Bug("variance over n - 1", wrong("layer_norm", one_less), "0.input_layernorm", SEQUENTIAL),
    Bug("other pairs", wrong("rotate_q", other_pairs), "0.self_attn.q_rope", HELIUM),
    Bug("positions from 1", wrong("rotate_k", from_one), "0.self_attn.k_rope"),
    Bug("rotary scaling left out", wrong("rotate_q", unscaled), "0.self_attn.q_rope", ARCEE),
    Bug("angles in the format", wrong("rotate_q", narrow_angles), "0.self_attn.q_rope", HELIUM, "bfloat16"),
    Bug("keys not turned", wrong("rotate_k", not_turned), "0.self_attn.k_rope", PARALLEL),
    Bug("heads of k tiled", wrong("attend", tiled), "0.self_attn.context", HELIUM),
    Bug("softmax over the queries", wrong("attend", softmax_of_queries), "0.self_attn.context"),
    Bug("scale squared", wrong("attend", half_scale), "0.self_attn.context"),
    Bug("a token sees the next", wrong("visible", sees_the_next), "0.self_attn.context", SEQUENTIAL),
    Bug("gate and up swapped", wrong("swiglu", swapped), "0.mlp.act"),
    Bug("gelu for silu", wrong("swiglu", gelu), "0.mlp.act", PARALLEL),
    Bug("relu for its square", wrong("relu2", relu), "0.mlp.act", ARCEE),
    Bug("no biases", wrong("linear", without_bias), "0.self_attn.q_proj", ARCEE),
    Bug("head upside down", wrong("head", upside_down), "lm_head"),
)


@pytest.mark.parametrize(("bug", "dtype"), CHECKS.planted(BUGS))
def test_planted_bugs_are_named(bug: Bug, dtype: str) -> None:
    must_be_named(CHECKS, bug, dtype, function_with(bug.plant, bug.checkpoint), input_ids=IDS)


# -------------------------------------------------------------------------------------------- what is taken and said


@jax.jit
def of_params(params: Any, input_ids: Any, attention_mask: Any, position_ids: Any) -> Any:
    """Jitted whole: the tensors come as its first argument, and its logits are called so."""
    values, _ = port.model(CONFIG, port.PARTS, params, input_ids, attention_mask, position_ids)
    return {("logits" if name == "lm_head" else name): value for name, value in values.items()}


CONFIG = port.config_of(str(golden.path(LLAMA)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_jitted_function_is_an_object_that_is_given_the_tensors(dtype: str) -> None:
    (report,) = compare(golden.path(LLAMA), of_params, dtype=dtype, input_ids=IDS)
    assert (report.verdict, report.taps[-1].name, report.dtype) == ("holds", "lm_head", dtype)


def test_names_may_be_those_of_dictionaries_in_dictionaries() -> None:
    def nested(params: Any, ids: Any, mask: Any, positions: Any) -> Any:
        values, _ = port.model(CONFIG, port.PARTS, params, ids, mask, positions)
        model = {name.removeprefix("model."): value for name, value in values.items() if name.startswith("model.")}
        layers = {name.replace("layers.", "layers_"): {"__call__": (value,)} for name, value in model.items()}
        return {"intermediates": {"model": layers}, "logits": values["lm_head"]}

    (report,) = compare(golden.path(LLAMA), jax.jit(nested), dtype="float32", input_ids=IDS)
    assert report.verdict == "holds"
    assert len(report.taps) == len(compare(golden.path(LLAMA), of_params, dtype="float32", input_ids=IDS)[0].taps)


def test_what_is_no_dictionary_of_arrays_is_a_finding(tmp_path: Path) -> None:
    returned = {"it returns a int; expected a dictionary": "3", "lm_head is a str": "{'lm_head': 'x'}"}
    for said, value in returned.items():
        (tmp_path / "port.py").write_text(f"def forward(params, ids, mask, positions): return {value}")
        (report,) = compare(golden.path(LLAMA), f"jax:{tmp_path / 'port.py'}:forward", input_ids=IDS, isolate=False)
        assert report.misbehaviour is not None
        assert said in report.misbehaviour.text


def test_wrong_use_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import jax\nraise ValueError('no')")
    with pytest.raises(MisbehavesError, match=r"raises ValueError: no when it is imported \(broken.py:2\)"):
        compare(golden.path(LLAMA), f"jax:{tmp_path / 'broken.py'}:forward", isolate=False)
    with pytest.raises(InputError, match=r"jax_port.py has no function 'backward'"):
        compare(golden.path(LLAMA), f"jax:{FILE}:backward", isolate=False)
    for name, said in {
        "jax": "needs what it reads: --candidate jax:FILE.PY:FUNCTION",
        "jax:x": "names no function",
    }.items():
        with pytest.raises(InputError, match=said):
            compare(golden.path(LLAMA), name, isolate=False)
