"""Plots of a search: the channels that each check kept, and the distances between the masks.

Every function returns a new figure and avoids pyplot, so there is no global state.
"""

from .curve import distance_curve
from .masks import mask_picture
from .matrix import distance_matrix

__all__ = ["distance_curve", "distance_matrix", "mask_picture"]
