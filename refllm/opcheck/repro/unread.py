"""Lines that change what nobody may read: memory never written, what lies between elements, and masked elements."""

from refllm.ops.contracts import contract_of
from refllm.strategies.call import Call

_FILLED = """
filling, integer = 0.0, 0


def filled(allocate):
    def made(*args, **kwargs):
        x = allocate(*args, **kwargs)
        FILL

    return made


""".removeprefix("\n")
_FILL_NUMPY = "x[...] = filling if x.dtype.kind in 'fV' else integer\n        return x"
_FILL_TORCH = "return x.fill_(filling if x.is_floating_point() else integer)"
_PLACE_NUMPY = "np.empty, np.empty_like = filled(np.empty), filled(np.empty_like)"


def filled_memory(numpy: bool) -> list[str]:
    """Lines after which new memory holds `filling`."""
    made = _FILLED.replace("FILL", _FILL_NUMPY if numpy else _FILL_TORCH)
    return [*made.splitlines(), *([_PLACE_NUMPY] if numpy else _place_torch())]


def _place_torch() -> list[str]:
    """Every function that the search itself exchanges."""
    import torch

    from refllm.kernels.interpreter.poison import ALLOCATORS

    lines = []
    for owner, where in ((torch, "torch"), (torch.Tensor, "torch.Tensor")):
        names = " ".join(name for one, name in ALLOCATORS if one is owner)
        lines += [f'for name in "{names}".split():', f"    setattr({where}, name, filled(getattr({where}, name)))"]
    return lines


BETWEEN = """
for x in [x for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor)]:
    memory = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    between = torch.ones_like(memory, dtype=torch.bool)
    between.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
    memory[between] = 3
""".strip().splitlines()
BETWEEN_NUMPY = """
for x in [x for x in (*arguments, *keywords.values()) if isinstance(x, np.ndarray) and isinstance(x.base, np.ndarray)]:
    memory, start = x.base.reshape(-1), (x.ctypes.data - x.base.ctypes.data) // x.itemsize
    between = np.ones(memory.size, bool)
    np.ndarray(x.shape, bool, between, start, [n // x.itemsize for n in x.strides])[...] = False
    memory[between] = 3
""".strip().splitlines()


def between_changed(numpy: bool) -> list[str]:
    """Lines that write 3 between the elements."""
    return BETWEEN_NUMPY if numpy else BETWEEN


_MASKED = """
hidden = ~keywords["key_mask"][:, None].expand(k.shape[:3])
for x, where in ((k, hidden), (v, hidden)):
    x[where] = 1 - x[where]
""".strip()
_BLIND = """
blind = (torch.arange(q.shape[2], device=q.device) < q.shape[2] - k.shape[2]).expand(q.shape[:3])
where = blind & keywords.get("causal", True)
q[where] = 1 - q[where]
""".strip()
_BEYOND = """
beyond = (torch.arange(k.shape[2], device=k.device) >= lengths[:, None])[:, None].expand(k.shape[:3])
for x, where in ((k, beyond), (v, beyond)):
    x[where] = 1 - x[where]
""".strip()


_MASKED_NUMPY = """
hidden = np.array(np.broadcast_to(~keywords["key_mask"][:, None], k.shape[:3]))
for x, where in ((k, hidden), (v, hidden)):
    x[where] = 1 - x[where]
""".strip()
_BLIND_NUMPY = """
blind = np.broadcast_to(np.arange(q.shape[2]) < q.shape[2] - k.shape[2], q.shape[:3])
where = blind & keywords.get("causal", True)
q[where] = 1 - q[where]
""".strip()
_BEYOND_NUMPY = """
beyond = np.broadcast_to((np.arange(k.shape[2]) >= lengths[:, None])[:, None], k.shape[:3])
for x, where in ((k, beyond), (v, beyond)):
    x[where] = 1 - x[where]
""".strip()


def unread_changed(call: Call, numpy: bool = False) -> list[str]:
    """Lines that change the elements of `arguments` that the contract does not read."""
    known = contract_of(call.operator)
    kinds = known.kinds.values()
    if "mask" in kinds or "lengths" in kinds:
        names = ", ".join(name.removesuffix("_cache") for name in call.names)
        masked = (_MASKED, _MASKED_NUMPY) if dict(call.keywords).get("key_mask") is not None else ("", "")
        hidden = (_BEYOND, _BEYOND_NUMPY)[numpy] if "lengths" in kinds else ""
        blind = (_BLIND, _BLIND_NUMPY)[numpy] if "mask" in kinds else ""
        parts = (masked[numpy] if "mask" in kinds else "", blind, hidden)
        return [f"{names} = arguments", *(line for part in parts for line in part.splitlines())]
    rows = next(i for i, axes in enumerate(known.arguments.values()) if axes[0] == "N" and len(axes) == 2)
    labels = list(known.parameters).index("labels")
    return [
        f'x, where = arguments[{rows}], arguments[{labels}] == keywords.get("ignore_index", -100)',
        "x[where] = 1 - x[where]",
    ]
