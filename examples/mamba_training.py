"""A Mamba of transformers, swapped: trains on text, and goes on with it, as it did before and faster."""

import copy
import pydoc_data.topics
import time

import torch
from transformers import MambaConfig, MambaForCausalLM

import tilewright as tw

LENGTH = 64
text = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))
rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)

torch.manual_seed(0)
config = MambaConfig(
    vocab_size=256,
    hidden_size=96,
    num_hidden_layers=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
stock = MambaForCausalLM(config)
swapped = copy.deepcopy(stock)
print(tw.swap(swapped, verify=rows[:2]))


def train(model: MambaForCausalLM, steps: int) -> tuple[list[float], float]:
    """Losses, and seconds a step."""
    optimizer = tw.optim.AdamW8bit(model.parameters(), lr=2e-3, weight_decay=0.1, max_grad_norm=1.0)
    losses, begin = [], time.perf_counter()
    for step in range(steps):
        batch = rows[step * 4 : step * 4 + 4]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, (time.perf_counter() - begin) / steps


# A few steps of both from the same weights on the same batches, then on with the swapped one alone.
twin = copy.deepcopy(swapped)
(before, slow), (after, fast) = train(stock, 2), train(twin, 2)
print(f"stock   {1e3 * slow:.0f} ms a step, losses {[round(loss, 5) for loss in before]}")
print(f"swapped {1e3 * fast:.0f} ms a step, losses {[round(loss, 5) for loss in after]}")
torch.testing.assert_close(torch.tensor(after), torch.tensor(before), rtol=1e-4, atol=1e-4)

losses, seconds = train(swapped, 100)
print(f"100 steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {1e3 * seconds:.0f} ms a step")
assert losses[-1] < losses[0] - 2

prompt = rows[-1:, :40]
out = swapped.generate(prompt, max_new_tokens=40, do_sample=False)[0].tolist()
print(bytes(out[:40]).decode(), "|", bytes(out[40:]).decode(errors="replace"))
