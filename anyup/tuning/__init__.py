"""Fast configs of the kernels for a machine, timed there: the command `anyup tune`."""
