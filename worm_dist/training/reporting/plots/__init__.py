"""Pictures of a search: which channels each check kept, and how far the masks are apart.

Every function makes a figure of its own, without pyplot and so without any global state.
"""

from .curve import distance_curve
from .masks import mask_picture
from .matrix import distance_matrix

__all__ = ["distance_curve", "distance_matrix", "mask_picture"]
