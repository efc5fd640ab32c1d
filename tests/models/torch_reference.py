"""Make PyTorch files and their models' probabilities. Runs in the environment of scripts/services, which has torch.

usage: torch_reference.py FOLDER, which holds images.npy, uint8 [N,224,224]. Writes files of weights, and for each model
NAME.npy, its probabilities, float32 [N,outputs].
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torchvision
import torchxrayvision

folder = Path(sys.argv[1])
images = torch.from_numpy(np.load(folder / "images.npy").astype(np.float32))[:, None]
rgb = torchvision.transforms.functional.normalize(
    images.repeat(1, 3, 1, 1) / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
)
xrv = (2 * (images / 255) - 1) * 1024


def randomize(model):
    """Give BatchNorm and biases values that no other rule would produce by chance."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for name, low, high in (("weight", 0.7, 1.3), ("bias", -0.2, 0.2)):
                torch.nn.init.uniform_(getattr(module, name), low, high)
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.7, 1.5)
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.uniform_(module.bias, -1, 1)
    return model.eval()


def save_probabilities(model, name, inputs):
    with torch.no_grad():
        np.save(folder / f"{name}.npy", torch.sigmoid(model(inputs)).numpy())


torch.manual_seed(0)
for name in ("densenet121", "densenet169", "resnet50"):
    model = randomize(getattr(torchvision.models, name)(num_classes=14))
    save_probabilities(model, name, rgb)
    torch.save({"epoch": 1, "model": model.state_dict(), "args": argparse.Namespace(lr=1)}, folder / f"{name}.pth")
    if name == "densenet121":
        safetensors.torch.save_file(
            {key: value.bfloat16() if "conv" in key else value for key, value in model.state_dict().items()},
            folder / "densenet121.safetensors",
        )
        # As arnoweng/CheXNet saves it: the old file format, the old spelling, wrappers, a sigmoid after the output.
        old = collections.OrderedDict()
        for key, value in model.state_dict().items():
            for part in ("norm1", "norm2", "conv1", "conv2"):
                key = key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.")
            old["module.densenet121." + key.replace("classifier.", "classifier.0.")] = value
        checkpoint = {"epoch": 1, "state_dict": old, "optimizer": {"param_groups": [{"lr": 1e-3}], "state": {}}}
        torch.save(checkpoint, folder / "chexnet.pth.tar", _use_new_zipfile_serialization=False)
        torch.save(model, folder / "whole.pt")
        torch.jit.script(model).save(str(folder / "script.pt"))
torch.save(torchvision.models.vit_b_16(num_classes=14).state_dict(), folder / "transformer.pth")

# Without weights, which are downloads, but with outputs and thresholds as its published models have them.
model = randomize(torchxrayvision.models.DenseNet())
with torch.no_grad():
    model.classifier.weight *= 0.01  # inputs up to 1024 would otherwise give logits in the hundreds
save_probabilities(model, "torchxrayvision", xrv)
about = {
    "source": "torchxrayvision",
    "outputs": torchxrayvision.models.model_urls["densenet121-res224-pc"]["labels"],
    "op_threshs": torchxrayvision.models.model_urls["densenet121-res224-pc"]["op_threshs"],
    "size": 224,
}
safetensors.torch.save_model(
    model, str(folder / "torchxrayvision.safetensors"), {key: json.dumps(value) for key, value in about.items()}
)
torch.save(model, folder / "torchxrayvision.pt")
