"""The committed table of tiles: which block sizes a kernel takes for which shape on which GPU, and who chose them how.

tiles.json has one line per kernel, shape class and target. A class is made of what belongs to one row alone (head
dimension, length of a row, dtype) and never of the batch, so that a row's bits do not depend on what else is computed.
Kernels read the table when they are planned; nothing is searched in a user's call. `refllm bench tune --write` writes
it: measured where there is a GPU, else ranked by what the ahead-of-time gate reports. Each line says which, by which
command, with which Triton, and the figures. A line that was chosen by hand says why, and stays until it is measured.

table.py reads and writes, tunables.py has the calls and candidates of each kernel, rank.py orders compiled candidates,
measure.py checks and times them on a GPU, tune.py is the command.
"""

from refllm.kernels.tuning.table import ANY, Entry, entries, tile

__all__ = ["ANY", "Entry", "entries", "tile"]
