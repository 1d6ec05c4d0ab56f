"""Triton's interpreter, repaired (temporary version)."""
import contextlib, sys, os
sys.path.insert(0, "/tmp/proto")
_active = 0
def active(): return _active > 0
@contextlib.contextmanager
def interpreted(**kw):
    global _active
    import interpreter_repairs as R, interpret_and_compile as C
    if not getattr(R, "_done", False):
        R.install(races=True); R._done = True
    mods = [m for n, m in list(sys.modules.items()) if n.startswith("refllm.kernels.triton") or n.startswith("test_kernel")]
    with C.interpreting(*mods):
        _active += 1
        try: yield
        finally: _active -= 1
