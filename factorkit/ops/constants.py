"""The small numbers of the ops, in one place because the reference and every kernel must share them."""

GROUP_EPS = 1e-5  # torch's and guided-diffusion's
MASKED_GROUP_EPS = 1e-4  # a small region's variance is an average over few pixels: a larger floor keeps 1/std tame
MASK_FLOOR = 1e-3  # added to the mask before it weights moments: an empty region falls back to the plain average
PIXEL_EPS = 1e-3
POOL_FLOOR = 0.5  # half a pixel: the token of an empty region tends to zero instead of to noise
