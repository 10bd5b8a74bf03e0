"""The page of `anyup gallery`: photographs, their features, and what the upsampler makes of them."""
