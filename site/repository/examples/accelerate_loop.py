"""accelerate: accumulation, clipping, a schedule and a saved state, with 8-bit Lion and a swapped Mamba."""

import pydoc_data.topics
import tempfile

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import MambaConfig, MambaForCausalLM

import tilewright as tw

LENGTH = 96
text = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))
rows = text[: 320 * LENGTH].view(-1, LENGTH)

torch.manual_seed(0)
config = MambaConfig(
    vocab_size=256, hidden_size=96, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
model = MambaForCausalLM(config)
tw.swap(model)  # before prepare, which wraps the model

optimizer = tw.optim.Lion8bit(model.parameters(), lr=3e-4, weight_decay=0.1)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
model, optimizer, loader, schedule = accelerator.prepare(
    model, optimizer, DataLoader(rows, batch_size=8), schedule
)

losses = []
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(batch, labels=batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    losses.append(loss.item())
print(f"{len(losses)} batches, {len(losses) // 2} steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0] - 0.5

with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    codes = [state["state1"].clone() for state in optimizer.optimizer.state.values() if "absmax1" in state]
    weights = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(folder)
for p, saved in zip(model.parameters(), weights, strict=True):
    assert torch.equal(p, saved)
restored = [state["state1"] for state in optimizer.optimizer.state.values() if "absmax1" in state]
assert len(codes) == len(restored) > 0
assert all(map(torch.equal, codes, restored))
print(f"saved and loaded: weights, schedule and the codes of {len(codes)} tensors")
