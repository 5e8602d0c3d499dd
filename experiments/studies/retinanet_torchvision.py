"""RetinaNet with random weights against torchvision's with the same weights.

    pip install torch torchvision
    python experiments/studies/retinanet_torchvision.py

Neither is a dependency of this project. Compared are the heads' outputs, the anchors, the losses of
random boxes, and the detections after decoding and non-maximum suppression.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torchvision  # pyright: ignore[reportMissingImports]
from torchvision.models.detection.image_list import (  # pyright: ignore[reportMissingImports]
    ImageList,
)

from paramshare.models import RetinaNet
from paramshare.tasks import Detection
from paramshare.zoo.residual import resnet

CLASSES = 7


def variables_of(peer: Any) -> dict[str, Any]:
    """The peer's weights as variables of `RetinaNet(resnet(50))`."""
    state = {name: value.detach().numpy() for name, value in peer.state_dict().items()}

    def conv(name: str) -> dict[str, np.ndarray]:
        kernel = {"kernel": state[f"{name}.weight"].transpose(2, 3, 1, 0)}
        bias = state.get(f"{name}.bias")
        return kernel if bias is None else kernel | {"bias": bias}

    statistics: dict[str, Any] = {}

    def norm(place: dict[str, Any], name: str) -> dict[str, np.ndarray]:
        place |= {"mean": state[f"{name}.running_mean"], "var": state[f"{name}.running_var"]}
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    body = "backbone.body"
    network: dict[str, Any] = {"stem": conv(f"{body}.conv1")}
    network["bn"] = norm(statistics.setdefault("bn", {}), f"{body}.bn1")
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(1, blocks + 1):
            theirs = f"{body}.layer{stage}.{block - 1}"
            ours = network.setdefault(f"stage{stage}", {}).setdefault(f"block{block}", {})
            means = statistics.setdefault(f"stage{stage}", {}).setdefault(f"block{block}", {})
            for number in (1, 2, 3):
                ours[f"conv{number}"] = conv(f"{theirs}.conv{number}")
                place = means.setdefault(f"bn{number}", {})
                ours[f"bn{number}"] = norm(place, f"{theirs}.bn{number}")
            if block == 1:
                ours["shortcut"] = conv(f"{theirs}.downsample.0")
                place = means.setdefault("shortcut_bn", {})
                ours["shortcut_bn"] = norm(place, f"{theirs}.downsample.1")
    pyramid = {}
    for level in (1, 2, 3):
        pyramid[f"lateral{level}"] = conv(f"backbone.fpn.inner_blocks.{level - 1}.0")
        pyramid[f"output{level}"] = conv(f"backbone.fpn.layer_blocks.{level - 1}.0")
    pyramid["extra1"] = conv("backbone.fpn.extra_blocks.p6")
    pyramid["extra2"] = conv("backbone.fpn.extra_blocks.p7")

    def head(name: str, last: str) -> dict[str, Any]:
        convs = {f"conv{i + 1}": conv(f"head.{name}.conv.{i}.0") for i in range(4)}
        return convs | {"predict": conv(f"head.{name}.{last}")}

    return {
        "params": {
            "backbone": network,
            "pyramid": pyramid,
            "classes": head("classification_head", "cls_logits"),
            "boxes": head("regression_head", "bbox_reg"),
        },
        "batch_stats": {"backbone": statistics},
    }


def randomised(peer: Any, seed: int) -> Any:
    """The peer with weights and statistics whose signal neither vanishes nor explodes."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in peer.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if value.ndim == 4:
            value.normal_(0, (1 / value[0].numel()) ** 0.5, generator=generator)
        elif "running_var" in name or name.endswith(("bn1.weight", "bn2.weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        else:
            value.normal_(0, 0.1, generator=generator)
    # Few scores above the threshold: torchvision keeps 1,000 candidates a level, we 1,000 in all.
    torch.nn.init.constant_(peer.head.classification_head.cls_logits.bias, -3.2)
    peer.detections_per_img = 100
    return peer.eval()


def main() -> None:
    """Prints the largest differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    size = parser.parse_args().size
    peer: Any = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES
    )
    peer = randomised(peer, 0)
    model, variables = RetinaNet(resnet(50, num_classes=None), CLASSES), variables_of(peer)
    image = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
    outputs = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, image)
    with torch.no_grad():
        batch = torch.from_numpy(image).permute(0, 3, 1, 2)
        features = list(peer.backbone(batch).values())
        theirs = peer.head(features)
        anchors = peer.anchor_generator(ImageList(batch, [(size, size)] * 2), features)

    def compare(name: str, ours: Any, other: Any) -> None:
        ours, other = np.asarray(ours, np.float64), np.asarray(other, np.float64)
        print(
            f"{name:<28} {ours.shape!s:<16} largest |value| {np.abs(other).max():8.3f}   "
            f"largest difference {np.abs(ours - other).max():.2e}"
        )

    compare("class logits", outputs["logits"], theirs["cls_logits"])
    compare("box offsets", outputs["offsets"], theirs["bbox_regression"])
    compare("anchors", outputs["anchors"], torch.stack(anchors))

    rng, task = np.random.default_rng(2), Detection(tuple("abcdefg"), max_boxes=8)
    corner = rng.uniform(0, size * 0.6, (2, 8, 2))
    box = np.concatenate([corner, corner + rng.uniform(16, size * 0.4, (2, 8, 2))], -1)
    box, category = box.astype(np.float32), rng.integers(0, CLASSES, (2, 8)).astype(np.int32)
    labels = {
        "box": box,
        "category": category,
        "present": np.ones((2, 8), bool),
        "crowd": np.zeros((2, 8), bool),
        "area": np.ones((2, 8), np.float32),
        "scale": np.ones((2, 2), np.float32),
    }
    losses = jax.jit(lambda o, y: task.losses(o, y, train=True))(outputs, labels)
    targets = [
        {"boxes": torch.from_numpy(b), "labels": torch.from_numpy(c).long()}
        for b, c in zip(box, category, strict=True)
    ]
    peer_losses = peer.compute_loss(targets, theirs, anchors)
    compare("focal loss", jnp.mean(losses["focal"]), peer_losses["classification"].detach())

    detected = jax.jit(lambda o: task.detect(o, (size, size, 3)))(outputs)
    split = {name: [value] for name, value in theirs.items()}
    found = peer.postprocess_detections(split, [[a] for a in anchors], [(size, size)] * 2)
    for number, other in enumerate(found):
        count = len(other["scores"])
        compare(f"image {number}: scores", detected["score"][number, :count], other["scores"])
        compare(f"image {number}: boxes", detected["box"][number, :count], other["boxes"])
        compare(f"image {number}: classes", detected["category"][number, :count], other["labels"])


if __name__ == "__main__":
    main()
