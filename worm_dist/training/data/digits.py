"""The 8x8 digits that ship with scikit-learn: no download, an epoch takes less than a second.

The split is fixed, so that runs with different seeds are tested on the same samples.  There is no
augmentation; ``data.augment`` has no effect.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import TensorDataset

from ...extras import require_extras
from ..run_config import DataConfig
from .dataset import Data

__all__: list[str] = []

SPLIT_SEED = 0
TEST_SHARE = 0.2
MAX_PIXEL = 16


def load(config: DataConfig) -> Data:
    """Load the digits: 1437 training and 360 test images, a stratified split.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    require_extras({"digits": "data.name: 'digits'"})
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / MAX_PIXEL).unsqueeze(1)
    classes = torch.from_numpy(digits.target.astype(np.int64))
    train, test = train_test_split(
        np.arange(len(classes)), test_size=TEST_SHARE, random_state=SPLIT_SEED, stratify=classes
    )
    if config.mean is None or config.std is None:
        images = (images - images[train].mean()) / images[train].std()
    else:
        images = (images - config.mean) / config.std
    return Data(
        train=TensorDataset(images[train], classes[train]),
        test=TensorDataset(images[test], classes[test]),
        num_classes=10,
        sample_shape=(1, 8, 8),
        description=(
            f"scikit-learn digits: {len(train)} train / {len(test)} test, "
            f"fixed stratified split (seed {SPLIT_SEED})"
        ),
    )
