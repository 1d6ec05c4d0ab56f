"""Measuring another implementation against the reference, value by value."""
