from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from midge.runtime.errors import UserError
from midge.runtime.golden import check_golden, load_golden, write_golden

INPUT, OUTPUT = (1, 3, 8, 8), (1, 2)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0))
    return file.getvalue()


def header(text: str) -> bytes:
    body = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def pack(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


INPUTS, OUTPUTS = npy(np.zeros((4, 3, 8, 8), np.float32)), npy(np.zeros((4, 2), np.float32))


def test_round_trip_is_exact_and_reproducible(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inputs, outputs = rng.normal(size=(4, 3, 8, 8)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32)
    for name in ("a.npz", "b.npz"):
        write_golden(tmp_path / name, inputs, outputs)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    golden = load_golden(tmp_path / "a.npz", INPUT, OUTPUT)
    np.testing.assert_array_equal(golden.inputs, inputs)
    np.testing.assert_array_equal(golden.outputs, outputs)


def test_hand_packed_members_are_read(tmp_path: Path) -> None:
    assert load_golden(pack(tmp_path / "g.npz", inputs=INPUTS, outputs=OUTPUTS), INPUT, OUTPUT).inputs.shape[0] == 4


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (npy(np.zeros((4, 3, 8, 9), np.float32)), OUTPUTS, r"the network takes \(N, 3, 8, 8\)"),
        (INPUTS, npy(np.zeros((4, 3), np.float32)), r"gives \(N, 2\)"),
        (INPUTS, npy(np.zeros((3, 2), np.float32)), r"holds inputs \(4, 3, 8, 8\) and outputs \(3, 2\)"),
        (npy(np.zeros((0, 3, 8, 8), np.float32)), npy(np.zeros((0, 2), np.float32)), "N at least 1"),
        (npy(np.zeros((4, 3, 8, 8), np.float64)), OUTPUTS, "is float64"),
        (npy(np.array(["x"])), OUTPUTS, "not float32"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (4, 3, 8, 8)}"), OUTPUTS, "is object"),
        (header("{'descr': '<f4', 'fortran_order': True, 'shape': (4, 3, 8, 8)}"), OUTPUTS, "in C order"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (10**9,)}"), OUTPUTS, "cannot be read"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,)}"), OUTPUTS, "more than the"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, 3, 8, 8)}"), OUTPUTS, "holds inputs"),
        (header("(" * 9000), OUTPUTS, "cannot be read"),
        (header("("), OUTPUTS, "cannot be read"),
        (b"", OUTPUTS, "cannot be read"),
    ],
)
def test_hostile_members(tmp_path: Path, inputs: bytes, outputs: bytes, message: str) -> None:
    path = pack(tmp_path / "g.npz", inputs=inputs, outputs=outputs)
    with pytest.raises(UserError, match=message) as caught:
        check_golden(path, INPUT, OUTPUT)
    assert "\n" not in str(caught.value)


def test_other_members_no_zip_and_short_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the arrays inputs and outputs"):
        check_golden(pack(tmp_path / "g.npz", inputs=INPUTS, outputs=OUTPUTS, more=OUTPUTS), INPUT, OUTPUT)
    (tmp_path / "no.npz").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UserError, match="File is not a zip file"):
        check_golden(tmp_path / "no.npz", INPUT, OUTPUT)
    path = pack(tmp_path / "short.npz", inputs=INPUTS[:-8], outputs=OUTPUTS)
    check_golden(path, INPUT, OUTPUT)
    with pytest.raises(UserError, match="cannot be read"):
        load_golden(path, INPUT, OUTPUT)


def test_values_must_be_finite(tmp_path: Path) -> None:
    write_golden(tmp_path / "g.npz", np.zeros((1, 3, 8, 8)), np.array([[0, np.inf]]))
    with pytest.raises(UserError, match="not finite"):
        load_golden(tmp_path / "g.npz", INPUT, OUTPUT)
