"""Cut one view out of an image: crop, bicubic resize with antialiasing, mirror; uint8 in, uint8 out."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate


def crop_view(image: np.ndarray, top: int, left: int, height: int, width: int, flip: bool, out: np.ndarray) -> None:
    """Render one view.

    It is Pillow's ``crop().resize(BICUBIC)`` to within two grey levels, except where the filter overshoots black or
    white: both clip between the passes, but not always in the same order of passes. torch's uint8 kernel is three times
    as fast at 224 px. The crop comes first, so that nothing outside it shows through the filter.

    Args:
        image: (H, W, 3) uint8.
        top: first row of the crop, px.
        left: first column of the crop, px.
        height: rows of the crop, px.
        width: columns of the crop, px.
        flip: mirror left and right.
        out: (px, px, 3) uint8, contiguous, written to.
    """
    crop = torch.from_numpy(image[top : top + height, left : left + width])
    # (1, 3, h, w), channels last. The order matters: only with the batch's axis put before the rows do the strides say
    # so to torch, which else returns planes; to bring those back into pixels takes as long as to make them.
    batch = crop.unsqueeze(0).permute(0, 3, 1, 2)
    view = interpolate(batch, size=out.shape[:2], mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    if flip:
        cv2.flip(view, 1, out)  # 30 times as fast as numpy's, which copies three bytes at a time
    else:
        out[:] = view
