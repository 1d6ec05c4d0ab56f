"""check-op for gradients: right ones hold, every property fails on a planted fault, programs show it, laws are true."""

import contextlib
import io
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from refllm import ops  # noqa: E402
from refllm.accuracy.expected import expect  # noqa: E402
from refllm.check import assert_operator, check_op  # noqa: E402
from refllm.errors import InputError  # noqa: E402
from refllm.kernels import plain  # noqa: E402
from refllm.opcheck import laws  # noqa: E402
from refllm.opcheck.report import report_text  # noqa: E402
from refllm.ops.backward_contracts import BACKWARD, forward_name  # noqa: E402
from refllm.precision import FUSED, Arithmetic  # noqa: E402
from refllm.strategies import Array, Call, corners  # noqa: E402
from refllm.strategies.arrays import FIRST_DIM  # noqa: E402
from refllm.strategies.gradients import backward_call  # noqa: E402
from refllm.strategies.levels import families_of, level_of  # noqa: E402
from tests.opcheck import gradient_candidates as fn  # noqa: E402

QUICK = {"max_examples": 0, "isolate": False}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------- right ones hold


@pytest.mark.parametrize("operator", plain.BACKWARD)
def test_our_gradients_in_plain_torch_hold(operator):
    calls = [c for c in corners(operator) if level_of(c) != "hostile"]
    assert_operator(operator, getattr(plain, operator), calls=calls, **QUICK)


@pytest.mark.parametrize(
    "operator", ["rms_norm", "layer_norm", "attention", "cross_entropy", "linear", "softmax", "glu"]
)
def test_the_definitions_in_emulation_hold(operator):
    """NumPy in, NumPy out: what a narrow format makes of the definition is within the error predicted of it."""
    import ml_dtypes

    definition, ar = getattr(ops, f"{operator}_backward"), Arithmetic("bfloat16", FUSED)

    def candidate(*arguments, **keywords):
        keywords = {{"dlse": "dlse_BHS"}.get(name, name): x for name, x in keywords.items()}
        arguments = [x.astype(np.float32) if getattr(x, "dtype", None) == ml_dtypes.bfloat16 else x for x in arguments]
        out = definition(*arguments, **keywords, ar=ar)
        out = out if isinstance(out, tuple) else (out,)
        return tuple(None if x is None else np.asarray(x).astype(ml_dtypes.bfloat16) for x in out)

    calls = [
        c for c in corners(f"{operator}_backward") if level_of(c) != "hostile" and "mixed_dtypes" not in families_of(c)
    ]
    assert_operator(f"{operator}_backward", candidate, arrays="numpy", calls=calls[::2], **QUICK)


@pytest.mark.parametrize(
    ("operator", "function", "how"),
    [
        ("rms_norm", fn.eager_rms_norm, {}),
        ("layer_norm", fn.layer_norm, {"convention": "torch", "without": "mixed_dtypes"}),
        ("layer_norm", fn.layer_norm, {"level": "basic"}),
        ("swiglu", fn.swiglu, {}),
        ("linear", torch.nn.functional.linear, {"dtype": "float16"}),
        ("attention", fn.eager_attention, {"without": ("no_keys", "hidden_nan")}),
        ("cross_entropy", fn.cross_entropy, {"level": "basic"}),
        ("cross_entropy", fn.cross_entropy, {"convention": "torch", "without": "hidden_nan"}),
        ("embedding", torch.nn.functional.embedding, {"convention": "torch"}),
        ("softmax", lambda x: torch.softmax(x, -1), {"dtype": "float32"}),
        ("rope", lambda q, k, *tables, **how: plain.rope(q, k, *tables, **how), {"dtype": "float32"}),
    ],
    ids=lambda given: getattr(given, "__name__", str(given)),
)
def test_gradients_that_autograd_makes_of_honest_code_hold(operator, function, how):
    assert_operator(operator, function, backward=True, **QUICK, **how)


def written_out(gate, up, name):
    """A gated unit whose activation is a formula of several lines."""
    c = (2 / np.pi) ** 0.5
    act = {
        "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(c * (x + 0.044715 * x * x * x))),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "silu": lambda x: x * torch.sigmoid(x),
    }[name]
    return act(gate) * up


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gelu_new", "quick_gelu", "silu"])
def test_activations_that_are_written_out_hold(name, dtype):
    gate = Array((3, 1025), dtype, "ramp", scale=9.0, mean=-5.0)
    forward = Call("glu", dtype, (gate, Array((3, 1025), dtype, seed=1), name))
    equal = Call("glu", dtype, (Array((5, 64), dtype, "ones", mean=1.0), Array((5, 64), dtype, seed=1), name))
    calls = [backward_call(c, g) for c in (forward, equal) for g in ("plain", "of one sign", "along the input")]
    assert_operator("glu", written_out, backward=True, dtype=dtype, calls=calls, **QUICK)


