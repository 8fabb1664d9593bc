"""Train a small classifier of digits with Mixup, CutMix or neither, as a timm training loop does.

python examples/digits_mixup.py
python examples/digits_mixup.py --prob 0    # neither
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import mixfeat as mf


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpha", type=float, default=0.2, help="parameter of Mixup's Beta(alpha, alpha)")
    parser.add_argument("--cutmix-alpha", type=float, default=1.0, help="parameter of CutMix's Beta(alpha, alpha)")
    parser.add_argument("--prob", type=float, default=1.0, help="probability that a batch is mixed")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8)
    train, test = random_split(TensorDataset(images, torch.tensor(digits.target)), [1297, 500])
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)

    mix = mf.Mixup(args.alpha, cutmix_alpha=args.cutmix_alpha, prob=args.prob)
    loss_of = mf.MixupCrossEntropyLoss(label_smoothing=0.1)
    model = network().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    for epoch in range(args.epochs):
        for batch, labels in loader:
            mixed, target = mix(batch.to(device), labels.to(device))  # target: both labels and lam
            loss = loss_of(model(mixed), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    x, y = (part.to(device) for part in next(iter(DataLoader(test, batch_size=len(test)))))
    with torch.no_grad():
        print(f"test accuracy {(model.eval()(x).argmax(1) == y).double().mean().item():.3f}")


if __name__ == "__main__":
    main()
