"""Train the paper's network by ERM and by Midpoint Mixup, and count the features that each has learned.

python examples/midpoint_theorem.py --steps 6000 --runs 4

Every class has two features, and either is enough to classify the training points. ERM stops when it has one;
Midpoint Mixup goes on to learn both (Chidambaram et al., ICML 2023).
"""

import argparse

import torch
import torch.nn.functional as F

import mixfeat as mf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--degree", type=int, default=8, help="degree of the activation's polynomial")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--runs", type=int, default=2, help="independent networks, trained side by side")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    k, rho = args.classes, 1 / args.classes
    torch.manual_seed(args.seed)
    data = mf.data.multi_view(num_samples=5 * k, num_classes=k, num_patches=8)
    tests = [mf.data.multi_view(100 * k, k, 8, views=view, features=data.features) for view in (0, 1)]

    def erm(model: mf.TwoLayerPatchCNN) -> torch.Tensor:
        logits = model(data.input)  # (R,N,C)
        return F.cross_entropy(logits.flatten(0, 1), data.target.repeat(args.runs)) * args.runs

    midpoint = mf.PairwiseMixupLoss(lam=0.5)  # over all N^2 pairs of samples, exactly

    def midpoint_mixup(model: mf.TwoLayerPatchCNN) -> torch.Tensor:
        return midpoint(model, data.input, data.target).sum()  # the sum: no run influences another

    for name, objective in (("ERM", erm), ("Midpoint Mixup", midpoint_mixup)):
        torch.manual_seed(args.seed + 1)  # the same initial weights for both
        phi = mf.PolyReLU(args.degree, rho)
        model = mf.TwoLayerPatchCNN(k, 5, 2 * k, phi, num_runs=args.runs, init_std=0.5 * rho)
        optimizer = torch.optim.SGD(model.parameters(), lr=256.0)
        for _ in range(args.steps):
            optimizer.zero_grad()
            objective(model).backward()
            optimizer.step()
        learned = mf.features.learned(model, tests).sum(-1)  # (R,C): 0, 1 or 2
        counts = [(learned == n).sum(-1).double().mean().item() for n in (2, 1)]
        print(f"{name}: both features of {counts[0]:.1f} of {k} classes, one of {counts[1]:.1f}")


if __name__ == "__main__":
    main()
