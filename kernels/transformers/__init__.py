"""The operators of `refllm.kernels` inside Hugging Face Transformers, in two ways.

Attention alone, under any model whose attention is causal with grouped heads. Importing this package registers it:

    import refllm.kernels.transformers
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="refllm")

Everything that there is an operator for, in a model of the families that this project defines:

    patch = refllm.kernels.patch(model)      # norms, rotation, attention, activation, loss
    print(patch.report())
    patch.undo()

    masks.py       who sees whom: what Transformers asks a mask function, in the terms of our attention
    attention.py   the attention functions "refllm", "refllm-triton" and "refllm-plain"
    operators.py   one call of an operator: which backend, and its gradients
    modules.py     the forward passes that a patch puts in place of those of single modules
    patching.py    what is swapped in which family; `patch`, `unpatch`, `Patch`

Needs the package `transformers`. A model trains through these operators as through Transformers' own.
"""

from refllm.errors import MissingExtraError
from refllm.extras import install_command, missing_extra, not_installed

try:
    from refllm.kernels.transformers.attention import register
    from refllm.kernels.transformers.patching import Patch, patch, unpatch
except ImportError as error:
    package = (error.name or "").split(".")[0]
    if package == "torch":
        raise missing_extra("refllm.kernels.transformers", *not_installed(("torch", "transformers"))) from error
    if package != "transformers":
        raise
    what = f"refllm.kernels.transformers does not find what it needs of transformers 5.23 ({error})"
    raise MissingExtraError(f"{what}; install with: {install_command('transformers')}") from error

__all__ = ["Patch", "patch", "register", "unpatch"]

register()
