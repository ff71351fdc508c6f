import torch
from torch import nn

from tools.common.optimizers import muon


def test_muon_steps_convolutions_as_matrices_and_vectors_by_adamw() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    matrix, bias = nn.Parameter(conv.weight.detach().flatten(1).clone()), nn.Parameter(conv.bias.detach().clone())
    ours = muon(conv.parameters(), lr=0.1)
    theirs = torch.optim.Muon([matrix], lr=0.1, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    vectors = torch.optim.AdamW([bias], lr=0.1, weight_decay=0)
    for _ in range(3):
        for p, q in ((conv.weight, matrix), (conv.bias, bias)):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.flatten(1) if p.dim() > 1 else p.grad.clone()
        for optimizer in (ours, theirs, vectors):
            optimizer.step()
    torch.testing.assert_close(conv.weight.flatten(1), matrix)
    torch.testing.assert_close(conv.bias, bias)
    before = conv.weight.detach().clone()
    x = torch.randn(1, 3, 4, 4)

    def closure() -> torch.Tensor:
        ours.zero_grad()
        loss = conv(x).square().sum()
        loss.backward()
        return loss

    assert ours.step(closure) > 0 and not torch.equal(conv.weight, before)
