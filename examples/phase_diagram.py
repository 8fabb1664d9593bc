"""Map where both features of a class are learned, over learning rate and scale of the initial weights.

One call of mf.gradient_descent trains all networks: python examples/phase_diagram.py --out phase.png
"""

import argparse

import torch
from torch import Tensor

import mixfeat as mf


def phase_diagram(lam: float | None, scales: Tensor, rates: Tensor, *, classes: int, steps: int) -> Tensor:
    """Return the share of classes with both features, (scales, rates); lam=None is ERM, 1/2 Midpoint Mixup."""
    torch.manual_seed(0)
    rho = 1 / classes
    data = mf.data.multi_view(num_samples=5 * classes, num_classes=classes, num_patches=8)
    tests = [mf.data.multi_view(50 * classes, classes, 8, views=view, features=data.features) for view in (0, 1)]

    # Every run starts from the same draw: rows differ by its scale, columns by the step size.
    weight = rho * torch.randn(classes, 5, 2 * classes)
    weight = (scales[:, None, None, None] * weight).repeat_interleave(len(rates), 0)  # (R,C,M,D)
    lr = rates.repeat(len(scales))  # (R,)
    phi = mf.PolyReLU(8, rho)
    weight, _ = mf.gradient_descent(data.input, weight, data.target, phi, lam=lam, lr=lr, steps=steps)
    learned = mf.features.learned(lambda x: mf.patch_conv(x, weight, phi), tests)  # (R,C,2)
    return learned.all(-1).double().mean(-1).view(len(scales), len(rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--points", type=int, default=6, help="points on each axis")
    parser.add_argument("--out", help="also draw the diagrams into this file")
    args = parser.parse_args()

    scales, rates = torch.linspace(0.3, 0.8, args.points), 512 * 0.5 ** torch.arange(args.points).flip(0)
    maps = {}
    for method, lam in {"ERM": None, "Midpoint Mixup": 0.5}.items():
        maps[method] = share = phase_diagram(lam, scales, rates, classes=args.classes, steps=args.steps)
        print(f"{method}: % of classes with both features; init scale grows downwards, learning rate to the right")
        print((100 * share).round().int().numpy())
    if args.out:
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(1, len(maps), layout="constrained", figsize=(8, 3.5))
        for ax, (method, share) in zip(axes, maps.items(), strict=True):
            image = ax.imshow(share.numpy(), vmin=0, vmax=1, origin="lower")
            ax.set(title=method, xlabel="learning rate", ylabel="init / rho")
            ax.set_xticks(range(args.points), [f"{rate:g}" for rate in rates.tolist()])
            ax.set_yticks(range(args.points), [f"{scale:.2f}" for scale in scales.tolist()])
        figure.colorbar(image, ax=axes, label="share of classes")
        figure.savefig(args.out)


if __name__ == "__main__":
    main()
