"""Laws of the state of a model."""

import copy
import dataclasses
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from mambakit import MambaConfig, MambaLM
from mambakit.models import ModelState
from mambakit.models.state_file import write_layers

CONFIG = MambaConfig(d_model=8, n_layer=2, vocab_size=20, d_state=4)


@pytest.fixture
def state():
    torch.manual_seed(0)
    return MambaLM(CONFIG)(torch.randint(20, (3, 5))).state


@pytest.fixture(params=["apart", "stacked"])
def held(request, state):
    """A state however it is held, without gradients."""
    if request.param == "apart":
        return state.detach()
    return ModelState.stacked(*map(torch.stack, zip(*state.detach().layers, strict=True)))


def tensors(state):
    return [tensor for layer in state.layers for tensor in layer]


def test_its_tensors_have_the_promised_shapes(state):
    assert len(state) == 3
    assert [layer.conv.shape for layer in state.layers] == [(3, 16, 3)] * 2
    assert [layer.ssm.shape for layer in state.layers] == [(3, 16, 4)] * 2
    assert state.nbytes == 2 * 3 * 16 * (3 + 4) * 4


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (1, [1]),
        (-1, [2]),
        (slice(1, None), [1, 2]),
        (torch.tensor([2, 0, 0]), [2, 0, 0]),
        (torch.tensor([2, -1], dtype=torch.int32), [2, 2]),
        (torch.tensor([True, False, True]), [0, 2]),
        (torch.tensor(1), [1]),
        (torch.tensor(-3, dtype=torch.int8), [0]),
    ],
)
def test_rows_can_be_taken(state, index, rows):
    for taken, whole in zip(tensors(state[index]), tensors(state), strict=True):
        assert_close(taken, whole[rows], rtol=0, atol=0)


@pytest.mark.parametrize("index", [3, -4])
def test_a_row_that_is_not_there_is_refused(state, index):
    with pytest.raises(IndexError, match=f"sequence {index} of 3 does not exist"):
        state[index]


def test_it_can_be_walked_through(state):
    assert [len(row) for row in state] == [1, 1, 1]


def test_detach_cuts_the_graph(state):
    assert all(tensor.requires_grad for tensor in tensors(state))
    assert not any(tensor.requires_grad for tensor in tensors(state.detach()))


def test_a_shorter_dtype_leaves_the_scans_state_alone(state):
    for layer in state.to(dtype=torch.bfloat16).layers:
        assert (layer.conv.dtype, layer.ssm.dtype) == (torch.bfloat16, torch.float32)
    for layer in state.to(device="meta").layers:
        assert (layer.conv.device.type, layer.ssm.device.type) == ("meta", "meta")


def test_it_never_changes(state):
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.layers = ()


def test_it_is_a_pytree(state):
    leaves, structure = pytree.tree_flatten(state)
    assert len(leaves) == 4
    doubled = pytree.tree_unflatten([2 * leaf for leaf in leaves], structure)
    assert isinstance(doubled, ModelState)
    assert_close(doubled.layers[1].ssm, 2 * state.layers[1].ssm)


@pytest.mark.parametrize("index", [[0], [2, -1, 0], [], [0, 0, 0, 0]])
def test_a_list_gathers_rows_that_own_their_memory(state, index):
    taken = state[index]
    for part, whole in zip(tensors(taken), tensors(state), strict=True):
        assert_close(part, whole[index], rtol=0, atol=0)
    assert 3 * taken.nbytes == len(index) * state.nbytes


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([[0]]),
        torch.tensor([0.0]),
        torch.tensor([True, False]),
        torch.tensor([1, 0, 1], dtype=torch.uint8),  # to torch this is a mask
    ],
)
def test_tensors_that_name_no_rows_are_refused(held, index):
    for take in (lambda: held[index], lambda: held.with_rows(index, held)):
        with pytest.raises(IndexError, match=r"True or False for each of 3, got .* of shape"):
            take()


@pytest.mark.refuses
@pytest.mark.parametrize("index", [3, -4, True, 1.0])
def test_a_tensor_without_axes_is_the_number_in_it(held, index):
    with pytest.raises(IndexError, match=f"sequence {index} of 3 does not exist"):
        held[torch.tensor(index)]


