"""What operators on Torch tensors refuse, whichever argument it is: another device, another dtype, another shape."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("hypothesis")

from refllm import kernels  # noqa: E402
from refllm.errors import InputError  # noqa: E402
from refllm.ops.contracts import contract_of  # noqa: E402
from refllm.strategies import corners  # noqa: E402


def full_call(operator: str) -> tuple[list[Any], dict[str, Any]]:
    """A plain call with every argument that is a tensor, key mask included."""
    call = next(c for c in corners(operator, "bfloat16") if all(x is not None for x in c.arguments))
    arguments, keywords = call.tensors()
    assert all(x.numel() for x in arguments if isinstance(x, torch.Tensor))
    if operator == "attention":
        keywords["key_mask"] = torch.ones(arguments[1].shape[0], arguments[1].shape[2], dtype=torch.bool)
    return list(arguments), keywords


@pytest.mark.parametrize("operator", kernels.OPERATORS)
def test_every_tensor_is_asked_for_its_device_its_dtype_and_its_shape(operator: str) -> None:
    """The first one says what the others have to be."""
    arguments, keywords = full_call(operator)
    function = getattr(kernels.plain, operator)
    function(*arguments, **keywords)
    changes = {
        "another device": lambda x: x.to("meta"),
        "another dtype": lambda x: x.to(torch.complex64),
        "an axis more": lambda x: x[None, None, None],
        "no tensor": lambda x: x.tolist(),
    }
    places = [(arguments, i) for i in range(len(arguments))] + [(keywords, name) for name in keywords]
    tensors = [(where, at) for where, at in places if isinstance(where[at], torch.Tensor)]
    assert tensors
    for where, at in tensors:
        for what, change in changes.items():
            if what in ("another device", "an axis more") and at == 0 and len(tensors) < 4:
                continue  # rows of any number of axes; and alone there is nothing that it would have to fit
            right, where[at] = where[at], change(where[at])
            with pytest.raises(InputError, match=rf"^{operator}: "):
                function(*arguments, **keywords)
            where[at] = right


@pytest.mark.parametrize("operator", kernels.OPERATORS)
def test_float32_beside_narrower_arguments_is_taken_where_the_record_says_so(operator: str) -> None:
    arguments, keywords = full_call(operator)
    function, known = getattr(kernels.plain, operator), contract_of(operator)
    first, *others = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16]
    names = list(known.parameters)
    for i in [first, *others]:
        together = [j for j in others if names[i] in ("cos", "sin") and names[j] in ("cos", "sin")] or [i]
        wide = [x.float() if j in together else x for j, x in enumerate(arguments)]
        if names[i] in known.or_float32 or not others:
            function(*wide, **keywords)
        else:
            with pytest.raises(InputError, match=rf"^{operator}: "):
                function(*wide, **keywords)
