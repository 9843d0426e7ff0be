"""A ViT for handwritten digits: heads and widths leave; or blocks of weights, for sparse layers."""

import copy

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

import tilewright as tw

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, held_out = order[:1400], order[1400:]

torch.manual_seed(0)
config = ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    num_labels=10,
)
model = ViTForImageClassification(config)


def fit(model: torch.nn.Module, epochs: int) -> None:
    model.train()
    optimizer = tw.optim.AdamW8bit(model.parameters(), lr=2e-3, weight_decay=0.05, max_grad_norm=1.0)
    for epoch in range(epochs):
        for batch in train[torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))].split(
            70
        ):
            loss = cross_entropy(model(images[batch]).logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def accuracy(model: torch.nn.Module) -> float:
    with torch.no_grad():
        return (model(images[held_out]).logits.argmax(1) == labels[held_out]).double().mean().item()


def size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


fit(model, 10)
before, parameters = accuracy(model), size(model)
print(f"dense:            {before:.3f} of {len(held_out)} digits, {parameters} parameters")

# Really smaller: half of the heads and of the MLPs' neurons leave; what is left is an ordinary ViT.
small = copy.deepcopy(model)
print(tw.prune.shrink(small, images[:2], 0.5))
fit(small, 4)
print(f"shrunk, trained:  {accuracy(small):.3f}, {size(small)} parameters")
assert size(small) < 0.6 * parameters
assert accuracy(small) > before - 0.05

# Or zeros: half of the blocks of 16 x 16 weights; plain layers whose zeros stay zero in training.
print(tw.prune.prune(model, tw.prune.Block(16, 16), 0.5))
fit(model, 4)
kept = [tw.prune.mask_of(layer) for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
assert any(mask is not None for mask in kept)
logits = model(images[held_out]).logits
print(f"pruned, trained:  {accuracy(model):.3f}")
assert accuracy(model) > before - 0.05

# Layers that skip the zeros, where the clock says so on this machine.
print(tw.prune.compress(model, images[:64], seconds=0.02))
torch.testing.assert_close(model(images[held_out]).logits, logits, rtol=1e-3, atol=1e-3)
