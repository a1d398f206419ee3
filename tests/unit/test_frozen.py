"""Parameters that refuse to be written to, before it happens."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vllm_companion_plugin.errors import SharedWeightsError
from vllm_companion_plugin.training.frozen import FrozenParameter, freeze

OTHER = torch.ones(4, 4)


def data_in_place(frozen: FrozenParameter) -> None:
    frozen.data += OTHER


def item(frozen: FrozenParameter) -> None:
    frozen[0] = 1


def item_of_data(frozen: FrozenParameter) -> None:
    frozen.data[0, 1] = 1


def step(frozen: FrozenParameter) -> None:
    """Of an optimizer that was given it after all."""
    optimizer = torch.optim.AdamW([frozen.requires_grad_()], lr=1)
    with torch.enable_grad():
        (frozen * 2).sum().backward()
    optimizer.step()


def load_state(frozen: FrozenParameter) -> None:
    linear = nn.Linear(4, 4, bias=False)
    linear.weight = frozen
    try:
        linear.load_state_dict({"weight": OTHER})
    except RuntimeError as error:  # which tells of all parameters
        raise SharedWeightsError(str(error)) from error


def differentiated(frozen: FrozenParameter) -> None:
    """A view that is made while `torch.func` traces: it is wrapped, on the same memory."""

    def zeroed(other: torch.Tensor) -> torch.Tensor:
        frozen.t().zero_()
        return (frozen @ other).sum()

    torch.func.grad(zeroed)(OTHER)


WRITES: dict[str, Callable[[FrozenParameter], object]] = {
    "data +=": data_in_place,
    "data.copy_": lambda frozen: frozen.data.copy_(OTHER),
    "data[a:b].mul_": lambda frozen: frozen.data[0:2].mul_(3),
    "data[a] =": item_of_data,
    "[a] =": item,
    "add_": lambda frozen: frozen.add_(1),
    "copy_ of the class": lambda frozen: torch.Tensor.copy_(frozen, OTHER),
    "addmm_": lambda frozen: frozen.addmm_(OTHER, OTHER),
    "view": lambda frozen: frozen.view(-1).zero_(),
    "transposed": lambda frozen: frozen.t().zero_(),
    "a row": lambda frozen: frozen[0].fill_(2),
    "detached": lambda frozen: frozen.detach().zero_(),
    "one of chunks": lambda frozen: torch.chunk(frozen, 2)[0].zero_(),
    "one of rows": lambda frozen: frozen.unbind()[3].zero_(),
    "an argument by name": lambda frozen: torch.transpose(input=frozen, dim0=0, dim1=1).zero_(),
    "one of several": lambda frozen: torch.einsum("ij->ji", frozen).zero_(),
    "max_norm": lambda frozen: F.embedding(torch.arange(4), frozen, max_norm=0.01),
    "in place": lambda frozen: F.relu(frozen, inplace=True),
    "dropout in place": lambda frozen: F.dropout(frozen, 0.5, True, True),
    "element by element": lambda frozen: frozen.apply_(lambda element: 0.0),
    "out": lambda frozen: torch.add(OTHER, 1, out=frozen),
    "foreach": lambda frozen: torch._foreach_add_([frozen], [OTHER]),
    "init": nn.init.kaiming_uniform_,
    "an overload": lambda frozen: torch.ops.aten.add_.Tensor(frozen, OTHER),
    "an overload of a view": lambda frozen: torch.ops.aten.copy_.default(frozen[1:], OTHER[1:]),
    "an overload with out": lambda frozen: torch.ops.aten.add.out(OTHER, OTHER, out=frozen),
    "an operator whose name does not say it": lambda frozen: torch.ops.aten._fused_sgd_.default(
        [frozen],
        [OTHER],
        [],
        weight_decay=0,
        momentum=0,
        lr=1,
        dampening=0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
    ),
    "a shallow copy": lambda frozen: copy.copy(frozen).zero_(),
    "a shallow copy of a view": lambda frozen: copy.copy(frozen.data).zero_(),
    "another class": lambda frozen: frozen.as_subclass(torch.Tensor).zero_(),
    "another class of a view": lambda frozen: frozen.t().as_subclass(torch.Tensor).zero_(),
    "the class of parameters": lambda frozen: frozen.as_subclass(nn.Parameter),
    "a view in torch.func": differentiated,
    "an optimizer": step,
    "load_state_dict": load_state,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_a_write_is_refused_by_name_and_does_not_happen(write: Callable[[FrozenParameter], object]) -> None:
    memory = torch.randn(4, 4)
    before = memory.clone()
    frozen = freeze("model.a.weight", memory)
    with torch.no_grad(), pytest.raises(SharedWeightsError, match=r"model\.a\.weight is read-only"):
        write(frozen)
    assert torch.equal(memory, before)


def test_what_only_reads_is_as_of_any_parameter() -> None:
    memory = torch.randn(4, 4)
    frozen, plain = freeze("a", memory), nn.Parameter(memory.clone(), requires_grad=False)
    there = torch.randn(2, 4, requires_grad=True)
    assert isinstance(frozen, nn.Parameter)
    assert not frozen.requires_grad
    assert frozen.data_ptr() == memory.data_ptr()
    of_frozen = torch.autograd.grad(nn.functional.linear(there, frozen).square().sum(), there)
    of_plain = torch.autograd.grad(nn.functional.linear(there, plain).square().sum(), there)
    assert torch.equal(of_frozen[0], of_plain[0])
    result = frozen + 1
    assert type(result) is torch.Tensor
    result.zero_()
    other = torch.zeros(4, 4)
    other.copy_(frozen)
    other += frozen
    assert torch.equal(other, memory * 2)
    frozen.requires_grad_()
    frozen.requires_grad_(False)


def test_functions_are_differentiated_beside_it() -> None:
    """Of one input and of several, where results have no memory that one can ask for."""
    memory, there = torch.randn(4, 4), torch.randn(3, 2, 4)

    def gradients(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def loss(each: torch.Tensor) -> torch.Tensor:
            return F.linear(each @ weight.t(), weight).square().sum()

        return torch.func.grad(loss)(there[0]), torch.func.vmap(torch.func.grad(loss))(there)

    for one, other in zip(gradients(freeze("a", memory)), gradients(memory), strict=True):
        assert type(one) is torch.Tensor
        assert torch.equal(one, other)


def test_an_array_of_it_cannot_be_written_to() -> None:
    frozen = freeze("a", torch.randn(4, 4))
    with pytest.raises(ValueError, match="read-only"):
        frozen.numpy()[0] = 1


def test_a_copy_is_a_parameter_with_memory_of_its_own() -> None:
    memory = torch.randn(4, 4)
    linear = nn.Linear(4, 4, bias=False)
    linear.weight = freeze("a", memory)
    other = copy.deepcopy(linear)
    assert type(other.weight) is nn.Parameter
    assert other.weight.data_ptr() != memory.data_ptr()
    with torch.no_grad():
        other.weight.zero_()
    assert memory.any()


def test_a_copy_of_a_state_has_memory_of_its_own() -> None:
    memory = torch.randn(4, 4)
    linear = nn.Linear(4, 4, bias=False)
    linear.weight = freeze("a", memory)
    state = copy.deepcopy({**linear.state_dict(), "again": linear.weight.data})
    assert type(state["weight"]) is torch.Tensor
    assert torch.equal(state["weight"], memory)
    state["weight"].zero_()
    assert memory.any()


def test_another_process_gets_a_copy() -> None:
    """What is shared stays where it is: PyTorch moves what it sends into memory of its own."""
    memory = torch.randn(4, 4)
    linear = nn.Linear(4, 4, bias=False)
    linear.weight = freeze("a", memory)
    for sent in (linear.weight, linear.state_dict()["weight"]):
        received = pickle.loads(ForkingPickler.dumps(sent))
        assert torch.equal(received, memory)
        assert received.data_ptr() != memory.data_ptr()
    assert type(pickle.loads(ForkingPickler.dumps(linear.weight))) is nn.Parameter
    assert not memory.is_shared()


def test_it_is_saved_as_any_parameter() -> None:
    linear = nn.Linear(4, 4, bias=False)
    linear.weight = freeze("a", torch.randn(4, 4))
    file = io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)["weight"]
    assert (type(loaded), torch.equal(loaded, linear.weight)) == (torch.Tensor, True)
