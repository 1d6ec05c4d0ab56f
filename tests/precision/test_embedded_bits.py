"""The embedded checkpoints, run by unmodified Transformers on one thread, differ from policy "hf-eager" in no bit
(where torch's kernels are known ones)."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from this_cpu import every_dtype
from witness import numpy_of

import refllm
from refllm import golden


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:.*factor=.* is used")
@pytest.mark.parametrize("dtype", every_dtype())
@pytest.mark.parametrize("name", sorted(golden.checkpoints()))
def test_embedded_checkpoint_has_the_logits_of_transformers(name: str, dtype: Any) -> None:
    folder = golden.path(name)
    ours = refllm.load(folder, dtype=dtype, policy="hf-eager")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    ids = np.random.default_rng(1).integers(0, ours.config.vocab_size, (1, 128))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            expected = numpy_of(theirs(torch.from_numpy(ids)).logits)
    finally:
        torch.set_num_threads(threads)
    assert np.count_nonzero(ours(ids).logits != expected) == 0
