"""Activations as beginners write them."""

import numpy as np
import torch
import torch.nn.functional as F

from beginners import beginner


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@beginner("swiglu", "torch")
def swiglu_arguments(gate, up):
    """gate and up are exchanged: silu is taken of up."""
    return gate * F.silu(up)


@beginner("swiglu")
def swiglu_glu(gate, up):
    """The sigmoid of the gate multiplies up, without the factor gate: this is GLU."""
    return sigmoid(gate) * up


@beginner("swiglu", "torch")
def swiglu_gelu(gate, up):
    """GELU in place of SiLU."""
    return F.gelu(gate) * up


@beginner("swiglu", "torch")
def swiglu_gelu_tanh(gate, up):
    """GELU (by tanh) in place of SiLU."""
    return F.gelu(gate, approximate="tanh") * up


@beginner("swiglu")
def swiglu_of_the_product(gate, up):
    """SiLU is taken of the product gate * up."""
    h = gate * up
    return h * sigmoid(h)


@beginner("swiglu")
def swiglu_sigmoid_of_up(gate, up):
    """The sigmoid is that of up, not of the gate."""
    return gate * sigmoid(up) * up


@beginner("swiglu", "torch")
def swiglu_added(gate, up):
    """silu(gate) is added to up, and should multiply it."""
    return F.silu(gate) + up


@beginner("swiglu", "torch")
def swiglu_no_up(gate, up):
    """up is not multiplied."""
    return F.silu(gate)


@beginner("swiglu")
def swiglu_sign(gate, up):
    """The exponential is e^x and should be e^-x."""
    return gate / (1 + np.exp(gate)) * up


@beginner("swiglu", "torch")
def swiglu_relu(gate, up):
    """ReLU in place of SiLU."""
    return F.relu(gate) * up


@beginner("swiglu", "torch")
def swiglu_both(gate, up):
    """SiLU is taken of gate and of up."""
    return F.silu(gate) * F.silu(up)


@beginner("swiglu")
def swiglu_quick(gate, up):
    """The sigmoid is that of 1.702 gate: quick GELU."""
    return gate * sigmoid(1.702 * gate) * up


@beginner("swiglu")
def swiglu_bilinear(gate, up):
    """There is no activation: gate * up."""
    return gate * up


@beginner("swiglu", "torch")
def swiglu_tanh(gate, up):
    """tanh in place of SiLU."""
    return torch.tanh(gate) * up


@beginner("relu2")
def relu2_square(x):
    """x is squared without the relu."""
    return x**2


@beginner("relu2", "torch")
def relu2_relu_of_square(x):
    """The relu is taken of the square, so that negative numbers are squared too."""
    return F.relu(x * x)


@beginner("relu2", "torch")
def relu2_relu(x):
    """The relu is not squared."""
    return F.relu(x)


@beginner("relu2")
def relu2_times_two(x):
    """Twice the relu, not its square."""
    return np.maximum(x, 0) * 2


@beginner("relu2")
def relu2_sign_kept(x):
    """x times |x|: negative numbers are squared with their sign."""
    return x * np.abs(x)


@beginner("relu2", "torch")
def relu2_leaky(x):
    """A leaky relu is squared."""
    return F.leaky_relu(x) ** 2


@beginner("relu2")
def relu2_minimum(x):
    """The minimum with 0 is squared, not the maximum."""
    return np.minimum(x, 0) ** 2


@beginner("relu2", "torch")
def relu2_clamped(x):
    """The relu is clamped at 1 as well."""
    return torch.clamp(x, 0, 1) ** 2
