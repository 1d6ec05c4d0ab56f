"""What the interpreter raises. Each message is one sentence that names the kernel, the program and the line."""

from refllm.errors import RefllmError


class KernelError(RefllmError):
    """A kernel did what it must not do on a GPU, or uses what the interpreter cannot run."""


class OutOfBoundsError(KernelError, IndexError):
    """A load, store or atomic touches memory outside the storage of the argument that its pointer came from."""


class IntegerOverflowError(KernelError, ArithmeticError):
    """Integer arithmetic, usually of an offset, left the range of its type."""


class RaceError(KernelError):
    """The result depends on the order in which programs, or lanes of one program, run."""


class ConfigurationsDifferError(KernelError):
    """Two configurations of an autotuned kernel have different results."""


class UninitializedError(KernelError):
    """A kernel read memory that nobody wrote."""


class AmbiguousError(KernelError):
    """The condition of `if` or `while` is a block, not a scalar."""


class WaitsError(KernelError):
    """A program waits for one that runs after it."""


class DeviceAssertionError(KernelError, AssertionError):
    """tl.device_assert, tl.assume, tl.static_assert or `assert` inside a kernel failed."""


class StaticAssertionError(DeviceAssertionError):
    """tl.static_assert failed: the kernel does not compile with these constants."""


class MaskedOffWarning(UserWarning):
    """Lanes that a load masked off without `other` count as 0, which is not promised on every GPU."""


class NeedsGpuError(KernelError, RuntimeError):
    """Something was asked of the stand-in for CUDA that only a GPU can do."""