@pytest.mark.refuses
@pytest.mark.parametrize("index", [[0, 3], [-4], [True], [1.5], 1.5])
def test_lists_of_rows_that_are_not_there_are_refused(state, index):
    with pytest.raises(IndexError, match="of 3 does not exist"):
        state[index]


@pytest.mark.parametrize(
    ("index", "places"),
    [
        (1, [1]),
        (-1, [2]),
        (slice(0, 2), [0, 1]),
        ([2, 0], [2, 0]),
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor([True, False, True]), [0, 2]),
    ],
)
def test_rows_can_be_put_in_their_place(state, index, places):
    other = MambaLM(CONFIG)(torch.randint(20, (len(places), 5))).state
    before = [tensor.clone() for tensor in tensors(state)]
    for put, old, new in zip(
        tensors(state.with_rows(index, other)), tensors(state), tensors(other), strict=True
    ):
        expected = old.clone()
        expected[places] = new
        assert_close(put, expected, rtol=0, atol=0)
    for now, then in zip(tensors(state), before, strict=True):
        assert_close(now, then, rtol=0, atol=0)


def test_rows_put_into_forks_leave_the_other_forks_alone(state):
    forks = state[0].fork(3).with_rows([1], state[2])
    for fork, whole in zip(tensors(forks), tensors(state), strict=True):
        assert_close(fork, whole[[0, 2, 0]], rtol=0, atol=0)


def test_gradients_go_through_gathering_putting_and_forking(state):
    forks = ModelState.cat([state[0].fork(2), state[[1]]]).with_rows([1], state[2])
    (gradient,) = torch.autograd.grad(
        sum(part.sum() for part in tensors(forks)), state.layers[0].ssm
    )
    assert gradient[:, 0, 0].tolist() == [1, 1, 1]


def test_states_lie_side_by_side(state):
    whole = ModelState.cat([state[2], state[0:2]])
    for part, old in zip(tensors(whole), tensors(state), strict=True):
        assert_close(part, old[[2, 0, 1]], rtol=0, atol=0)


def test_a_thousand_forks_hold_the_memory_of_one(state):
    one = state[[1]]
    forks = one.fork(1000)
    assert (len(forks), forks.nbytes) == (1000, one.nbytes)
    for fork, old in zip(tensors(forks), tensors(one), strict=True):
        assert_close(fork, old.expand(1000, -1, -1), rtol=0, atol=0)


def test_forks_go_on_sharing_wherever_they_are_taken(state):
    one = state[[1]]
    forks = one.fork(1000)
    for move in (
        lambda s: s.to("meta"),
        lambda s: s.to(dtype=torch.bfloat16),
        lambda s: s[:700].to(dtype=torch.float64),
        lambda s: s.to("cpu"),
        copy.deepcopy,
        lambda s: copy.deepcopy(s.detach()),
    ):
        moved, expected = move(forks), move(one)
        assert moved.nbytes == expected.nbytes
        for fork, old in zip(tensors(moved), tensors(expected), strict=True):
            assert (fork.shape[1:], fork.dtype) == (old.shape[1:], old.dtype)
            if fork.device.type != "meta":
                assert torch.equal(fork, old.expand_as(fork))


def test_gradients_go_through_forks_that_were_moved(state):
    ssm = state.layers[0].ssm
    weight = torch.randn(4, 16, 4, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((forks.layers[0].ssm * weight).sum(), ssm)[0]
        for forks in (
            state[1].fork(4).to(dtype=torch.float64),
            state.to(dtype=torch.float64)[1].fork(4),
        )
    ]
    assert_close(*gradients)
    assert gradients[0][1].abs().sum() > 0


def test_a_deep_copy_has_the_numbers_and_the_gradients(state):
    stacked = ModelState.stacked(*map(torch.stack, zip(*state.layers, strict=True)))
    for kind in (state, stacked):
        other = copy.deepcopy(kind)
        for one, wanted in zip(tensors(other), tensors(kind), strict=True):
            assert torch.equal(one, wanted)
            assert one.data_ptr() != wanted.data_ptr()
        (gradient,) = torch.autograd.grad(other.layers[1].ssm.sum(), state.layers[1].ssm)
        assert (gradient == 1).all()


