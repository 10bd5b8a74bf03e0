"""A video of a few small frames, written by PyAV."""

from __future__ import annotations

from typing import Any

import numpy as np

SIZE = (16, 32)


def write_video(path: str, frames: int = 3, rotation: int | None = None) -> list[np.ndarray[Any, Any]]:
    """Frames of one grey each, brighter in the upper left corner: (height, width, 3), nearly as they are decoded.

    `rotation` is what viewers are told to turn them by, in degrees.
    """
    import av

    made = [np.full((*SIZE, 3), 40 * number % 120, np.uint8) for number in range(frames)]
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *SIZE, "yuv420p", 4_000_000
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for pixels in made:
            pixels[:8, :8] += 100
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return made
