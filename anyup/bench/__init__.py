"""Measuring on the user's machine: what the installed package runs, without pytest."""
