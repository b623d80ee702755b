"""Makes the operators of torchvision known when it is imported, where its kernels cannot be loaded.

A build for CUDA beside a torch for CPUs has none: its import fails where it registers what they
would do. Imported by a .pth file in every process of an environment that is for tests alone.
"""

import importlib.abc
import sys

KNOWN = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


KEPT = []  # what is registered lives as long as its library


class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            KEPT.append(torch.library.Library("torchvision", "DEF"))
            for schema in KNOWN:
                KEPT[0].define(schema)


sys.meta_path.insert(0, Watch())
