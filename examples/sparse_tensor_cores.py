"""Prune to 2:4 for sparse tensor cores. Run: python examples/sparse_tensor_cores.py

Without a GPU that has them, the program trains and prunes, and says what is missing.
"""

import torch
from torch import nn
from torch.nn import functional

from pdp_kernels import PDPConfig, PDPPruner, check_nm, to_semi_structured

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
inputs = torch.randn(1024, 128, device=device)
labels = (inputs @ torch.randn(128, 64, device=device)).argmax(1)

model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

# At most 2 of every 4 consecutive inputs of a Linear layer stay. The pattern sets the sparsity.
epochs = 10
pruner = PDPPruner(model, PDPConfig.for_epochs(None, epochs=epochs, pattern="2:4"))
for epoch in range(epochs):
    batches = torch.randperm(len(inputs), device=device).split(128)
    for number, batch in enumerate(batches, 1):
        loss = functional.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step(epoch + number / len(batches))
pruner.finalize()
assert all(check.ok for check in check_nm(model))

# Sparse tensor cores take bfloat16 or float16.
model = model.eval().requires_grad_(False).bfloat16()
expected = model(inputs.bfloat16())

# strict=False leaves alone what cannot be converted, and reports the reason.
report = to_semi_structured(model, strict=False)
for name in report.converted:
    print(f"{name}: on sparse tensor cores")
for name, reason in report.skipped.items():
    print(f"{name}: dense, {reason}")

outputs = model(inputs.bfloat16())
difference = (outputs - expected).abs().max() / expected.abs().max()
accuracy = (outputs.argmax(1) == labels).float().mean()
print(f"accuracy {accuracy:.1%}; outputs differ from the dense ones by {difference:.1%} at most")
