"""The cases of each op, shared by tests and benchmarks."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GaussianKLCase:
    """Sizes and options of one call of gaussian_kl."""

    name: str
    shape: tuple[int, ...]
    kl_balance: float | None = None
    # a quantile of the KL: this share of the rows lies below the free nats
    free_share: float = 0.0
    std_range: tuple[float, float] = (0.1, 2.0)

    def inputs(self, dtype=torch.float32, device="cpu"):
        """Draw post_mean, post_std, prior_mean, prior_std; they require gradients."""
        generator = torch.Generator().manual_seed(0)
        low, high = self.std_range

        def mean():
            return torch.randn(self.shape, generator=generator)

        def std():
            u = torch.rand(self.shape, generator=generator)
            return low * (high / low) ** u

        drawn = (mean(), std(), mean(), std())
        return tuple(x.to(device, dtype).requires_grad_() for x in drawn)

    def options(self, inputs):
        """Balance and free nats; the latter half-way between two rows, so no rounding decides."""
        if self.free_share == 0.0:
            return {"kl_balance": self.kl_balance}
        q, p = (
            torch.distributions.Normal(*(x.detach().double() for x in pair))
            for pair in (inputs[:2], inputs[2:])
        )
        kl = torch.distributions.kl_divergence(q, p).sum(-1).flatten().sort().values
        k = int(self.free_share * (kl.numel() - 1))
        return {"kl_balance": self.kl_balance, "free_nats": (kl[k : k + 2].mean()).item()}


GAUSSIAN_KL = (
    GaussianKLCase("one element", (1, 1)),
    GaussianKLCase("one row", (1, 30), kl_balance=0.8),
    GaussianKLCase("no batch dimension", (17,)),
    GaussianKLCase("sequence", (5, 7, 30), kl_balance=0.8, free_share=0.5),
    GaussianKLCase("only the posterior learns", (6, 33), kl_balance=0.0),
    GaussianKLCase("only the prior learns", (6, 33), kl_balance=1.0),
    GaussianKLCase("no power of two", (63, 127), free_share=0.3),
    GaussianKLCase("many rows to a block", (1023, 3), kl_balance=0.5),
    GaussianKLCase("longer than a block", (3, 2500), kl_balance=0.8, free_share=0.5),
    GaussianKLCase("tiny and huge std", (9, 64), std_range=(1e-6, 1e3)),
)
GAUSSIAN_KL_BENCH = (
    GaussianKLCase("[2500, 30]", (2500, 30)),
    GaussianKLCase("[2500, 128]", (2500, 128)),
    GaussianKLCase("[20000, 128]", (20000, 128)),
)
