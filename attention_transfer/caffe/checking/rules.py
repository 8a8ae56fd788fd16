"""What every rule gets and gives, and the table that they are in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from attention_transfer.caffe.checking.attention import Attention
from attention_transfer.caffe.graph import Graph, Node


@dataclass(eq=False)
class Case:
    """A net in one phase, as the rules look at it.

    Attributes:
        graph: its layers.
        train: whether the phase is TRAIN, the only one in which a solver runs backward.
        solver: the SolverParameter, None where it is not known.
    """

    graph: Graph
    train: bool
    solver: Any = None

    @cached_property
    def attention(self) -> Attention:
        return Attention(self.graph)

    @property
    def decays(self) -> bool:
        """Whether the solver pulls at weights; without a solver, as one that does."""
        return self.solver is None or self.solver.weight_decay != 0

    def matters(self, node: Node) -> bool:
        """Whether a wrong gradient of this layer goes anywhere, or may: in a branch, at the latest edit."""
        sent = any(blob in self.graph.gradients for blob in node.inputs)
        return self.train and (sent or node in self.attention.branch_nodes)

    def unless_cut(self, nodes: Iterable[Node]) -> str:
        """A remark for layers into which no gradient goes as the net stands."""
        if any(blob in self.graph.gradients for node in nodes for blob in node.inputs):
            return ""
        return " As the net stands no gradient goes there, so it will show with the next edit only."


class Blame(NamedTuple):
    """What a rule found: the layers, what real Caffe does about it, how to mend it, and `Finding.note`."""

    nodes: Collection[Node]
    message: str
    mend: str
    note: bool = False


Rule = Callable[[Case], Blame | None]
RULES: dict[str, Rule] = {}


def pitfall(name: str) -> Callable[[Rule], Rule]:
    """Enter a rule into the table under the name of the pitfall that it finds."""

    def enter(rule: Rule) -> Rule:
        RULES[name] = rule
        return rule

    return enter


def named(nodes: Iterable[Node]) -> str:
    """The layers' names in the order of the net, as a message has them."""
    ordered = sorted(set(nodes), key=lambda node: node.index)
    names = list(dict.fromkeys(repr(node.name) for node in ordered))
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"layer{'s' if len(names) > 1 else ''} {listed}"
