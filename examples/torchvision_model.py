"""torchvision's ShuffleNet v2: one line makes its convolutions, norms, splits and shuffles one native op.

Takes torchvision, and the path of a state_dict of its shufflenet_v2_x1_0; without one, weights are random.
"""

import sys

import torch
from torchvision.models import shufflenet_v2_x1_0

import shufflenet_ext as se

model = shufflenet_v2_x1_0().eval()
if len(sys.argv) > 1:
    model.load_state_dict(torch.load(sys.argv[1]))
images = torch.randn(1, 3, 224, 224)
fast = se.optimize_for_inference(model, example_inputs=(images,))

with torch.no_grad():
    expected = model(images)
    difference = (fast(images) - expected).abs().max() / expected.abs().max()
    print(f"largest difference to PyTorch: {difference:.1e} of the largest output")
    print(fast.explain(images))
