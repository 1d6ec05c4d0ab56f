"""attorch: its repository on the path."""

from wrapping import and_gradients, checkout, released

NAME, VERSION = "attorch", checkout("attorch")

from attorch.cross_entropy_loss_layer import CrossEntropyLossAutoGrad  # noqa: E402
from attorch.layer_norm_layer import LayerNormAutoGrad  # noqa: E402
from attorch.rms_norm_layer import RMSNormAutoGrad  # noqa: E402


@and_gradients()
@released(NAME, "rms_norm", "RMSNormAutoGrad")
def rms_norm(x, weight, eps):
    return RMSNormAutoGrad.apply(x, weight, eps)


@and_gradients()
@released(NAME, "layer_norm", "LayerNormAutoGrad")
def layer_norm(x, weight, bias, eps):
    return LayerNormAutoGrad.apply(x, weight, bias, eps, False)


_LEFT = ("reduction", "ignore_index", "ignored_labels", "nothing_counted", "empty")


@and_gradients()
@released(NAME, "cross_entropy", "CrossEntropyLossAutoGrad", convention="torch", without=_LEFT)
def cross_entropy(logits, labels):
    return CrossEntropyLossAutoGrad.apply(logits, labels)
