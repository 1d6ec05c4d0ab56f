"""Hypotheses: small named changes of the reference, one of which may be what a wrong implementation did.

A wrong run is run again under each; the one that brings its error back to rounding says what is wrong with it.
"""
