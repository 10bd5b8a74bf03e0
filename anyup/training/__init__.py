"""Training of the upsampler on any folder of photographs with any frozen encoders: `anyup train`.

A step takes a few photographs, one encoder's features of them at low resolution and of aligned crops at high
resolution (read from a cache on disk), upsamples the former and compares with the latter. Everything drawn at random
is a function of the seed and of the number of the sample, so a run that is resumed, or split over processes, sees
what one run in one process sees. Needs the extra `train`.
"""
