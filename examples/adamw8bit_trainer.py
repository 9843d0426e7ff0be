"""transformers' Trainer with 8-bit AdamW: states a quarter as large, a resume that is exact to the bit."""

import pydoc_data.topics
import tempfile

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import tilewright as tw

LENGTH = 64
text = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))
rows = text[: 512 * LENGTH].view(-1, LENGTH)
data = [{"input_ids": row, "labels": row} for row in rows]


def make() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def trainer(folder: str) -> Trainer:
    arguments = TrainingArguments(
        folder,
        max_steps=30,
        per_device_train_batch_size=4,
        save_steps=15,
        logging_steps=10,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    eight_bit = (tw.optim.AdamW8bit, {"lr": 2e-3, "weight_decay": 0.1})
    return Trainer(make(), arguments, train_dataset=data, optimizer_cls_and_kwargs=eight_bit)


def bytes_of(states: dict[Tensor, dict[str, object]]) -> int:
    maps = {
        id(value): value for state in states.values() for value in state.values() if isinstance(value, Tensor)
    }
    return sum(value.nbytes for value in maps.values())


with tempfile.TemporaryDirectory() as folder:
    whole = trainer(folder)
    whole.train()
    resumed = trainer(folder)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-15")

losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
print("loss, every 10 steps:", losses)
assert losses[-1] < losses[0]

parameters = sum(p.numel() for p in whole.model.parameters())
optimizer = whole.optimizer.optimizer  # under accelerate's wrapper
print(f"states: {bytes_of(optimizer.state) / parameters:.2f} bytes a parameter; float32 states are 8")
assert bytes_of(optimizer.state) < 0.35 * 8 * parameters

for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
    assert torch.equal(ours, theirs)
print("steps 16 to 30, resumed from the checkpoint: the same bits as in one go")
