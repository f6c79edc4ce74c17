"""The fused units are ops that torch.export and torch.compile see through: no graph break, no decomposition."""

import torch

import shufflenet_ext as se

torch.manual_seed(0)
model = se.optimize_for_inference(se.models.shufflenet_v1(groups=3))
images = torch.randn(1, 3, 224, 224)

with torch.no_grad():
    expected = model(images)
    program = torch.export.export(model, (images,))
    exported = program.module()(images)
    compiled = torch.compile(model, fullgraph=True)(images)

units = [node for node in program.graph.nodes if "shufflenet_ext" in str(node.target)]
print(f"the exported graph holds {len(units)} fused units: {units[0].target}")
for name, result in (("exported", exported), ("compiled", compiled)):
    print(f"{name}: largest difference {(result - expected).abs().max():.1e}")
    torch.testing.assert_close(result, expected)
