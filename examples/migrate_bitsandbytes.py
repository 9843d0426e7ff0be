"""A training that bitsandbytes began goes on with tilewright, from its checkpoint, and back again."""

import bitsandbytes as bnb
import torch

import tilewright as tw


def make() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.GELU(), torch.nn.Linear(256, 128))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(64, 128, generator=generator)
        loss = (model(x) - x.sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


model = make()
theirs = bnb.optim.AdamW8bit(model.parameters(), lr=3e-3, weight_decay=0.1)
print(f"bitsandbytes, 20 steps: loss {train(model, theirs, 20):.4f}")

ours = tw.optim.AdamW8bit(model.parameters(), lr=3e-3, weight_decay=0.1)
ours.load_state_dict(theirs.state_dict())
p = model[0].weight
assert torch.equal(ours.state[p]["state1"].view(-1), theirs.state[p]["state1"].view(-1))  # the same codes
loss = train(model, ours, 20)
print(f"tilewright, 20 more:    loss {loss:.4f}")

theirs.load_state_dict(ours.state_dict())
last = train(model, theirs, 20)
print(f"bitsandbytes, 20 more:  loss {last:.4f}")
assert last < loss