def test_eager_attention_holds_where_rounded_scores_choose_other_keys():
    k = Array((3, 1, 127, 160), "bfloat16", "eighths", seed=1, planted=((FIRST_DIM, -392.0),))
    q = Array((3, 1, 8, 160), "bfloat16", "eighths", planted=((FIRST_DIM, 256.0),))
    v = Array((3, 1, 127, 160), "bfloat16", mean=0.5, seed=2)
    calls = [backward_call(Call("attention", "bfloat16", (q, k, v), (("scale", 1.0),)), "of one sign")]
    assert_operator("attention", fn.eager_attention, backward=True, calls=calls, **QUICK)


def test_a_gradient_that_is_handed_on_is_no_fault_of_autograd():
    call = backward_call(Call("activation", "float32", (Array((3, 8), "float32"), "linear")))
    assert_operator("activation", lambda x, name: x * 1, backward=True, dtype="float32", calls=[call], **QUICK)


def test_a_sum_that_torch_keeps_in_the_narrow_format_is_a_convention_and_not_the_contract():
    for left_out, property, family in (("large_means", "growth", "many_rows"), ("many_rows", "value", "large_means")):
        without = ("mixed_dtypes", left_out)
        report = check_op("layer_norm", fn.layer_norm, backward=True, without=without, **QUICK)
        assert (report.verdict, report.property) == ("fails", property)
        assert family in report.findings[0].suggestion


# ------------------------------------------------------------------------------------------- every property has a fault

FAULTS = [
    ("rms_norm_backward", fn.no_second_term, "value", "identity <dx, x> = 0"),
    ("rms_norm_backward", fn.not_linear, "value", "linear in the incoming gradient: twice"),
    ("rms_norm_backward", fn.read_as_dense, "layout", "additive over rows"),
    ("rms_norm_backward", fn.last_row_of_many_left_out, "value", "additive over rows: dweight"),
    ("rms_norm_backward", fn.writes_into_the_gradient, "purity", ""),
    ("rms_norm_backward", fn.nothing_for_the_weight, "missing gradient", ""),
    ("rms_norm_backward", fn.workspace_not_written, "unwritten", ""),
    ("rms_norm_backward", fn.other_bits_each_time, "determinism", ""),
    ("attention_backward", fn.masked_keys_have_a_gradient, "masking", "a gradient of 0 gives no 0 as dk"),
    ("embedding_backward", fn.sum_in_the_narrow_format, "growth", "additive over rows"),
    ("cross_entropy_backward", fn.first_gradient_for_all, "value", "depends on the other rows"),
    ("cross_entropy_backward", fn.no_gradient_of_the_loss, "value", "a gradient of 0 gives no 0"),
]
BY_AUTOGRAD = [
    ("rms_norm", fn.detached, "missing gradient"),
    ("swiglu", fn.forgets_where_gate_is_up, "shared tensor"),
    ("swiglu", fn.other_state_when_run_again, "recomputation"),
    ("relu2", fn.overwrites_what_it_kept, "second backward"),
    ("linear", fn.weight_is_never_frozen, "needless gradient"),
    ("linear", fn.weight_hangs_on_x, "frozen tensor"),
]


