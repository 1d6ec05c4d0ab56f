"""One file per stack that can be checked by name; none is imported before it is asked for."""
