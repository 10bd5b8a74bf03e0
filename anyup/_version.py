"""The version of the package, in the one place from which the build and ``anyup.__version__`` read it."""

__version__ = "0.1.0"
