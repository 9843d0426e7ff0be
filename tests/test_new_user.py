"""A new user's hour: two models swapped, trained, pruned, saved, loaded in another process, and compressed.

Each step is what the README says, in processes of their own, as a user runs them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tilewright

pytest.importorskip("transformers")

TRAIN = """
import sys, torch
from transformers import {name}Config, {name}ForCausalLM
import tilewright as tw
from tilewright.attention import BlockMask, BlockSparse

torch.manual_seed(0)
config = {name}Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, pad_token_id=0, **{options!r})
model = {name}ForCausalLM(config)
report = tw.swap(model, {swap})
assert len(report.swapped) == 2, report
optimizer = tw.optim.AdamW8bit(model.parameters(), lr=1e-2)
line = torch.arange(200) * 7 % 61 + 1  # a text that can be learnt in 50 steps
losses = []
for step in range(50):
    starts = torch.randint(0, 100, (4,))
    ids = torch.stack([line[start : start + 48] for start in starts])
    loss = model(ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
assert losses[-1] < 0.5 * losses[0], losses
pruned = tw.prune.prune(model, tw.prune.Block(8, 8), 0.5)
assert 0.4 < pruned.density < 0.6, pruned
model.eval()
with torch.no_grad():
    torch.save((line[None, :100], model(line[None, :100]).logits), "expected.pt")
model.save_pretrained("model")  # before compress: plain weights, with zeros
torch.save(optimizer.state_dict(), "optimizer.pt")
print(tw.prune.compress(model, line[None, :100]))
"""

LOAD = """
import torch
from transformers import {name}ForCausalLM
import tilewright as tw
from tilewright.attention import BlockMask, BlockSparse

model = {name}ForCausalLM.from_pretrained("model").eval()
ids, expected = torch.load("expected.pt")
print(tw.swap(model, {swap}))
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, expected)
model.train()
optimizer = tw.optim.AdamW8bit(model.parameters(), lr=1e-3)
optimizer.load_state_dict(torch.load("optimizer.pt"))
before = float(model(ids, labels=ids).loss)
for _ in range(3):  # training goes on
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
assert float(model(ids, labels=ids).loss) < before
tw.prune.compress(model.eval(), ids)  # and what was saved as plain weights can be made fast again
print(model.generate(ids[:, :8], max_new_tokens=4, do_sample=False).shape)
"""

PACKAGE = str(Path(tilewright.__file__).parents[1])
WINDOW = "attention=BlockSparse(BlockMask.sliding_window, window=24, sink=4, block_size=16)"
LLAMA = {"intermediate_size": 64, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


def run(folder: Path, *command: str) -> str:
    """What a command prints that a user gives in `folder`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PACKAGE}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "swap", "options"),
    [("Mamba", "", {"state_size": 8}), ("Llama", WINDOW, LLAMA)],
    ids=["mamba", "llama"],
)
def test_swap_train_prune_save_load(name: str, swap: str, options: dict[str, int], tmp_path: Path) -> None:
    words = {"name": name, "swap": swap, "options": options}
    printed = run(tmp_path, sys.executable, "-c", TRAIN.format(**words))
    assert "linear layers with zeros became sparse" in printed
    printed = run(tmp_path, sys.executable, "-c", LOAD.format(**words))
    assert "2 layers swapped" in printed


@pytest.mark.slow
def test_info_and_a_benchmark(tmp_path: Path) -> None:
    assert "extension       ok" in run(tmp_path, sys.executable, "-m", "tilewright", "info")
    bench = ["bench", "optim", "--quick", "--device", "cpu", "--cases", "quantize-fp32", "--peers", "torch"]
    printed = run(tmp_path, sys.executable, "-m", "tilewright", *bench, "--out", "results")
    assert "tilewright" in printed
    assert list((tmp_path / "results").rglob("*.json"))
