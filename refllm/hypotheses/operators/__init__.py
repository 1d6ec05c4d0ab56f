"""Hypotheses on operators: mistakes as small edits of a definition's text, by which a wrong result is named.

`catalogue` has all of an operator, `designed` the inputs on which they differ, `fit` says which of them give a
candidate's numbers.
"""
