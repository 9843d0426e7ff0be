"""A Llama of transformers trains on long rows of text, dense and with a sliding window swapped in."""

import pydoc_data.topics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw
from tilewright.attention import BlockMask, BlockSparse

LENGTH, STEPS = 1024, 10
text = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))


def make() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM) -> tuple[list[float], float]:
    """Losses, and seconds a step after the first."""
    optimizer = tw.optim.AdamW8bit(model.parameters(), lr=3e-3, max_grad_norm=1.0)
    losses, begin = [], 0.0
    for step in range(STEPS):
        begin = begin if step > 1 else time.perf_counter()
        row = text[step * LENGTH : (step + 1) * LENGTH][None]
        loss = model(row, labels=row).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, (time.perf_counter() - begin) / (STEPS - 1)


# Every query sees the 256 keys before it and the first 32, instead of all before it.
window = BlockSparse(BlockMask.sliding_window, window=256, sink=32, block_size=64)
dense, windowed = make(), make()
probe = {"input_ids": text[None, :LENGTH]}
report = tw.swap(windowed, attention=window, verify=probe)  # held against SDPA under the same mask
print(report)
print(f"density: {BlockMask.sliding_window(LENGTH, 256, sink=32, block_size=64).density:.3f} of all blocks")

for name, model in (("dense", dense), ("window", windowed)):
    losses, seconds = train(model)
    print(f"{name:8s} loss {losses[0]:.3f} -> {losses[-1]:.3f}, {1e3 * seconds:.0f} ms a step")
    assert losses[-1] < losses[0] - 1

# Decoding works as before, caches included; with the kernels out again the model sees everything.
prompt = text[None, :300]
print(bytes(windowed.generate(prompt, max_new_tokens=12, do_sample=False)[0, 300:].tolist()))
assert tw.unswap(windowed) == len(report.swapped) == 2
