"""What operators on Torch tensors refuse, whichever argument it is: another device, another dtype, another shape."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from refllm import kernels  # noqa: E402
from refllm.errors import InputError  # noqa: E402
from refllm.kernels import plain  # noqa: E402
from refllm.kernels.calls import Source, call  # noqa: E402
from refllm.ops.contracts import contract_of  # noqa: E402

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
FORMS = {"plain": plain, "triton": kernels}
SIZES = {"B": 2, "S": 3, "T": 9, "N": 9, "H": 4, "K": 2, "D": 8, "R": 8, "E": 8, "F": 8, "V": 6}


def arguments_of(operator: str, dtype: torch.dtype = F32) -> dict[str, Any]:
    """Of a small call that is right, by name: a value for every tensor, key mask included."""
    known = contract_of(operator)
    given = {"key_mask": torch.ones(2, 9, dtype=torch.bool)} if "key_mask" in known.arguments else {}
    arguments, keywords = call(operator, SIZES, Source(dtype, "cpu", seed=0), **given)
    return dict(zip(known.parameters, arguments, strict=False)) | keywords


def run(form: str, operator: str, named: dict[str, Any]) -> Any:
    first = [name for name, p in contract_of(operator).parameters.items() if p.kind is not p.KEYWORD_ONLY]
    keywords = {name: x for name, x in named.items() if name not in first}
    with kernels.interpreted():
        return getattr(FORMS[form], operator)(*(named[name] for name in first), **keywords)


@pytest.mark.parametrize("operator", kernels.OPERATORS)
def test_every_tensor_is_asked_for_its_device_its_dtype_and_its_shape(operator: str) -> None:
    """The first one says what the others have to be."""
    named = arguments_of(operator)
    run("plain", operator, named)
    changes = {
        "another device": lambda x: x.to("meta"),
        "another dtype": lambda x: x.to(torch.complex64),
        "an axis more": lambda x: x[None, None, None],
        "no tensor": lambda x: x.tolist(),
    }
    tensors = [name for name, x in named.items() if isinstance(x, torch.Tensor)]
    assert tensors
    for name in tensors:
        for what, change in changes.items():
            if what in ("another device", "an axis more") and name == tensors[0] and len(tensors) < 4:
                continue  # rows of any number of axes; and alone there is nothing that it would have to fit
            with pytest.raises(InputError, match=rf"^{operator}: "):
                run("plain", operator, named | {name: change(named[name])})


@pytest.mark.parametrize("operator", kernels.OPERATORS)
def test_float32_beside_narrower_arguments_is_taken_where_the_record_says_so(operator: str) -> None:
    named, known = arguments_of(operator, BF16), contract_of(operator)
    narrow = [name for name, x in named.items() if isinstance(x, torch.Tensor) and x.dtype == BF16]
    for name in narrow:
        together = [other for other in narrow if other in ("cos", "sin")] if name in ("cos", "sin") else [name]
        wide = named | {other: named[other].float() for other in together}
        if name in known.or_float32 or len(narrow) == 1:
            run("plain", operator, wide)
        else:
            with pytest.raises(InputError, match=rf"^{operator}: "):
                run("plain", operator, wide)


class Made(tuple[int, ...]):
    """Zeros of this shape in the place of a tensor, in its dtype."""


def changed(old: Any, new: Any) -> Any:
    if isinstance(new, Made):
        return torch.zeros(new, dtype=old.dtype)
    return old.to(new) if isinstance(new, torch.dtype) or new == "meta" else new


def z(*shape: int) -> Made:
    return Made(shape)


LABELS = torch.tensor([0, 1, -100, 5, 0, 0])
CACHE = torch.zeros(2, 2, 8, 8)
ROOM = (CACHE, CACHE.clone())
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("rms_norm", {"weight": z(7)}, "weight is [7] torch.float32 on cpu; expected [8]"),
    ("rms_norm", {"weight": BF16}, "weight is [8] torch.bfloat16 on cpu; expected [8] torch.float32"),
    ("rms_norm", {"x": F64}, "x is [2, 3, 8] torch.float64"),
    ("rms_norm", {"x": [1.0]}, "x is list"),
    ("rms_norm", {"x": z()}, "expected at least one axis"),
    ("add_rms_norm", {"residual": z(1, 3, 8)}, "residual is [1, 3, 8] torch.float32 on cpu; expected [2, 3, 8]"),
    ("layer_norm", {"bias": z(2, 8)}, "bias is [2, 8] torch.float32 on cpu; expected [8]"),
    ("layer_norm", {"weight": "meta"}, "on meta; expected [8] torch.float32 on cpu"),
    ("add_layer_norm", {"residual": F16, "bias": None}, "torch.float16 on cpu; expected [2, 3, 8] torch.float32"),
    ("swiglu", {"up": z(2, 3, 7)}, "up is [2, 3, 7] torch.float32 on cpu; expected [2, 3, 8]"),
    ("swiglu", {"up": F16}, "up is [2, 3, 8] torch.float16 on cpu; expected [2, 3, 8] torch.float32"),
    ("swiglu", {"up": "meta"}, "on meta; expected [2, 3, 8] torch.float32 on cpu"),
    ("relu2", {"x": torch.int64}, "torch.int64 on cpu; expected a float32, float16 or bfloat16 tensor"),
    ("rope", {"q": z(4, 3, 8)}, "q is [4, 3, 8] torch.float32 on cpu; expected 4 axes"),
    ("rope", {"k": z(2, 2, 3, 6)}, "k is [2, 2, 3, 6] torch.float32 on cpu; expected [2, 2, 3, 8]"),
    ("rope", {"k": z(1, 2, 3, 8)}, "k is [1, 2, 3, 8] torch.float32 on cpu; expected [2, 2, 3, 8]"),
    ("rope", {"k": z(2, 3, 8)}, "k is [2, 3, 8] torch.float32 on cpu; expected [2, heads, 3, 8]"),
    ("rope", {"k": F16}, "k is [2, 2, 3, 8] torch.float16 on cpu; expected [2, 2, 3, 8] torch.float32"),
    ("rope", {"cos": z(3, 5)}, "R <= D = 8: each angle once"),
    ("rope", {"cos": z(2, 4), "sin": z(2, 4)}, "cos is [2, 4] torch.float32 on cpu; expected [3, 4]"),
    ("rope", {"cos": z(1, 3, 4), "sin": z(1, 3, 4)}, "cos is [1, 3, 4] torch.float32 on cpu; expected [2, 3, 4]"),
    ("rope", {"cos": F16, "sin": F16}, "cos is [3, 4] torch.float16 on cpu; expected [3, 4] torch.float32"),
    ("rope", {"sin": z(3, 3)}, "sin is [3, 3] torch.float32 on cpu; expected [3, 4]"),
    ("rope", {"sin": BF16}, "sin is [3, 4] torch.bfloat16 on cpu; expected [3, 4] torch.float32"),
    ("rope", {"cos": "meta"}, "on meta; expected"),
    ("rope", {"cos": 1.0}, "cos is float"),
    ("norm_rope", {"q_weight": z(2, 8)}, "q_weight is [2, 8] torch.float32 on cpu; expected [4, 8]"),
    ("norm_rope", {"k_weight": z(8)}, "k_weight is [8] torch.float32 on cpu; expected [2, 8]"),
    ("norm_rope", {"k_weight": F16}, "k_weight is [2, 8] torch.float16 on cpu; expected [2, 8] torch.float32"),
    ("norm_rope", {"cos": z(3, 8)}, "R <= D = 8"),
    ("norm_rope", {"norm": "batch"}, 'norm=\'batch\' is not known; use "rms" or "layer"'),
    ("rms_norm_qkv_rope", {"x": z(3, 8)}, "x is [3, 8] torch.float32 on cpu; expected 3 axes"),
    ("rms_norm_qkv_rope", {"norm_weight": z(9)}, "norm_weight is [9]"),
    ("rms_norm_qkv_rope", {"w_qkv": F16}, "w_qkv is [64, 8] torch.float16"),
    ("rms_norm_qkv_rope", {"w_qkv": z(63, 8)}, "num_heads=4 and num_kv_heads=2"),
    ("rms_norm_qkv_rope", {"w_qkv": z(24, 8), "b_qkv": None}, "an even head_dim, found 24 / 8 = 3"),
    ("rms_norm_qkv_rope", {"b_qkv": z(63)}, "b_qkv is [63]"),
    ("rms_norm_qkv_rope", {"cos": z(3, 5), "sin": z(3, 5)}, "R <= D = 8: each angle once"),
    ("rms_norm_qkv_rope", {"cos": z(2, 4)}, "cos is [2, 4]"),
    ("rms_norm_qkv_rope", {"sin": z(3, 3)}, "sin is [3, 3]"),
    ("rms_norm_qkv_rope", {"num_heads": 0}, "each at least 1"),
    ("rms_norm_qkv_rope", {"cache": (*ROOM, torch.tensor([0, 6]))}, "lengths holds 6; expected 0..5"),
    ("rms_norm_qkv_rope", {"cache": (*ROOM, torch.tensor([0, -1]))}, "lengths holds -1"),
    ("rms_norm_qkv_rope", {"cache": (*ROOM, torch.tensor([0.0, 1.0]))}, "lengths is [2] torch.float32"),
    ("rms_norm_qkv_rope", {"cache": (CACHE, CACHE[:, :, :7], torch.tensor([0, 1]))}, "v_cache is [2, 2, 7, 8]"),
    ("rms_norm_qkv_rope", {"cache": (CACHE[:1], CACHE, torch.tensor([0, 1]))}, "k_cache is [1, 2, 8, 8]"),
    ("rms_norm_qkv_rope", {"cache": ROOM}, "cache is tuple"),
    ("attention", {"q": z(2, 4, 3)}, "q is [2, 4, 3] torch.float32 on cpu; expected 4 axes"),
    ("attention", {"q": z(2, 4, 3, 300), "k": z(2, 2, 9, 300)}, "8 to 256"),
    ("attention", {"q": z(2, 4, 3, 4), "k": z(2, 2, 9, 4)}, "8 to 256"),
    ("attention", {"k": z(2, 3, 9, 8), "v": z(2, 3, 9, 8)}, "divides the 4 query heads"),
    ("attention", {"k": z(2, 0, 9, 8), "v": z(2, 0, 9, 8)}, "divides"),
    ("attention", {"k": z(3, 2, 9, 8)}, "k is [3, 2, 9, 8] torch.float32 on cpu; expected [2, 2, 9, 8]"),
    ("attention", {"v": z(2, 2, 8, 8)}, "v is [2, 2, 8, 8] torch.float32 on cpu; expected [2, 2, 9, 8]"),
    ("attention", {"v": BF16}, "v is [2, 2, 9, 8] torch.bfloat16 on cpu; expected [2, 2, 9, 8] torch.float32"),
    ("attention", {"q": torch.int32}, "torch.int32"),
    ("attention", {"key_mask": z(2, 8)}, "key_mask is [2, 8] torch.bool on cpu; expected [2, 9]"),
    ("attention", {"key_mask": F32}, "torch.bool"),
    ("decode_attention", {"q": z(2, 4, 9, 8)}, "1 to 8 queries"),
    ("decode_attention", {"q": z(2, 4, 0, 8)}, "1 to 8 queries"),
    ("decode_attention", {"q": z(2, 3, 1, 8)}, "divides the 3 query heads"),
    (
        "decode_attention",
        {"k_cache": z(2, 2, 8, 8)},
        "v_cache is [2, 2, 9, 8] torch.float32 on cpu; expected [2, 2, 8, 8]",
    ),
    ("decode_attention", {"lengths": z(3)}, "lengths is [3] torch.int64 on cpu; expected [2]"),
    ("decode_attention", {"lengths": F32}, "int32 or torch.int64"),
    ("decode_attention", {"v_cache": F16}, "torch.float16 on cpu; expected [2, 2, 9, 8] torch.float32"),
    ("decode_attention", {"lengths": torch.tensor([9, -1])}, "lengths[1] is -1; expected 0..9"),
    ("decode_attention", {"lengths": torch.tensor([9, 10])}, "lengths[1] is 10; expected 0..9"),
    ("cross_entropy", {"logits": z(8)}, "logits is [8] torch.float32 on cpu; expected 2 axes"),
    ("cross_entropy", {"logits": F64}, "expected a float32, float16 or bfloat16 tensor"),
    ("cross_entropy", {"labels": z(5)}, "labels is [5] torch.int64"),
    ("cross_entropy", {"labels": F32}, "expected [6] torch.int32 or torch.int64"),
    ("cross_entropy", {"reduction": "average"}, 'use "mean", "sum" or "none"'),
    ("cross_entropy", {"labels": LABELS + 3}, "labels holds -97, outside 0..5"),
    ("cross_entropy", {"labels": LABELS, "ignore_index": -1}, "use -1 for a position that does not count"),
    ("linear_cross_entropy", {"weight": z(6, 7)}, "weight is [6, 7] torch.float32 on cpu; expected [6, 8]"),
    ("linear_cross_entropy", {"weight": F16}, "weight is [6, 8] torch.float16"),
    ("linear_cross_entropy", {"labels": torch.tensor([0, 6, 0, 0, 0, 0])}, "labels holds 6, outside 0..5"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("operator", "change", "words"), REFUSED, ids=[f"{o}-{'-'.join(c)}" for o, c, _ in REFUSED])
def test_arguments_that_do_not_fit_are_named(operator: str, change: dict[str, Any], words: str, form: str) -> None:
    named = arguments_of(operator)
    with pytest.raises(InputError) as error:
        run(form, operator, named | {name: changed(named.get(name), new) for name, new in change.items()})
    assert str(error.value).startswith(f"{operator}: ")
    assert words in str(error.value)
