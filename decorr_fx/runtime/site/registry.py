"""The sites of the process, by the parameters that R belongs to; and what runs only while there are some."""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from threading import RLock
from typing import Any, TypeAlias
from weakref import WeakSet, finalize, ref

from torch import Tensor
from torch.nn import Parameter

from decorr_fx.runtime.private import WeakTensorKeyDictionary
from decorr_fx.runtime.site.shard import is_sharded

Site: TypeAlias = Any  # that of runtime.site.state, which registers itself here

LOCK = RLock()  # of the registry, and of whoever changes the classes or hooks of modules


class _Registry:
    """The sites of each parameter. After a new number of `changes` what was looked up before may be out of date."""

    def __init__(self) -> None:
        self.changes = 0
        self.live = 0
        self.sites: MutableMapping[Tensor, list[ref[Site]]] = WeakTensorKeyDictionary()
        self.all: WeakSet[Site] = WeakSet()
        self.unlisted: WeakSet[Site] = WeakSet()  # their parameters are looked up when an optimizer asks for them
        self.while_live: list[tuple[Callable[[], None], Callable[[], None]]] = []


_REGISTRY = _Registry()


def while_sites_live(start: Callable[[], None], stop: Callable[[], None]) -> None:
    """Let `start` be called when the first site of the process is made, and `stop` when the last one is gone."""
    _REGISTRY.while_live.append((start, stop))


def register(site: Site) -> None:
    """Take in a new site: of `transform`, a copy or a pickle. `mark` it or list its parameters afterwards."""
    with LOCK:
        _REGISTRY.all.add(site)
        _REGISTRY.live += 1
        if _REGISTRY.live == 1:
            for start, _ in _REGISTRY.while_live:
                start()
        finalize(site, _gone).atexit = False


def mark(site: Site) -> None:
    """Note that the parameters of the site may be others than before; a copy's are not there yet when it is made."""
    with LOCK:
        _REGISTRY.unlisted.add(site)
        _REGISTRY.changes += 1


def forget(site: Site) -> None:
    """Let the site belong to no parameter any more: it was taken out of its model, but may be held by something."""
    with LOCK:
        _REGISTRY.all.discard(site)
        _REGISTRY.unlisted.discard(site)
        for known in _REGISTRY.sites.values():
            known[:] = [other for other in known if other() is not site]
        _REGISTRY.changes += 1


def _gone() -> None:
    with LOCK:
        _REGISTRY.live -= 1
        if not _REGISTRY.live:
            for _, stop in _REGISTRY.while_live:
                stop()


def changes() -> int:
    """Return a number that is another one after each change of which site belongs to which parameter."""
    return _REGISTRY.changes


def sites_of_parameter(parameter: Tensor) -> Iterator[Site]:
    """Yield the sites of which the parameter is a weight."""
    while _REGISTRY.unlisted:
        list_parameters(_REGISTRY.unlisted.pop())
    for reference in _REGISTRY.sites.get(parameter, ()):
        site = reference()
        if site is not None:
            yield site


def list_parameters(site: Site) -> None:
    """Note the parameters that the weights of the site are now."""
    with LOCK:
        for parameter in [found for weight in site.weights if (found := weight.find()) is not None]:
            known = _REGISTRY.sites.setdefault(parameter, [])
            if all(other() is not site for other in known):
                known.append(ref(site))
                _REGISTRY.changes += 1


def list_sharded(parameters: Sequence[Tensor]) -> None:
    """Have all sites looked up anew where parameters are sharded and unknown: `fully_shard` replaces them unnoticed."""
    if any(type(p) is not Parameter and is_sharded(p) and p not in _REGISTRY.sites for p in parameters):
        with LOCK:
            _REGISTRY.unlisted.update(_REGISTRY.all)