def run(program):
    """The exit code of a program, run here, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        exec(compile(program, "reproduction", "exec"), {"__name__": "__main__"})
    return ended.value.code, printed.getvalue()


@pytest.mark.parametrize(("operator", "function", "property", "law"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_every_property_fails_on_a_planted_fault(operator, function, property, law):
    report = check_op(operator, function, **QUICK)
    assert (report.verdict, report.property) == ("fails", property)
    found = report.findings[0].laws
    assert any(law in said for said in found) if law else not found
    if property not in ("determinism", "unwritten"):
        code, printed = run(report.repro)
        assert code == 1, printed
    told = report.to_dict()
    json.dumps(told)
    assert told["findings"][0]["laws"] == list(found)
    assert not law or law[:20] in " ".join(report_text(report).split())


@pytest.mark.parametrize(("operator", "function", "property"), BY_AUTOGRAD, ids=lambda x: getattr(x, "__name__", ""))
def test_every_property_of_autograd_fails_on_a_planted_fault(operator, function, property):
    report = check_op(operator, function, backward=True, **QUICK)
    assert (report.op, report.verdict, report.property) == (f"{operator}_backward", "fails", property)
    code, printed = run(report.repro)
    assert code == 1, printed


def test_programs_of_right_gradients_find_nothing():
    """The same programs, with the fault taken out: a check that cannot hold would show nothing."""
    for operator, wrong, right in (
        ("linear", fn.weight_is_never_frozen, "torch.nn.functional.linear"),
        ("linear", fn.weight_hangs_on_x, "torch.nn.functional.linear"),
        ("swiglu", fn.forgets_where_gate_is_up, "fn.swiglu"),
        ("relu2", fn.overwrites_what_it_kept, "lambda x: torch.relu(x).square()"),
    ):
        program = check_op(operator, wrong, backward=True, **QUICK).repro
        fixed = program.replace(
            "forward = candidate\n", f"from tests.opcheck import gradient_candidates as fn\nforward = {right}\n"
        )
        assert fixed != program
        assert run(fixed)[0] == 0


# ------------------------------------------------------------------------------------------------- laws and predictions


@pytest.mark.parametrize("operator", laws.IDENTITIES)
def test_identities_are_true_of_the_definitions(operator):
    checked = 0
    for call in corners(f"{operator}_backward", "float32"):
        arguments, keywords = call.arrays()
        known = BACKWARD[call.operator]
        given = {n: x.astype(np.float64) if getattr(x, "dtype", None) == np.float32 else x
                 for n, x in known.bound(arguments, keywords).items()} | dict.fromkeys(known.kept)  # fmt: skip
        if level_of(call) == "hostile" or "extreme_values" in families_of(call) or "not_finite" in families_of(call):
            continue
        size = max(1.0, *(np.abs(x).sum() for x in given.values() if getattr(x, "dtype", None) == np.float64))
        for says, (off, allowed) in laws.exact_identities(operator, given).items():
            assert off <= allowed + 1e-11 * size, (says, str(call))
            checked += 1
    assert checked > 5


@pytest.mark.parametrize("operator", BACKWARD)
def test_the_predicted_error_is_that_of_the_definition_in_bfloat16(operator):
    """All fixed calls together: the RMS of error over sigma is about 1, of every output."""
    found = {}
    for call in corners(operator):
        usual = level_of(call) != "hostile" and not {"extreme_values", "large_means", "not_finite"} & {
            *families_of(call)
        }
        for e in expect(call) if usual else ():
            sigma = np.sqrt(e.variance + np.square(e.inner / 4))
            z = (e.contract - e.exact)[sigma > 0] / sigma[sigma > 0]
            assert (e.contract == e.exact)[sigma == 0].all()
            found.setdefault(e.name, []).append(z.ravel())
    assert found
    for name, parts in found.items():
        size = float(np.sqrt(np.mean(np.square(np.concatenate(parts)))))
        assert 0.2 < size < 1.3, (name, size)  # what is 0 is rounded to 0


# --------------------------------------------------------------------------------------------------------- calls, words


@pytest.mark.parametrize("operator", ["rms_norm_backward", "attention_backward", "embedding_backward", "glu_backward"])
def test_calls_are_drawn_and_are_one_in_every_form(operator):
    hypothesis = pytest.importorskip("hypothesis")
    from refllm.strategies import calls, kinds

    seen = []

    @hypothesis.settings(
        max_examples=15, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(calls(operator))
    def draw(call):
        arguments, keywords = call.arrays()
        shapes = BACKWARD[operator].result_shapes(arguments, keywords)
        assert [e.exact.shape for e in expect(call)] == shapes
        space = {"np": np, "torch": torch}
        exec("\n".join(call.code()), space)
        for a, b in zip(space["arguments"], call.tensors()[0], strict=True):
            same = torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, torch.Tensor) else a == b
            assert same
        seen.append(call.kind)

    draw()
    assert len(set(seen)) > 3
    assert len(kinds(operator)) > 2


def test_what_cannot_be_asked_is_said_in_one_sentence():
    for how, said in (
        ({"operator": "rms_norm_backward", "backward": True}, "there is a backward pass of"),
        ({"operator": "softmax", "backward": True}, "softmax_backward"),
        ({"operator": "rms_norm", "backward": True, "arrays": "numpy"}, "autograd follows Torch tensors"),
        ({"operator": "rms_norm_forward"}, "rms_norm_backward"),
    ):
        with pytest.raises(InputError, match=said):
            check_op(how.pop("operator"), fn.detached, **how)


def test_a_forward_function_that_returns_no_tensors_is_told_so():
    report = check_op("relu2", lambda x: x.detach().numpy(), dtype="float32", backward=True, **QUICK)
    assert report.property == "result"
    assert "autograd follows tensors alone" in report.summary
    assert forward_name(report.op) == "relu2"


@pytest.mark.parametrize(
    "operator", ["rms_norm", "add_layer_norm", "rope", "relu2", "swiglu", "cross_entropy", "linear"]
)
def test_every_mistake_in_a_gradient_is_named_and_nothing_right_is(operator):
    from refllm.hypotheses.operators.catalogue import catalogue
    from refllm.hypotheses.operators.fit import fitting
    from refllm.hypotheses.operators.outcomes import outcomes

    operator = f"{operator}_backward"
    known = outcomes(operator, "bfloat16")

    def answers(variant):
        return {n: x for n in range(len(known.calls)) if (x := known.results(variant, n)) is not None}

    assert fitting(operator, "bfloat16", answers(known.right)) == []
    mistakes = [h for h in catalogue(operator) if h.variants]
    assert len(mistakes) > 3
    for mistake in mistakes:
        named = fitting(operator, "bfloat16", answers(mistake.variants[0]))
        assert mistake.name in [fit.hypothesis.name for fit in named]


def test_a_wrong_gradient_looks_like_its_mistake():
    report = check_op("rms_norm_backward", fn.no_second_term, **QUICK)
    assert [guess.name for guess in report.guesses] == ["second term missing"]
    assert "np.mean(g * n" in report.guesses[0].definition
    assert "np.mean(g * n" not in report.guesses[0].changed
