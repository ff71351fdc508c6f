"""Other readers of a weight, for which its gradient is not that of rows of a layer's input alone."""

import torch.nn.functional as F
from torch import nn

from decorr_fx.passes.capture.trace import Traced
from decorr_fx.passes.match.source import Unmatched
from decorr_fx.passes.match.weights import FoundWeight


def find_readers(traced: Traced) -> dict[int, str]:
    """Return why parameters cannot be sites whatever else calls them, by their ids."""
    reasons = {}
    for fqn, module in traced.scratch.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            reasons[id(module.weight)] = f"its weight is shared with {fqn!r} ({type(module).__name__})"
        known = dict(module.named_parameters(remove_duplicate=False))
        if isinstance(module, nn.MultiheadAttention) and fqn in traced.graphs and traced.graphs[fqn].reason:
            reasons |= _unseen_in_attention(fqn, known, traced)
        for node in (node for graph in traced.of(fqn) for node in graph.nodes):
            if node.target is not F.multi_head_attention_forward:
                continue
            for argument in node.all_input_nodes:
                if argument.op == "get_attr" and argument.target in known:
                    handed = known[str(argument.target)]
                    reasons[id(handed)] = f"its weight is handed to multi_head_attention_forward in {fqn!r}"
    return reasons


def _unseen_in_attention(fqn: str, known: dict[str, nn.Parameter], traced: Traced) -> dict[int, str]:
    """Return why the parameters of an attention cannot be sites of which no call is seen: by their ids."""
    seen = {str(node.target) for graph in traced.of(fqn) for node in graph.nodes}
    unseen = [p for name, p in known.items() if not seen.intersection((name, name.rpartition(".")[0]))]
    reason = f"the forward of {fqn!r}, which may hand it to multi_head_attention_forward, cannot be traced"
    return {id(parameter): reason for parameter in unseen}


def check_readers(weight: FoundWeight, readers: dict[int, str]) -> None:
    """Raise `Unmatched` for a weight that somebody else reads, or that is called in another way, too."""
    if id(weight.parameter) in readers:
        raise Unmatched(readers[id(weight.parameter)])
    for use in weight.uses:
        if use.call.layout != weight.layout:
            raise Unmatched(
                f"its weight is also used by {use.piece!r}, which reads it in another way ({use.call.kind})"
            )
