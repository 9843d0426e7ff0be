"""Lightning: 8-bit AdamW from configure_optimizers, a swapped Mamba in a module, a checkpoint that loads."""

import pydoc_data.topics
import tempfile
import warnings

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import MambaConfig, MambaForCausalLM

import tilewright as tw

LENGTH = 96
text = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))
rows = text[: 320 * LENGTH].view(-1, LENGTH)
warnings.filterwarnings("ignore", message=".*does not have many workers.*")


class LanguageModel(lightning.LightningModule):
    """A byte-level Mamba."""

    def __init__(self) -> None:
        super().__init__()
        config = MambaConfig(
            vocab_size=256,
            hidden_size=96,
            num_hidden_layers=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        self.model = MambaForCausalLM(config)
        tw.swap(self.model)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.model(batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> tw.optim.AdamW8bit:
        # Clipping as part of the step: Trainer(gradient_clip_val=...) works too, by a pass of its own.
        return tw.optim.AdamW8bit(self.parameters(), lr=2e-3, max_grad_norm=1.0)


lightning.seed_everything(0)
module = LanguageModel()
module.train()
with tempfile.TemporaryDirectory() as folder:
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "default_root_dir": folder,
    }
    trainer = lightning.Trainer(
        max_epochs=1, enable_checkpointing=False, enable_model_summary=False, **options
    )
    trainer.fit(module, DataLoader(rows, batch_size=8))
    trainer.save_checkpoint(f"{folder}/last.ckpt")
    again = LanguageModel.load_from_checkpoint(f"{folder}/last.ckpt", map_location="cpu")

print(f"{len(module.losses)} steps: loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}")
assert module.losses[-1] < module.losses[0] - 0.5
for ours, loaded in zip(module.parameters(), again.parameters(), strict=True):
    assert torch.equal(ours, loaded)
print("the checkpoint loads, and has the keys of a model that was never swapped")
assert not any("tilewright" in key for key in module.state_dict())
