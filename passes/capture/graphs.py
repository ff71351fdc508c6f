"""The graphs of a module's own forward, and the Python that runs them."""

import linecache
from collections.abc import Callable
from functools import cached_property
from itertools import count
from typing import Any

from torch import fx, nn

_file_numbers = count()


class Graphs:
    """The train and the eval graph of one module's forward. A copy of a model shares them: they hold no tensor."""

    def __init__(self, train: fx.Graph, evaluate: fx.Graph) -> None:
        self.train = train
        self.evaluate = evaluate

    def __deepcopy__(self, memo: dict[int, Any]) -> "Graphs":
        return self

    @cached_property
    def forwards(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The forwards of train and eval mode, generated once, after the last change of the graphs."""
        return _generate_forward(self.train), _generate_forward(self.evaluate)

    def bind(self, plain_class: type[nn.Module]) -> Callable[..., Any]:
        """Return the forward of a layer that was of `plain_class`."""
        train_forward, eval_forward = self.forwards

        def forward(self_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (train_forward if self_.training else eval_forward)(self_, *args, **kwargs)

        return forward

    def __getstate__(self) -> dict[str, Any]:
        return {"train": self.train, "evaluate": self.evaluate}


def _generate_forward(graph: fx.Graph) -> Callable[..., Any]:
    """Compile the graph's Python code, with its source where tracebacks, debuggers and torch.compile look for it."""
    code = graph.python_code("self")
    filename = f"<decorr_fx graph {next(_file_numbers)}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    generated: Callable[..., Any] = namespace["forward"]
    return generated
