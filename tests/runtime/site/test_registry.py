"""Which sites a parameter has: found again after copies, and gone with their models."""

import copy
import gc
import subprocess
import sys
import weakref

import torch
from torch import nn

import decorr_fx
from decorr_fx import Power
from decorr_fx.runtime.site.registry import changes, sites_of_parameter
from decorr_fx.runtime.site.state import sites_of


def two_layers() -> nn.Module:
    return decorr_fx.transform(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), Power(update_every=1))


def test_a_parameter_has_the_sites_of_its_model_alone() -> None:
    model, other = two_layers(), two_layers()
    assert list(sites_of_parameter(model[0].weight)) == [model[0].weight_decorr]
    assert list(sites_of_parameter(other[2].weight)) == [other[2].weight_decorr]
    assert list(sites_of_parameter(model[0].bias)) == []


def test_a_parameter_of_several_models_has_the_sites_of_all() -> None:
    encoder = nn.Linear(5, 4)
    models = [decorr_fx.transform(nn.Sequential(encoder, nn.Linear(4, n))) for n in (1, 2)]
    assert list(sites_of_parameter(encoder.weight)) == [model[0].weight_decorr for model in models]


def test_a_copy_has_parameters_of_its_own() -> None:
    model = two_layers()
    other = copy.deepcopy(model)
    assert list(sites_of_parameter(other[0].weight)) == [other[0].weight_decorr]
    assert list(sites_of_parameter(model[0].weight)) == [model[0].weight_decorr]


def test_whatever_may_change_a_parameter_is_a_change() -> None:
    model = two_layers()
    known = changes()
    for change in (lambda: model.to(torch.float64), lambda: model.load_state_dict(model.state_dict(), assign=True),
                   lambda: copy.deepcopy(model)):  # fmt: skip
        change()
        list(sites_of_parameter(model[0].weight))
        assert changes() != known
        known = changes()
    model(torch.randn(3, 5, dtype=torch.float64)).sum().backward()
    list(sites_of_parameter(model[0].weight))
    known = changes()
    model(torch.randn(3, 5, dtype=torch.float64)).sum().backward()
    assert changes() == known


def test_models_and_parameters_are_collected() -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(9, 5)).square().sum().backward()
        optimizer.step()
    assert not any(part.requires_grad for site in sites_of(model) for part in site.state)
    gone = [weakref.ref(thing) for thing in (model, model[0].weight, model[0].weight_decorr, optimizer)]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4


def test_parameters_outlive_a_model_and_belong_to_no_site_then() -> None:
    plain = nn.Sequential(nn.Linear(5, 4))
    model = decorr_fx.transform(plain)
    assert list(sites_of_parameter(plain[0].weight)) != []
    del model
    gc.collect()
    assert list(sites_of_parameter(plain[0].weight)) == []


HOOKS = """
import copy, gc, torch
from torch import nn
from torch.optim import optimizer as torchs
import decorr_fx

def installed():
    gc.collect()
    return len(torchs._global_optimizer_pre_hooks), len(torchs._global_optimizer_post_hooks)

def plain():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

assert installed() == (0, 0)
models = [decorr_fx.transform(plain()) for _ in range(3)]
models.append(copy.deepcopy(models[0]))
assert installed() == (1, 1)
optimizer = torch.optim.SGD(models[0].parameters(), lr=0.1)
del models[1:]
assert installed() == (1, 1)
folded = decorr_fx.fold(models[0])
models.clear()
assert installed() == (0, 0)
folded(torch.randn(3, 5)).sum().backward()
optimizer.step()
again = decorr_fx.transform(folded)
assert installed() == (1, 1)
decorr_fx.fold_(again)
assert installed() == (0, 0)


class Last(torch.optim.SGD):
    def step(self, closure=None):
        holder.clear()
        gc.collect()


holder = [decorr_fx.transform(plain())]
last = Last(holder[0].parameters(), lr=0.1)
last.step()  # the last model vanishes while a step goes through the hooks
last.step()
assert installed()[0] <= 1
decorr_fx.transform(plain())
assert installed() == (0, 0)
"""


def test_hooks_are_installed_once_and_removed_with_the_last_transformed_model() -> None:
    """In a process of its own: elsewhere there may be other models."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", HOOKS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
