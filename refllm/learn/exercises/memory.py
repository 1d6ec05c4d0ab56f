"""What the definitions of the Triton track are written with: memory, and programs that load and store."""

PROGRAMS = """def cdiv(n, tile):
    return -(-n // tile)


def load(memory, i, mask=True, other=0.0):
    i, mask = np.broadcast_arrays(i, mask)
    flat = memory.reshape(-1)
    if ((i < 0) | (i >= flat.size))[mask].any():
        raise IndexError("outside")
    return np.where(mask, flat[np.where(mask, i, 0)], other)


def store(memory, i, value, mask=True):
    i, mask = np.broadcast_arrays(i, mask)
    if ((i < 0) | (i >= memory.size))[mask].any():
        raise IndexError("outside")
    memory.reshape(-1)[i[mask]] = np.broadcast_to(value, i.shape)[mask]


"""
"""The beginning of every such definition. Reading outside is an IndexError: the interpreter says it first."""
