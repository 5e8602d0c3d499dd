"""COCO's measures of detections over a whole data set, by faster-coco-eval."""

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from paramshare.tasks.task import TaskError

COUNTED = 100  # detections of an image, in COCO's measures
MOST_LINES = 4  # categories that have their own line in a chart
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def average_precision(
    detected: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
    categories: Sequence[str],
) -> dict[str, float]:
    """Average precision and recall as COCO defines them.

    Boxes are compared in pixels of the original images, whose areas decide what is small. As many
    boxes of an image count as `detected` has rows, but at least COCO's 100.

    Args:
      detected: `box` (N, D, 4), x0, y0, x1, y1 in pixels of the network's input, `score` (N, D) and
        `category` (N, D); a score of 0 marks a row without a box.
      labels: as `paramshare.tasks.Detection` has them, (N, M, ...).
      categories: names of the categories.

    Returns:
      `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`, `ar`, and `ap/CATEGORY` for each
      category. NaN where there is no object.

    Raises:
      TaskError: if faster-coco-eval is not installed.

    Example:
      >>> box, one = np.array([[[0.0, 0.0, 50.0, 50.0]]]), np.ones((1, 1))
      >>> detected = {"box": box, "score": 0.9 * one, "category": 0 * one}
      >>> labels = {
      ...     "box": box, "category": 0 * one, "present": one > 0, "crowd": one < 0,
      ...     "area": 2500 * one, "scale": np.ones((1, 2)),
      ... }
      >>> average_precision(detected, labels, ["cat"])["ap"]
      1.0
    """
    names = [*NAMES, "ar", *(f"ap/{name}" for name in categories)]
    scored = _scored(detected, labels, categories)
    if scored is None:
        return dict.fromkeys(names, float("nan"))
    precision_TxRxK = _precision(scored)
    values = [*scored.stats[:6], scored.stats[8]] + [
        float(np.mean(precision_TxRxK[:, :, k])) for k in range(len(categories))
    ]
    return named(names, values)


def precision_recall(
    detected: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
    categories: Sequence[str],
) -> dict[str, list[tuple[float, float]]]:
    """Precision at recalls of 0, 0.01, ..., 1, interpolated as COCO does.

    Args:
      detected: as for `average_precision`.
      labels: as for `average_precision`.
      categories: names of the categories.

    Returns:
      Points (recall, precision) of the mean over categories at the IoU thresholds 0.5 and 0.75 and,
      of up to four categories, of each at 0.5; empty where there is no object.
    """
    scored = _scored(detected, labels, categories)
    if scored is None:
        return {}
    precision_TxRxK = _precision(scored)
    recall_R, (half, three_quarters) = scored.params.recThrs, (0, 5)  # of 0.5, 0.55, ..., 0.95
    seen = [k for k in range(len(categories)) if precision_TxRxK[0, 0, k] >= 0]
    if not seen:  # crowds only
        return {}
    lines = {
        "all, IoU 0.5": precision_TxRxK[half][:, seen].mean(axis=1),
        "all, IoU 0.75": precision_TxRxK[three_quarters][:, seen].mean(axis=1),
    }
    if 1 < len(categories) <= MOST_LINES:
        lines |= {f"{categories[k]}, IoU 0.5": precision_TxRxK[half, :, k] for k in seen}
    return {
        name: [(round(float(x), 2), round(float(y), 4)) for x, y in zip(recall_R, y_R, strict=True)]
        for name, y_R in lines.items()
    }


def _precision(scored: Any) -> np.ndarray:
    """(thresholds, recalls, categories): for objects of all sizes and 100 detections; -1: none."""
    return scored.eval["precision"][:, :, :, 0, -1]


def _scored(
    detected: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
    categories: Sequence[str],
) -> Any:
    """The evaluator, after it has run; None if there is no object."""
    scale_Nx1x4 = np.tile(np.asarray(labels["scale"], np.float64), 2)[:, None]
    images = [{"id": i + 1} for i in range(len(scale_Nx1x4))]
    kinds = [{"id": k + 1, "name": name} for k, name in enumerate(categories)]
    truth_Rx4, image_R, rows = _rows(labels["box"] / scale_Nx1x4, labels["present"])
    truth = [
        {
            "id": number + 1,
            "image_id": int(image) + 1,
            "category_id": int(labels["category"][row]) + 1,
            "bbox": box.tolist(),
            "area": float(labels["area"][row]),
            "iscrowd": int(labels["crowd"][row]),
        }
        for number, (box, image, row) in enumerate(zip(truth_Rx4, image_R, rows, strict=True))
    ]
    found_Rx4, image_R, rows = _rows(detected["box"] / scale_Nx1x4, detected["score"] > 0)
    found = [
        {
            "image_id": int(image) + 1,
            "category_id": int(detected["category"][row]) + 1,
            "bbox": box.tolist(),
            "score": float(detected["score"][row]),
        }
        for box, image, row in zip(found_Rx4, image_R, rows, strict=True)
    ]
    if not truth:
        return None
    most = max(COUNTED, np.shape(detected["score"])[1])
    truth = {"images": images, "categories": kinds, "annotations": truth}
    return evaluated(truth, found, "bbox", most=most)


def evaluated(truth: Any, found: Any, kind: str, *, most: int = 0, **options: Any) -> Any:
    """A faster-coco-eval evaluator that has run.

    Args:
      truth: a data set in the format of COCO.
      found: the list of results.
      kind: "bbox" or "keypoints".
      most: results per image that count, those with the highest scores; 0 for COCO's number.
      **options: of the evaluator.

    Raises:
      TaskError: if faster-coco-eval is not installed.
    """
    try:
        library = importlib.import_module("faster_coco_eval")
    except ModuleNotFoundError as error:
        raise TaskError(
            'average precision needs faster-coco-eval; run `pip install "paramshare[train]"`'
        ) from error
    coco = library.COCO(truth)
    evaluator = library.COCOeval_faster(coco, coco.loadRes(found), kind, **options)
    if most:
        evaluator.params.maxDets = [1, 10, most]
    evaluator.run()
    return evaluator


def named(names: Sequence[str], values: Iterable[Any]) -> dict[str, float]:
    """The evaluator's values by name; NaN where it has -1, since there was no object."""
    pairs = zip(names, map(float, values), strict=True)
    return {name: float("nan") if value < 0 else value for name, value in pairs}


def _rows(
    box_NxMx4: np.ndarray, real_NxM: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """The real boxes (R, 4) as left, top, width, height; their images (R,); and their places."""
    real_NxM = np.asarray(real_NxM, bool)
    box_Rx4 = np.asarray(box_NxMx4, np.float64)[real_NxM]
    box_Rx4[:, 2:] -= box_Rx4[:, :2]
    image_R, row_R = np.nonzero(real_NxM)
    return box_Rx4, image_R, list(zip(image_R.tolist(), row_R.tolist(), strict=True))
