"""The bridge from ``anyup.kernels`` to the Triton sources in the top-level ``kernels/`` folder.

``kernels`` is also the import name of another package, so that folder has no ``__init__.py`` and is never
imported under its own name. A module with a ``__path__`` is a package to the import system: this one points
at ``anyup/_kernels``, where a wheel puts the sources, and else at the checkout's ``kernels/``, so that
``import anyup.kernels.<module>`` means the same file in a wheel, an editable install, a source tree loaded by
``torch.hub`` and a test run. Where neither folder exists ``__path__`` is empty and every such import is a
plain ``ModuleNotFoundError``.
"""

from __future__ import annotations

import os

# The wheel's copy; beside an installed package, ``../kernels`` would be another package of that name.
_here = os.path.dirname(os.path.abspath(__file__))
_shipped = os.path.join(_here, "_kernels")
_checkout = os.path.join(os.path.dirname(_here), "kernels")


def _folders() -> list[str]:
    """Return the folder that holds the kernel modules, as the one entry of a list, or an empty list."""
    if os.path.isdir(_shipped):
        return [_shipped]
    # Without ``setup.py`` beside it this is no checkout, but a package installed without any kernel.
    if os.path.isfile(os.path.join(os.path.dirname(_here), "setup.py")) and os.path.isdir(_checkout):
        return [_checkout]
    return []


__path__: list[str] = _folders()
