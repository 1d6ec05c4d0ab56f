"""The ahead-of-time gate: compiles kernels for GPUs that are not there, and says what would make them slow or fail.

    report = compile_launch(launch, target)          # registers, spills, shared memory, instructions
    findings = gates(launch, report, target)         # one sentence for everything that is wrong

compile_code.py builds the specialisation and compiles it, machine_code.py reads what came out, occupancy.py counts how
many programs fit, gates.py judges, sources.py finds kernels (ours or a user's), batch.py compiles many in parallel,
show.py prints. On the command line: `refllm kernels check-aot`.
"""

from refllm.kernels.aot.compile_code import DoesNotCompile, Report, compile_launch
from refllm.kernels.aot.gates import Finding, gates

__all__ = ["DoesNotCompile", "Finding", "Report", "compile_launch", "gates"]
