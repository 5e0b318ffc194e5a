"""What a Trainer judges a segmentation by; Dice and IoU are MONAI's."""

import numpy as np
import torch


def predicted_masks(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What `compute_metrics` gets in place of logits: `[B, 1, ...]`, uint8, 1 where a logit is above 0."""
    return (logits > 0).to(torch.uint8)


def overlap(prediction) -> dict[str, float]:
    """`dice` and `iou` of a Trainer's prediction, means over cases; an empty mask that is found empty counts 1."""
    labels = prediction.label_ids
    true, cases = labels if isinstance(labels, tuple) else (labels, None)
    return mean_overlap(prediction.predictions, true, cases)


def mean_overlap(predicted: np.ndarray, true: np.ndarray, cases: np.ndarray | None = None) -> dict[str, float]:
    """
    Means over cases.

    Args:
        predicted (`np.ndarray`): `[cases, 1, ...]`, 0 or 1.
        true (`np.ndarray`): Of the same shape.
        cases (`np.ndarray`, *optional*): `[rows]`, where rows are slices: number of the volume of each. Slices of one
            number are a case.
    """
    from monai.metrics import compute_dice, compute_iou

    rows = range(len(true)) if cases is None else cases
    found = []
    for case in np.unique(rows):
        masks = [
            torch.as_tensor(np.ascontiguousarray(some[np.equal(rows, case)])).float().flatten()[None, None]
            for some in (predicted, true)
        ]
        found.append([float(metric(*masks, ignore_empty=False)) for metric in (compute_dice, compute_iou)])
    return dict(zip(("dice", "iou"), np.mean(found, axis=0).tolist(), strict=True))
