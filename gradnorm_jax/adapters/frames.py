"""Walking back through a program, in and out of the programs that it calls."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any, NamedTuple

from jax.extend import core

from gradnorm_jax.jaxprs import Program, body, called_program


@dataclasses.dataclass(eq=False)
class Frame:
    """One run of a program: the same program that is called twice has two frames.

    Attributes:
        program: what is run.
        call: the equation that calls it, None for the whole.
        parent: the frame of that equation.
    """

    program: Program
    call: core.JaxprEqn | None = None
    parent: "Frame | None" = None
    _inner: dict[int, "Frame"] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def made_by(self) -> dict[Any, core.JaxprEqn]:
        """The equations by the variables that they yield."""
        return {out: eqn for eqn in body(self.program).eqns for out in eqn.outvars}

    @functools.cached_property
    def inputs(self) -> dict[Any, int]:
        """The positions of the program's input variables."""
        return {variable: i for i, variable in enumerate(body(self.program).invars)}

    def enter(self, equation: core.JaxprEqn) -> "Frame | None":
        """The frame of the program that an equation calls; None if it is no call."""
        program = called_program(equation)
        if program is None:
            return None
        return self._inner.setdefault(id(equation), Frame(program, equation, self))


class Ref(NamedTuple):
    """A variable, or a literal, of one frame."""

    frame: Frame
    atom: Any

    def __hash__(self) -> int:  # some literals have none
        return hash((id(self.frame), id(self.atom)))

    @property
    def equation(self) -> core.JaxprEqn | None:
        """What yields it; None for an input, a constant or a literal."""
        return None if self.is_literal else self.frame.made_by.get(self.atom)

    @property
    def is_literal(self) -> bool:
        """Whether it is a number that is written in the program."""
        return isinstance(self.atom, core.Literal)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.atom.aval.shape)

    def operand(self, position: int) -> "Ref":
        """An operand of the equation that yields it."""
        assert self.equation is not None
        return source(Ref(self.frame, self.equation.invars[position]))

    def operands(self) -> list["Ref"]:
        """All operands of the equation that yields it; none if there is none."""
        equation = self.equation
        return [] if equation is None else [self.operand(i) for i in range(len(equation.invars))]


def source(ref: Ref) -> Ref:
    """The same value where it comes from: no result of a call, nor an input of one."""
    while not ref.is_literal:
        frame, equation = ref.frame, ref.equation
        if equation is not None:
            inner = frame.enter(equation)
            if inner is None:
                return ref
            ref = Ref(inner, body(inner.program).outvars[equation.outvars.index(ref.atom)])
        elif frame.parent is not None and frame.call is not None and ref.atom in frame.inputs:
            ref = Ref(frame.parent, frame.call.invars[frame.inputs[ref.atom]])
        else:
            return ref
    return ref


def inputs_of(ref: Ref, *, but: Collection[Ref] = ()) -> set[Ref]:
    """The inputs and constants of the whole program that a value is computed from.

    Args:
        ref: the value.
        but: values to take as inputs too.
    """
    found, seen, waiting = set(), set(), [source(ref)]
    while waiting:
        ref = waiting.pop()
        if ref.is_literal or ref in seen:
            continue
        seen.add(ref)
        if ref.equation is None or ref in but:
            found.add(ref)
        else:
            waiting.extend(ref.operands())
    return found
