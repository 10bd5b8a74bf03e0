"""Measuring what an upsampler is worth: `anyup evaluate`.

Each view has interpolation beside the weights given: `features` (the true features of a larger image, of any encoder,
on held-out photographs), `segmentation`, `depth` and `normals` (linear probes on the upsampled features), `pictures`
(principal components, to look at). Results go to JSON and a table. Needs the extra `evaluate`.
"""