def test_forks_go_on_each_for_itself():
    model = MambaLM(CONFIG)
    prefix, ends = torch.randint(20, (1, 5)), torch.randint(20, (4, 3))
    read = model(prefix).state
    forks = model(ends, read.fork(4))
    whole = model(torch.cat([prefix.expand(4, -1), ends], dim=1))
    assert_close(forks.logits, whole.logits[:, 5:])
    assert forks.state.nbytes == 4 * read.nbytes
    assert_close(model(prefix).state.layers[0].ssm, read.layers[0].ssm, rtol=0, atol=0)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda s: s.fork(2), r"fork: the state must be of one sequence, got 3: choose one"),
        (lambda s: s[0].fork(0), "fork: k must be a whole number of at least 1, got 0"),
        (lambda s: s.with_rows([0, 1], s), "with_rows: other .* each place, 2, got 3"),
        (lambda s: s.with_rows([0], s.to(dtype=torch.float16)[0]), "of one model, dtype and"),
        (lambda _: ModelState.cat([]), "cat: states must be at least one, got none"),
        (lambda s: ModelState.cat([s, 2]), "cat: each state must be a ModelState, got int"),
        (lambda _: ModelState.cat(5), "cat: states must be a list of ModelStates, got int"),
        (lambda s: s.with_rows(0, None), "with_rows: each state must be .*, got NoneType"),
        (
            lambda s: ModelState.cat([s, ModelState(s.layers[:1])]),
            r"got 2 layers.* and 1 layer",
        ),
    ],
)
def test_what_does_not_fit_is_refused(state, operation, message):
    with pytest.raises(ValueError, match=message):
        operation(state)


class TestStacks:
    def test_a_state_says_the_same_however_it_is_held(self, held, state):
        assert (len(held), held.nbytes) == (len(state), state.nbytes)
        for one, other in zip(tensors(held), tensors(state), strict=True):
            assert_close(one, other.detach(), rtol=0, atol=0)

    @pytest.mark.parametrize("index", [1, -1, slice(1, None), [2, 0, 0], []])
    def test_rows_are_the_same(self, held, state, index):
        for one, other in zip(tensors(held[index]), tensors(state[index]), strict=True):
            assert_close(one, other.detach(), rtol=0, atol=0)

    def test_stacks_stay_stacks(self, state):
        assert state.stacks is None
        conv, ssm = map(torch.stack, zip(*state.layers, strict=True))
        held = ModelState.stacked(conv, ssm)
        assert held.stacks == (conv, ssm)
        rows, short = held[[2, 0]].stacks, held.to(dtype=torch.bfloat16).stacks
        assert rows.conv.shape == (2, 2, 16, 3)
        assert (short.conv.dtype, short.ssm.dtype) == (torch.bfloat16, torch.float32)
        assert not held.detach().stacks.ssm.requires_grad

    def test_gradients_go_through(self, state):
        held = ModelState.stacked(*map(torch.stack, zip(*state.layers, strict=True)))
        (gradient,) = torch.autograd.grad(held[[1, 1]].layers[0].ssm.sum(), state.layers[0].ssm)
        assert gradient[:, 0, 0].tolist() == [0, 2, 0]

    @pytest.mark.refuses
    @pytest.mark.parametrize("shape", [(2, 3, 8, 4), (3, 2, 8, 4), (3, 3, 7, 4), (3, 8, 4)])
    def test_stacks_of_different_states_are_refused(self, shape):
        with pytest.raises(ValueError, match=r"^ModelState: stacks must be \(k, b, d, p\) and"):
            ModelState.stacked(torch.zeros(3, 3, 8, 3), torch.zeros(shape))

    def test_gradients_go_through_after_a_look_without_them(self, state):
        held = ModelState.stacked(*map(torch.stack, zip(*state.layers, strict=True)))
        with torch.no_grad():
            assert len(held.layers) == len(state.layers)
        (gradient,) = torch.autograd.grad(held.layers[0].ssm.sum(), state.layers[0].ssm)
        assert (gradient == 1).all()

    @pytest.mark.compiles
    def test_it_goes_through_copies_pytrees_and_the_compiler(self, held, state):
        copies = copy.copy(held), copy.deepcopy(held), pickle.loads(pickle.dumps(held))
        flat = pytree.tree_unflatten(*pytree.tree_flatten(held))
        compiled = torch.compile(
            lambda state: state.layers[1].ssm + 1, fullgraph=True, backend="eager"
        )
        assert_close(compiled(held), state.layers[1].ssm.detach() + 1)
        for other in (*copies, flat):
            for one, wanted in zip(tensors(other), tensors(state), strict=True):
                assert_close(one, wanted.detach(), rtol=0, atol=0)

    def test_it_never_changes(self, held):
        with pytest.raises(dataclasses.FrozenInstanceError):
            held.layers = ()

    def test_it_has_nothing_else(self, held):
        with pytest.raises(AttributeError, match="a ModelState has no attribute 'layer'"):
            held.layer  # noqa: B018
        with pytest.raises(AttributeError, match="no attribute 'layers'"):
            ModelState.__new__(ModelState).layers  # noqa: B018


