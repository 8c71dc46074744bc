"""PreLoRA in an Accelerate loop that is stopped and goes on. Run: python examples/with_accelerate.py"""

import tempfile

import torch
from accelerate import Accelerator
from digits import EPOCHS, METHOD, digits, small_vit
from torch.nn import functional as F
from torch.utils.data import DataLoader

from prelora_ray.integrations.carried import CarriedPreLoRA


def train(folder: str, until: int, goes_on: bool) -> None:
    """Trains up to the end of epoch `until`, and saves."""
    accelerator = Accelerator()
    model = small_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    prelora = CarriedPreLoRA(model, optimizer, **METHOD)  # its state is in the model's: save_state saves it
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    loader = DataLoader(digits()[0], batch_size=50, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    if goes_on:
        accelerator.load_state(folder)
        print(f"goes on in phase {prelora.phase}")
    for epoch in range(prelora.epoch, until):
        phase, total = prelora.phase, 0.0
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        scheduler.step()
        prelora.end_epoch(total / len(loader))
        print(f"epoch {epoch + 1}: phase {phase}, loss {total / len(loader):.3f}")
    accelerator.save_state(folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        train(folder, until=5, goes_on=False)
        train(folder, until=EPOCHS, goes_on=True)


if __name__ == "__main__":
    main()
