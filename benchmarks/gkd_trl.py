"""GKD's loss beside TRL's function on the same logits: values and gradients. Run by hand: nox -s trl."""

from __future__ import annotations

import torch

try:
    from trl.experimental.gkd import GKDTrainer
except ImportError:  # older versions
    from trl import GKDTrainer

from tinygpt2.objectives.divergences import jsd

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def main() -> None:
    """Compare both for several weights of the teacher, and print the largest differences."""
    torch.manual_seed(0)
    teacher, logits = 3 * torch.randn(2, 9, 101, dtype=torch.float64), 3 * torch.randn(2, 9, 101, dtype=torch.float64)
    for beta in BETAS:
        student = logits.clone().requires_grad_()
        theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="sum")
        (gradient,) = torch.autograd.grad(theirs, student)
        value, ours = jsd(logits.flatten(0, 1), teacher.flatten(0, 1), beta)
        torch.testing.assert_close(value, theirs.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.view_as(gradient), gradient, rtol=1e-7, atol=1e-9)
        print(f"beta {beta}: loss {float(value):.6f}, largest difference of the gradients "
              f"{float((ours.view_as(gradient) - gradient).abs().max()):.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
