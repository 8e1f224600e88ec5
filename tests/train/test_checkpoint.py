import contextlib
import pickle
import resource

import pytest
import torch

from midge.runtime.errors import UserError
from midge.train import checkpoint
from midge.train.optim import build_optimizer, prepare_step

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(steps):
    """A small network with batch normalization and dropout, and its optimizer, after some steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 64), torch.nn.BatchNorm1d(64), torch.nn.Dropout(), torch.nn.Linear(64, 2)
    )
    optimizer = build_optimizer("lars", model, 0.9, 1e-3)
    for _ in range(steps):
        train(model, optimizer)
    return model, optimizer


def train(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    prepare_step(optimizer, 0.5, 1e-4, frozen=())
    optimizer.step()


def state_of(model, optimizer, step=3):
    return checkpoint.capture(step, "run", model, optimizer, {})


def assert_same(a, b):
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)


def test_going_on_equals_never_having_stopped(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"
    model, optimizer = trained(3)
    checkpoint.save(path, state_of(model, optimizer))
    for _ in range(3):
        train(model, optimizer)
    twin, its_optimizer = trained(1)
    state = checkpoint.load(path, "run")
    checkpoint.restore(state, twin, its_optimizer)
    assert state["step"] == 3
    for _ in range(3):
        train(twin, its_optimizer)  # draws its inputs and its dropout from the restored generator
    assert_same(twin, model)


@contextlib.contextmanager
def no_file_larger_than(size_bytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_when_the_disk_is_full_the_checkpoint_before_stays(tmp_path):
    path = tmp_path / "last.pt"
    model, optimizer = trained(2)
    checkpoint.save(path, state_of(model, optimizer, step=2))
    content = path.read_bytes()
    train(model, optimizer)
    with no_file_larger_than(len(content) // 2), pytest.raises(UserError) as caught:
        checkpoint.save(path, state_of(model, optimizer, step=3))
    assert "Cannot write the checkpoint of step 3" in str(caught.value)
    assert "the checkpoint before it is intact" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]
    assert checkpoint.load(path, "run")["step"] == 2


def test_a_first_checkpoint_that_cannot_be_written(tmp_path):
    model, optimizer = trained(1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="there is none before it"):
        checkpoint.save(tmp_path / "file" / "last.pt", state_of(model, optimizer))


class Payload:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the payload ran')",))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-500]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no checkpoint"),
        lambda path: path.write_bytes(pickle.dumps(Payload())),
        lambda path: torch.save({"schema": 1, "identity": "run", "method": Payload()}, path),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"step": 1}, path),
    ],
    ids=["truncated", "empty", "text", "pickle", "hidden pickle", "list", "without identity"],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, spoil):
    path = tmp_path / "last.pt"
    checkpoint.save(path, state_of(*trained(1)))
    spoil(path)
    with pytest.raises(UserError, match="is damaged") as caught:
        checkpoint.load(path, "run")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, state_of(*trained(1)))
    with pytest.raises(UserError, match="is of another run"):
        checkpoint.load(path, "other")


def test_an_unreadable_checkpoint_is_not_called_damaged(tmp_path):
    path = tmp_path / "last.pt"
    path.mkdir()
    with pytest.raises(UserError, match=r"Cannot read the checkpoint .*directory.*: make it readable"):
        checkpoint.load(path, "run")


def test_a_checkpoint_of_another_schema_says_which(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {**state_of(*trained(1)), "schema": 1})
    with pytest.raises(UserError, match="has the schema 1, this midge reads 2"):
        checkpoint.load(path, "run")
