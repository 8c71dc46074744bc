"""PreLoRA in a plain loop of torch. Run: python examples/plain_loop.py"""

import torch
from digits import EPOCHS, METHOD, digits, small_vit
from torch.nn import functional as F
from torch.utils.data import DataLoader

from prelora_ray import PreLoRA


def main() -> None:
    train, held_out = digits()
    loader = DataLoader(train, batch_size=50, shuffle=True)
    model = small_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    prelora = PreLoRA(model, optimizer, **METHOD)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        phase, total = prelora.phase, 0.0
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        scheduler.step()
        mean = total / len(loader)
        prelora.end_epoch(mean)
        print(f"epoch {epoch + 1}: phase {phase}, loss {mean:.3f}, top-1 {accuracy(model.eval(), held_out):.1%}")
        model.train()


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: torch.utils.data.TensorDataset) -> float:
    images, labels = data.tensors
    return (model(images).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