class TestFiles:
    def test_a_state_comes_back_bit_for_bit(self, state, tmp_path):
        for kind in (state, state.to(dtype=torch.bfloat16), state[1:], state[0].fork(2)):
            kind.save(tmp_path / "state")
            again = ModelState.load(tmp_path / "state", device=None, config=CONFIG)
            for new, old in zip(tensors(again), tensors(kind), strict=True):
                assert new.dtype == old.dtype
                assert_close(new, old.detach(), rtol=0, atol=0)
        assert [path.name for path in tmp_path.iterdir()] == ["state"]

    @pytest.mark.parametrize(("asked", "found"), [(None, "meta"), ("cpu", "cpu")])
    def test_it_goes_where_it_is_asked_to_or_to_torchs_default(
        self, state, tmp_path, asked, found
    ):
        state.save(tmp_path / "state")
        with torch.device("meta"):
            again = ModelState.load(tmp_path / "state", device=asked)
        assert {tensor.device.type for tensor in tensors(again)} == {found}

    def test_a_state_without_a_convolution_too(self, tmp_path):
        config = dataclasses.replace(CONFIG, d_conv=1)
        state = MambaLM(config)(torch.randint(20, (2, 5))).state
        state.save(tmp_path / "state")
        again = ModelState.load(tmp_path / "state", device=None, config=config)
        assert again.layers[0].conv.shape == (2, 16, 0)
        assert_close(again.layers[1].ssm, state.layers[1].ssm)

    @pytest.mark.parametrize("change", [{"n_layer": 3}, {"d_model": 16}, {"d_state": 8}])
    def test_a_state_of_another_model_is_refused(self, state, tmp_path, change):
        state.save(tmp_path / "state")
        other = dataclasses.replace(CONFIG, **change)
        with pytest.raises(
            ValueError, match=r"a model with n_layer .*, got one of a model with"
        ):
            ModelState.load(tmp_path / "state", config=other)

    def test_a_file_is_whole_or_the_old_one(self, state, tmp_path):
        (tmp_path / "folder").mkdir()
        with pytest.raises(RuntimeError, match=r"cannot write .*folder"):
            state.save(tmp_path / "folder")
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]

    def test_files_that_hold_no_state_are_refused(self, state, tmp_path):
        path = tmp_path / "state"
        with pytest.raises(ValueError, match="load: there is no file"):
            ModelState.load(path)
        state.save(path)
        data = path.read_bytes()
        for spoilt in (b"", data[:-9], b"\xff" * 99):
            path.write_bytes(spoilt)
            with pytest.raises(ValueError, match="truncated or damaged"):
                ModelState.load(path)
        save_file({"a": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match="another kind of file"):
            ModelState.load(path)

    @pytest.mark.parametrize(
        "change",
        [
            {"layers.1.conv": None},
            {"layers.1.ssm": torch.zeros(3, 16, 5)},
            {"layers.0.conv": torch.zeros(2, 16, 3), "layers.1.conv": torch.zeros(2, 16, 3)},
            {"layers.0.ssm": torch.zeros(3)},
        ],
    )
    def test_tensors_that_do_not_fit_together_are_refused(self, state, tmp_path, change):
        path = tmp_path / "state"
        state.save(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            whole = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        whole = {
            name: tensor for name, tensor in (whole | change).items() if tensor is not None
        }
        save_file(whole, path, metadata)
        with pytest.raises(ValueError, match="must hold the layers' states of n_layer 2, d_"):
            ModelState.load(path)

    def test_tensors_that_nobody_expects_are_refused(self, state, tmp_path):
        write_layers(tmp_path / "state", state.layers, {"unread": torch.zeros(3, 1)})
        with pytest.raises(ValueError, match="must hold a state alone, got unread too"):
            ModelState.load(tmp_path / "state")
