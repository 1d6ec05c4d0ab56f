"""What a call returns is read by name, by position and as a tuple, and what it did not make is not there."""

import numpy as np
import pytest

from refllm.forward.outputs import ModelOutput


def test_what_was_made_is_there_by_name_and_by_position() -> None:
    loss, logits = np.float64(2.5), np.zeros((1, 3, 4))
    out = ModelOutput(logits=logits, loss=loss)
    assert out.keys() == ("loss", "logits")  # in the order of the fields, not of the call
    assert out.to_tuple() == (loss, logits)
    assert (out["loss"], out[0], out[1:]) == (loss, loss, (logits,))
    assert out[-1] is out["logits"] is out.logits is logits
    assert len(out) == 2
    assert "logits" in out
    assert "attentions" not in out
    assert out.attentions is None


@pytest.mark.parametrize("key", ["attentions", "nothing", "to_tuple"])
def test_what_was_not_made_is_a_key_error(key: str) -> None:
    with pytest.raises(KeyError, match=key):
        ModelOutput(logits=np.zeros(1))[key]
    with pytest.raises(IndexError):
        ModelOutput()[0]
