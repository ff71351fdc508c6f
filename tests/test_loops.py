"""Every training loop that is valid for W is valid for R: each is compared with a loop written by hand in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import decorr_fx
from decorr_fx import DecorrConfig
from decorr_fx.ops import reference

LR, DECOR_LR, KAPPA = 0.1, 0.05, 0.5
CONFIG = DecorrConfig(rule="dbp", update_every=1, decor_lr=DECOR_LR, kappa=KAPPA, max_samples=1000)


class HandLayer:
    """A linear layer, its R and its rows, with every formula written out."""

    def __init__(self, layer: nn.Linear) -> None:
        self.W = layer.weight.detach().clone().requires_grad_()
        self.b = layer.bias.detach().clone().requires_grad_()
        self.R = torch.eye(layer.in_features, dtype=torch.float64)
        self.rows: list[Tensor] = []

    def __call__(self, x: Tensor, record: bool = True) -> Tensor:
        if record:
            self.rows.append(x.detach())
        return x @ reference.fold_rows(self.W, self.R).T + self.b

    def descend(self) -> None:
        with torch.no_grad():
            for p in (self.W, self.b):
                p -= LR * p.grad
                p.grad = None

    def decorrelate(self) -> None:
        if not self.rows:
            return
        rows = torch.cat(self.rows)
        self.rows = []
        (self.R,), _, transitions, _ = reference.step_factors([self.R], None, rows, "dbp", DECOR_LR, KAPPA)
        with torch.no_grad():
            self.W.copy_(reference.retreat_rows(self.W, transitions))


class Net(nn.Module):
    """Two layers, the second of which may be called several times."""

    def __init__(self, repeats: int = 1) -> None:
        super().__init__()
        self.first, self.second, self.repeats = nn.Linear(5, 4), nn.Linear(4, 4), repeats

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for _ in range(self.repeats):
            x = torch.tanh(self.second(x))
        return x


class HandNet:
    """`Net` by hand."""

    def __init__(self, net: Net) -> None:
        self.first, self.second, self.repeats = HandLayer(net.first), HandLayer(net.second), net.repeats

    def __call__(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for _ in range(self.repeats):
            x = torch.tanh(self.second(x))
        return x

    def step(self) -> None:
        for layer in (self.first, self.second):
            layer.descend()
            layer.decorrelate()


def make(repeats: int = 1) -> tuple[nn.Module, HandNet, torch.optim.Optimizer]:
    net = Net(repeats).double()
    hand = HandNet(net)
    model = decorr_fx.transform(net, CONFIG)
    return model, hand, torch.optim.SGD(model.parameters(), lr=LR)


def batches(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(count)]


def loss_of(out: Tensor) -> Tensor:
    return (out - 0.3).square().mean()


def assert_same(model: nn.Module, hand: HandNet) -> None:
    for name in ("first", "second"):
        layer, by_hand = getattr(model, name), getattr(hand, name)
        torch.testing.assert_close(layer.weight, by_hand.W, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(layer.bias, by_hand.b, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(layer.weight_decorr.R[0], by_hand.R, rtol=1e-9, atol=1e-10)
        assert not torch.equal(by_hand.R, torch.eye(len(by_hand.R), dtype=torch.float64))


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_plain_loop_and_a_layer_called_several_times(repeats: int) -> None:
    model, hand, optimizer = make(repeats)
    for x in batches(5):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
        loss_of(hand(x)).backward()
        hand.step()
        assert_same(model, hand)


def test_gradient_accumulation_uses_the_rows_of_all_micro_batches() -> None:
    model, hand, optimizer = make()
    for first, second in zip(batches(4), batches(4, seed=2), strict=True):
        for x in (first, second):
            loss_of(model(x)).backward()
            loss_of(hand(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        hand.step()
    assert_same(model, hand)


def test_two_forwards_before_one_backward() -> None:
    model, hand, optimizer = make()
    for first, second in zip(batches(4), batches(4, seed=2), strict=True):
        optimizer.zero_grad()
        (loss_of(model(first)) + loss_of(model(second))).backward()
        optimizer.step()
        (loss_of(hand(first)) + loss_of(hand(second))).backward()
        hand.step()
    assert_same(model, hand)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model, hand, optimizer = make(repeats=2)
    for x in batches(4):
        optimizer.zero_grad()
        x = x.clone().requires_grad_()  # the reentrant kind needs an input with a gradient
        loss_of(checkpoint(model, x, use_reentrant=use_reentrant)).backward()
        optimizer.step()
        loss_of(hand(x)).backward()
        hand.step()
    assert_same(model, hand)


def test_a_step_that_the_grad_scaler_skips_moves_neither_W_nor_R() -> None:
    model, hand, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i, x in enumerate(batches(5)):
        optimizer.zero_grad()
        before = [p.clone() for p in model.state_dict().values()]
        loss = loss_of(model(x)) * (float("inf") if i == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        by_hand = loss_of(hand(x))
        if i == 2:
            assert all(map(torch.equal, before, model.state_dict().values()))
        else:
            by_hand.backward()
            hand.step()
    assert_same(model, hand)


def test_a_gan_loop_with_two_optimizers() -> None:
    generator, hand_generator, generator_optimizer = make()
    critic, hand_critic, critic_optimizer = make()
    widen = torch.randn(4, 5, dtype=torch.float64)
    for noise, real in zip(batches(4), batches(4, seed=2), strict=True):
        critic_optimizer.zero_grad()
        (critic(generator(noise).detach() @ widen).mean() - critic(real).mean()).backward()
        critic_optimizer.step()
        (hand_critic(hand_generator(noise).detach() @ widen).mean() - hand_critic(real).mean()).backward()
        hand_critic.step()
        generator_optimizer.zero_grad()
        critic_optimizer.zero_grad()
        (-critic(generator(noise) @ widen).mean()).backward()
        generator_optimizer.step()
        (-hand_critic(hand_generator(noise) @ widen).mean()).backward()
        hand_generator.step()
        for layer in (hand_critic.first, hand_critic.second):
            layer.W.grad = layer.b.grad = None
    assert_same(generator, hand_generator)
    assert_same(critic, hand_critic)


def test_a_forward_in_eval_mode_records_nothing() -> None:
    model, hand, optimizer = make()
    for x, other in zip(batches(3), batches(3, seed=2), strict=True):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        model.eval()(other)
        model.train()
        optimizer.step()
        loss_of(hand(x)).backward()
        hand.step()
    assert_same(model, hand)


def test_an_optimizer_made_before_the_transform_and_a_closure() -> None:
    net = Net().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    hand = HandNet(net)
    model = decorr_fx.transform(net, CONFIG)
    for x in batches(3):

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model(x))
            loss.backward()
            return loss

        optimizer.step(closure)
        loss_of(hand(x)).backward()
        hand.step()
    assert_same(model, hand)


def test_a_step_by_hand_for_an_optimizer_that_is_none() -> None:
    model, hand, _ = make()
    for x in batches(3):
        loss_of(model(x)).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= LR * p.grad
                p.grad = None
        decorr_fx.step(model)
        loss_of(hand(x)).backward()
        hand.step()
    assert_same(model, hand)


@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_any_torch_optimizer_moves_R(make_optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    model = decorr_fx.transform(Net())
    optimizer = make_optimizer(model.parameters(), lr=0.01)
    loss_of(model(torch.randn(7, 5))).backward()
    optimizer.step()
    assert [s.steps for s in decorr_fx.stats(model)] == [1, 1]


def test_a_site_moves_only_with_the_optimizer_that_owns_its_weight() -> None:
    model = decorr_fx.transform(Net())
    optimizer = torch.optim.SGD([*model.second.parameters()], lr=LR)
    loss_of(model(torch.randn(7, 5))).backward()
    optimizer.step()
    assert [s.steps for s in decorr_fx.stats(model)] == [0, 1]


def test_averaged_copies_do_not_move() -> None:
    model = decorr_fx.transform(Net())
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loss_of(average(torch.randn(7, 5))).backward()
    loss_of(model(torch.randn(7, 5))).backward()
    optimizer.step()
    assert [s.steps for s in decorr_fx.stats(average.module)] == [0, 0]
