"""Every training loop that is valid for the plain model, compared with one by hand in float64 that trains W itself."""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import schedulefree
import torch
from optimizers import SAM, Assigning, Lookahead, MasterWeights, Wrapper
from prodigyopt import Prodigy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import decorr_fx
from decorr_fx import Dbp
from decorr_fx.ops import reference
from decorr_fx.runtime.site.state import sites_of

LR = 0.1
RULE = Dbp(update_every=1, decor_lr=0.05, max_samples=1000)
MakeOptimizer = Callable[..., torch.optim.Optimizer]


class HandLayer:
    """A linear layer as the papers have it: it holds W, and the network computes with W R."""

    def __init__(self, layer: nn.Linear) -> None:
        self.W = layer.weight.detach().clone().requires_grad_()
        self.b = layer.bias.detach().clone().requires_grad_()
        self.R = torch.eye(layer.in_features, dtype=torch.float64)
        self.rows: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.rows.append(x.detach())
        return x @ reference.theta_of(self.W, self.R).T + self.b

    @torch.no_grad()
    def move_R(self) -> None:
        if not self.rows:
            return
        rows, old = torch.cat(self.rows), self.R
        self.rows = []
        (self.R,), _ = reference.step_factors([old], None, rows, RULE, RULE.decor_lr)
        self.W.copy_(reference.preserve(self.W, old, self.R))


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
    """`Net` by hand, with an optimizer over W and the biases."""

    def __init__(self, net: Net, make_optimizer: MakeOptimizer) -> None:
        self.first, self.second, self.repeats = HandLayer(net.first), HandLayer(net.second), net.repeats
        self.layers = (self.first, self.second)
        self.optimizer = make_optimizer([p for layer in self.layers for p in (layer.W, layer.b)])

    def __call__(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for _ in range(self.repeats):
            x = torch.tanh(self.second(x))
        return x

    def step(self) -> None:
        self.optimizer.step()
        for layer in self.layers:
            layer.move_R()

    def learn(self, x: Tensor) -> None:
        """Take one ordinary step."""
        self.optimizer.zero_grad()
        loss_of(self(x)).backward()
        self.step()


sgd: MakeOptimizer = partial(torch.optim.SGD, lr=LR)


def make(repeats: int = 1, make_optimizer: MakeOptimizer = sgd) -> tuple[nn.Module, HandNet, torch.optim.Optimizer]:
    net = Net(repeats).double()
    hand = HandNet(net, make_optimizer)
    model = decorr_fx.transform(net, RULE)
    return model, hand, make_optimizer(model.parameters())


def batches(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(count)]


def loss_of(out: Tensor) -> Tensor:
    return (out - 0.3).square().mean()


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """Take one ordinary step."""
    optimizer.zero_grad()
    loss_of(model(x)).backward()
    optimizer.step()


def assert_same(model: nn.Module, hand: HandNet) -> None:
    for name in ("first", "second"):
        layer, by_hand = getattr(model, name), getattr(hand, name)
        theta = reference.theta_of(by_hand.W, by_hand.R)
        torch.testing.assert_close(layer.weight, theta, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(layer.bias, by_hand.b, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(layer.weight_decorr.R[0], by_hand.R, rtol=1e-9, atol=1e-10)
        assert (by_hand.R - torch.eye(len(by_hand.R))).abs().max() > 0.01


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": sgd,
    "momentum": partial(torch.optim.SGD, lr=LR, momentum=0.9, nesterov=True),
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "Adam, foreach": partial(torch.optim.Adam, lr=0.01, foreach=True),
    "Adam, fused": partial(torch.optim.Adam, lr=0.01, fused=True),
    "SGD, fused": partial(torch.optim.SGD, lr=LR, momentum=0.9, fused=True),
    "AMSGrad": partial(torch.optim.AdamW, lr=0.01, amsgrad=True, weight_decay=0.0),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, centered=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "NAdam": partial(torch.optim.NAdam, lr=0.01),
    "by assignment": partial(Assigning, lr=LR),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_theta_moves_it_as_it_would_move_W(name: str) -> None:
    model, hand, optimizer = make(make_optimizer=OPTIMIZERS[name])
    for x in batches(6):
        learn(model, optimizer, x)
        hand.learn(x)
        assert_same(model, hand)


def test_a_layer_that_is_called_several_times() -> None:
    model, hand, optimizer = make(repeats=3)
    for x in batches(5):
        learn(model, optimizer, x)
        hand.learn(x)
        assert_same(model, hand)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_accumulation_uses_the_rows_of_all_micro_batches(set_to_none: bool) -> None:
    model, hand, optimizer = make()
    for first, second in zip(batches(4), batches(4, seed=2), strict=True):
        for x in (first, second):
            loss_of(model(x)).backward()
            loss_of(hand(x)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        hand.step()
        hand.optimizer.zero_grad()
    assert_same(model, hand)


def test_two_forwards_before_one_backward() -> None:
    model, hand, optimizer = make()
    for first, second in zip(batches(4), batches(4, seed=2), strict=True):
        for net, step in ((model, optimizer.step), (hand, hand.step)):
            (loss_of(net(first)) + loss_of(net(second))).backward()
            step()
        optimizer.zero_grad()
        hand.optimizer.zero_grad()
    assert_same(model, hand)


def test_two_steps_without_a_backward_between_map_the_gradient_once() -> None:
    model, hand, optimizer = make()
    for x in batches(4):
        learn(model, optimizer, x)
        optimizer.step()
        hand.learn(x)
        hand.step()
    assert_same(model, hand)


def test_gradients_that_are_clipped() -> None:
    model, hand, optimizer = make()
    for x in batches(4):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        hand.optimizer.zero_grad()
        loss_of(hand(x)).backward()
        for p in hand.optimizer.param_groups[0]["params"]:
            p.grad *= 0.1 / (norm + 1e-6)
        hand.step()
        assert norm > 0.1
    assert_same(model, hand)


def test_gradients_that_are_not_set_to_zero_are_said_once() -> None:
    model, _, optimizer = make()
    first, *others = batches(5)
    learn(model, optimizer, first)

    def go_on() -> None:
        for x in others:
            loss_of(model(x)).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"layer 'first': its gradient was not set to zero .*zero_grad") as said:
        go_on()
    assert len(said) == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model, hand, optimizer = make(repeats=2)
    for x in batches(4):
        optimizer.zero_grad()
        x = x.clone().requires_grad_()  # the reentrant kind needs an input with a gradient
        loss_of(checkpoint(model, x, use_reentrant=use_reentrant)).backward()
        optimizer.step()
        hand.learn(x)
    assert_same(model, hand)


def test_a_step_that_the_grad_scaler_skips_moves_neither_weights_nor_R() -> None:
    model, hand, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i, x in enumerate(batches(5)):
        optimizer.zero_grad()
        before = copy.deepcopy(model.state_dict())
        loss = loss_of(model(x)) * (float("inf") if i == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if i == 2:
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            hand(x)  # its rows come along to the next step
        else:
            hand.learn(x)
    assert_same(model, hand)


def test_a_step_that_a_fused_optimizer_skips_itself_moves_no_weight() -> None:
    model, _, optimizer = make(make_optimizer=partial(torch.optim.Adam, lr=0.01, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i, x in enumerate(batches(6)):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(loss_of(model(x)) * (float("inf") if i == 3 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, before, model.parameters())) == (i == 3)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_scaled_gradient_of_a_fused_optimizer() -> None:
    model, hand, optimizer = make(make_optimizer=partial(torch.optim.Adam, lr=0.01, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x in batches(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model(x))).backward()
        scaler.step(optimizer)
        scaler.update()
        hand.learn(x)
    assert_same(model, hand)


def test_a_gan_loop_with_two_optimizers() -> None:
    generator, hand_generator, generator_optimizer = make()
    critic, hand_critic, critic_optimizer = make()
    widen = torch.randn(4, 5, dtype=torch.float64)
    for noise, real in zip(batches(4), batches(4, seed=2), strict=True):
        critic_optimizer.zero_grad()
        (critic(generator(noise).detach() @ widen).mean() - critic(real).mean()).backward()
        critic_optimizer.step()
        hand_critic.optimizer.zero_grad()
        (hand_critic(hand_generator(noise).detach() @ widen).mean() - hand_critic(real).mean()).backward()
        hand_critic.step()
        generator_optimizer.zero_grad()
        (-critic(generator(noise) @ widen).mean()).backward()
        generator_optimizer.step()
        hand_generator.optimizer.zero_grad()
        (-hand_critic(hand_generator(noise) @ widen).mean()).backward()
        hand_generator.step()
    assert_same(generator, hand_generator)
    assert_same(critic, hand_critic)


def test_forwards_in_eval_mode_or_without_gradients_record_nothing() -> None:
    model, hand, optimizer = make()
    for x, other in zip(batches(3), batches(3, seed=2), strict=True):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        model.eval()(other)
        with torch.no_grad():
            model.train()(other)
        optimizer.step()
        hand.learn(x)
    assert_same(model, hand)


@pytest.mark.parametrize("by_keyword", [True, False])
@pytest.mark.parametrize("name", ["SGD", "Adam", "Adam, fused"])
def test_an_optimizer_made_before_the_transform_and_a_closure(name: str, by_keyword: bool) -> None:
    net = Net().double()
    optimizer, hand = OPTIMIZERS[name](net.parameters()), HandNet(net, OPTIMIZERS[name])
    model = decorr_fx.transform(net, RULE)
    for x in batches(4):

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model(x))
            loss.backward()
            return loss

        expected = float(loss_of(decorr_fx.fold(model)(x)).detach())
        loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        assert float(loss.detach()) == expected
        hand.learn(x)
    assert_same(model, hand)


def test_an_optimizer_per_parameter_that_steps_inside_backward() -> None:
    model, hand, _ = make()
    optimizers = {p: sgd([p]) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    for x in batches(4):
        loss_of(model(x)).backward()
        hand.learn(x)
    assert_same(model, hand)


def test_stepping_for_an_optimizer_that_is_none() -> None:
    model, hand, _ = make()
    for x in batches(4):
        loss_of(model(x)).backward()
        with decorr_fx.stepping(model), torch.no_grad():
            for p in model.parameters():
                p -= LR * p.grad
        model.zero_grad()
        hand.learn(x)
    assert_same(model, hand)


@pytest.mark.parametrize("depth", [1, 2])
def test_an_optimizer_around_an_optimizer_maps_and_moves_once(depth: int) -> None:
    model, hand, optimizer = make(make_optimizer=partial(torch.optim.Adam, lr=0.01))
    for _ in range(depth):
        optimizer = Wrapper(optimizer)
    for x in batches(5):
        learn(model, optimizer, x)
        hand.learn(x)
        assert_same(model, hand)
    assert [s.steps for s in decorr_fx.stats(model)] == [5, 5]


def test_stepping_around_an_optimizer_maps_and_moves_once() -> None:
    model, hand, optimizer = make()
    for x in batches(4):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        with decorr_fx.stepping(model):
            optimizer.step()
        hand.learn(x)
    assert_same(model, hand)


def sam_by_hand(hand: HandNet, x: Tensor, rho: float) -> None:
    """Perturb theta along its own gradient, and step by the gradient of W that is found there."""
    hand.optimizer.zero_grad()
    loss_of(hand(x)).backward()
    inverses = [torch.linalg.inv(layer.R) for layer in hand.layers]
    of_theta = [layer.W.grad @ inverse.T for layer, inverse in zip(hand.layers, inverses, strict=True)]
    norm = torch.stack([g.norm() for g in [*of_theta, *(layer.b.grad for layer in hand.layers)]]).norm()
    olds = [(p, p.detach().clone()) for p in hand.optimizer.param_groups[0]["params"]]
    with torch.no_grad():
        for layer, g, inverse in zip(hand.layers, of_theta, inverses, strict=True):
            layer.W += rho / (norm + 1e-12) * g @ inverse
            layer.b += rho / (norm + 1e-12) * layer.b.grad
    hand.optimizer.zero_grad()
    loss_of(hand(x)).backward()
    with torch.no_grad():
        for p, old in olds:
            p.copy_(old)
    hand.step()


@pytest.mark.parametrize("by_closure", [True, False])
def test_sharpness_aware_minimization(by_closure: bool) -> None:
    model, hand, _ = make()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=LR)
    for x in batches(4):

        def backward(x: Tensor = x) -> Tensor:
            loss = loss_of(model(x))
            loss.backward()
            return loss

        backward()
        if by_closure:
            optimizer.step(backward)
            optimizer.zero_grad()
        else:
            optimizer.first_step(zero_grad=True)
            backward()
            optimizer.second_step(zero_grad=True)
        sam_by_hand(hand, x, 0.05)
    assert_same(model, hand)
    assert [s.steps for s in decorr_fx.stats(model)] == [4, 4]


def test_lbfgs_is_run_plainly_with_one_warning() -> None:
    x, losses, parameters = batches(1)[0], [], []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for transformed in (False, True):
            torch.manual_seed(0)
            model = decorr_fx.transform(Net().double(), RULE) if transformed else Net().double()
            first = sgd(model.parameters(), lr=0.0)
            learn(model, first, x)  # R has moved
            optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)

            def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model(x))
                loss.backward()
                return loss

            for _ in range(3):
                losses.append(float(optimizer.step(closure).detach()))
            parameters.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(losses[3:], losses[:3], rtol=1e-9, atol=0)
    torch.testing.assert_close(parameters[1], parameters[0], rtol=1e-9, atol=1e-12)
    assert [str(one.message) for one in said] == [
        "LBFGS evaluates the loss several times a step: its steps are made without decorrelation"
    ]


def test_another_optimizer_that_evaluates_the_loss_several_times_is_left_alone_from_its_second_step_on() -> None:
    class TwoPoints(torch.optim.SGD):
        def step(self, closure: Callable[[], Tensor]) -> None:
            for _ in range(2):
                closure()
                with torch.no_grad():
                    for p in self.param_groups[0]["params"]:
                        p.add_(p.grad, alpha=-LR)

    results = []
    for transformed in (False, True):
        torch.manual_seed(0)
        model = decorr_fx.transform(Net(), RULE) if transformed else Net()
        optimizer = TwoPoints(model.parameters())

        def closure(model: nn.Module = model) -> None:
            model.zero_grad()
            loss_of(model(torch.ones(3, 5))).backward()

        warns = pytest.warns(UserWarning, match="TwoPoints evaluates the loss several times")
        with warns if transformed else nullcontext():
            optimizer.step(closure)
        for _ in range(2):
            optimizer.step(closure)
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results)  # R was the identity at the first of them


class Task:
    """A regression on correlated inputs, of a network of its own."""

    def __init__(self, transformed: bool = True, update_every: int = 1) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(256, 16) @ torch.randn(16, 16) / 4 + 1
        self.y = torch.sin(self.x[:, :3])
        net = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 3))
        self.model = decorr_fx.transform(net, decorr_fx.Power(update_every=update_every)) if transformed else net

    def loss(self) -> Tensor:
        return F.mse_loss(self.model(self.x), self.y)

    def train(self, optimizer: torch.optim.Optimizer, steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
        return float(self.loss().detach())

    def outputs(self) -> Tensor:
        return self.model(self.x).detach()


def schedule_free(parameters: object, lr: float) -> torch.optim.Optimizer:
    optimizer = schedulefree.AdamWScheduleFree(parameters, lr=lr)
    optimizer.train()
    return optimizer


WITH_COPIES: dict[str, MakeOptimizer] = {
    "master weights": lambda p, lr: MasterWeights(p, lr=lr),
    "Lookahead": lambda p, lr: Lookahead(torch.optim.Adam(p, lr=lr)),
    "schedule-free": schedule_free,
    "Prodigy": lambda p, lr: Prodigy(p, lr=lr),
}
RATES = {"master weights": 0.1, "Lookahead": 0.01, "schedule-free": 0.01, "Prodigy": 1.0}


@pytest.mark.parametrize("name", WITH_COPIES)
def test_optimizers_that_keep_copies_of_weights_stand_still_without_a_learning_rate(name: str) -> None:
    task = Task()
    before = task.outputs()
    task.train(WITH_COPIES[name](task.model.parameters(), lr=1e-30), 12)
    assert min(s.steps for s in decorr_fx.stats(task.model)) == 12
    torch.testing.assert_close(task.outputs(), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", WITH_COPIES)
def test_optimizers_that_keep_copies_of_weights_train(name: str) -> None:
    losses = []
    for transformed in (False, True):
        task = Task(transformed)
        optimizer = WITH_COPIES[name](task.model.parameters(), lr=RATES[name])
        first = float(task.loss().detach())
        task.train(optimizer, 150)
        if name == "schedule-free":
            optimizer.eval()
        losses.append(float(task.loss().detach()))
        assert losses[-1] < 0.2 * first
    assert losses[1] < 2 * losses[0]  # the copies do not move with the weights, but follow them


def test_averages_of_weights_are_averages_of_the_model() -> None:
    for use_buffers in (False, True):
        task = Task()
        average = AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
        by_hand = AveragedModel(decorr_fx.fold(task.model), multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.Adam(task.model.parameters(), lr=0.01)
        for _ in range(20):
            task.train(optimizer, 3)
            average.update_parameters(task.model)
            by_hand.update_parameters(decorr_fx.fold(task.model))
        torch.testing.assert_close(average(task.x), by_hand(task.x))
        assert F.mse_loss(average(task.x), task.y) < 0.1  # which was 0.7


def test_averaged_copies_do_not_move() -> None:
    model, _, optimizer = make()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    loss_of(average(batches(1)[0])).backward()
    learn(model, optimizer, batches(1)[0])
    assert [s.steps for s in decorr_fx.stats(average.module)] == [0, 0]
    assert [s.steps for s in decorr_fx.stats(model)] == [1, 1]


@pytest.mark.parametrize("transformed_target", [False, True])
def test_a_target_network_that_copies_parameters(transformed_target: bool) -> None:
    task = Task()
    target = copy.deepcopy(task.model) if transformed_target else decorr_fx.fold(task.model)
    optimizer = torch.optim.Adam(task.model.parameters(), lr=0.01)
    for _ in range(5):
        task.train(optimizer, 4)
        for old, new in zip(target.parameters(), task.model.parameters(), strict=True):
            old.data.copy_(new.data)
        torch.testing.assert_close(target(task.x), task.model(task.x))


def test_parameters_that_are_put_back_bring_the_function_back() -> None:
    task = Task()
    task.train(torch.optim.Adam(task.model.parameters(), lr=0.01), 30)
    before, best = task.outputs(), [p.detach().clone() for p in task.model.parameters()]
    task.train(torch.optim.Adam(task.model.parameters(), lr=0.1), 30)
    assert (task.outputs() - before).abs().max() > 0.1
    with torch.no_grad():
        for p, old in zip(task.model.parameters(), best, strict=True):
            p.copy_(old)
    assert torch.equal(task.outputs(), before)


def test_the_original_object_computes_what_the_trained_one_does() -> None:
    plain = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    model, x = decorr_fx.transform(plain, decorr_fx.Power(update_every=1)), torch.randn(64, 16)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    for _ in range(20):
        learn(model, optimizer, x)
    assert torch.equal(plain(x), model(x))
    fresh = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert torch.equal(decorr_fx.transform(plain)(x), model(x))


class Headed(nn.Module):
    """A head over an encoder that other models have, too."""

    def __init__(self, encoder: nn.Module, outputs: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).relu())


def test_two_transformed_models_over_one_encoder() -> None:
    encoder, x = nn.Linear(8, 16), torch.randn(64, 8)
    models = [decorr_fx.transform(Headed(encoder, outputs), decorr_fx.Power(update_every=1)) for outputs in (2, 1)]
    still = [torch.optim.SGD(model.parameters(), lr=0.0) for model in models]
    inputs = [x, x * torch.arange(8) + 1]
    before = [model(x).detach() for model in models]
    for _ in range(5):
        for model, optimizer, own in zip(models, still, inputs, strict=True):
            learn(model, optimizer, own)
    for model, expected in zip(models, before, strict=True):
        torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=1e-6)
        assert min(s.steps for s in decorr_fx.stats(model)) >= 5
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]
    first = [float(loss_of(model(own)).detach()) for model, own in zip(models, inputs, strict=True)]
    for _ in range(40):
        for model, optimizer, own in zip(models, optimizers, inputs, strict=True):
            learn(model, optimizer, own)
    for model, own, loss in zip(models, inputs, first, strict=True):
        assert loss_of(model(own)) < 0.2 * loss
    assert models[0].encoder.weight is models[1].encoder.weight is encoder.weight


class ActorCritic(nn.Module):
    """Two branches whose first layers read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = (nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, n)) for n in (2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.actor(x), self.critic(x)], 1)


def test_two_optimizers_on_weights_that_share_one_R() -> None:
    model = decorr_fx.transform(ActorCritic().double(), RULE)
    assert [record.shares_with for record in decorr_fx.report(model).sites].count("actor.0") == 1
    layers = (model.actor[0], model.critic[0])
    optimizers, site = [sgd(layer.parameters()) for layer in layers], next(sites_of(model))
    for x in batches(4):
        loss_of(model(x)).backward()
        for optimizer, layer in zip(optimizers, layers, strict=True):
            R = site.R[0].clone()
            expected = layer.weight.detach() - LR * layer.weight.grad @ R.T @ R
            optimizer.step()
            torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-9, atol=1e-10)
        model.zero_grad()
    assert site.steps == 4  # once for each forward: the second optimizer finds no rows
    assert (site.R[0] - torch.eye(5)).abs().max() > 0.01


def test_a_site_moves_only_with_an_optimizer_that_owns_its_weight() -> None:
    model, _, _ = make()
    learn(model, sgd([*model.second.parameters()]), batches(1)[0])
    assert [s.steps for s in decorr_fx.stats(model)] == [0, 1]


def test_layers_that_are_frozen_and_thawed() -> None:
    model, _, optimizer = make()
    first, *others = batches(4)
    learn(model, optimizer, first)
    model.first.requires_grad_(False)
    frozen = copy.deepcopy(model.first.state_dict())
    for x in others:
        learn(model, optimizer, x)
    assert all(torch.equal(value, frozen[key]) for key, value in model.first.state_dict().items() if "steps" in key)
    assert torch.equal(model.first.weight, frozen["weight"])
    assert torch.equal(model.first.weight_decorr.R, frozen["weight_decorr.R"])
    model.first.requires_grad_(True)
    for x in others:
        learn(model, optimizer, x)
    assert not torch.equal(model.first.weight_decorr.R, frozen["weight_decorr.R"])


def test_weight_decay_and_clipping_see_the_weights_of_the_function() -> None:
    model, _, optimizer = make()
    for x in batches(4):
        learn(model, optimizer, x)
    plain = decorr_fx.fold(model)
    assert all(map(torch.equal, plain.parameters(), model.parameters()))
