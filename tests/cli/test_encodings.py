"""Streams of any encoding, streams that fail, Ctrl-C during the imports, and file names that are not possible."""

import builtins
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.command_line import call, needs_bundled, process
from vitscope import cli
from vitscope.cli import terminal

pytestmark = needs_bundled
ENCODINGS = ("ascii", "cp1252", "cp437")


@pytest.fixture(name="photo")
def photo_with_a_foreign_name(tmp_path: Path, chelsea: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(chelsea).resize((64, 48)).save("Kätzchen 猫.png")
    return "Kätzchen 猫.png"


def text_stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True, newline="\n")


def print_in(monkeypatch: pytest.MonkeyPatch, encoding: str, *arguments: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a call whose streams have this encoding."""
    out, err = text_stream(encoding), text_stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["vitscope", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert (sys.stdout, sys.stderr) == (out, err), "the streams are restored"
    texts = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))  # type: ignore[attr-defined]
    return stop.value.code, *texts  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "{}"],
        ["rollout", "{}"],
        ["attention", "{}"],
        ["heads", "{}", "--method", "gradient", "--contrast", "dog"],
        ["lime", "{}", "-n", "30", "--segments", "patches"],
        ["explain", "{}", "--method", "rollout", "--method", "occlusion"],
        ["compose", "{}", "--object", "Maß=10,10,20,20", "--test", "split", "--no-attention"],
    ],
    ids=lambda arguments: f"{arguments[0]} {len(arguments)}",
)
def test_every_command_prints_in_every_encoding(
    photo: str, monkeypatch: pytest.MonkeyPatch, arguments: list[str], encoding: str
) -> None:
    code, out, err = print_in(monkeypatch, encoding, *(argument.replace("{}", photo) for argument in arguments))
    assert code == 0, err
    assert "wrote K" in out
    assert "?" not in out, "no letter is lost"
    assert r"\u732b" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["--help", "attention", "heads", "explain", "lime", "compose", "finetune", "compare", "data"]
)
@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_the_help_is_printed_in_its_encoding(monkeypatch: pytest.MonkeyPatch, command: str, encoding: str) -> None:
    code, out, err = print_in(monkeypatch, encoding, *([command] if command == "--help" else [command, "--help"]))
    assert (code, err) == (0, "")
    assert "Usage: " in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "bar"), [("ascii", "#"), ("latin-1", "#"), ("cp1252", "#"), ("cp437", "█"), ("utf-8", "█")]
)
def test_bars_fall_back_to_ascii(photo: str, monkeypatch: pytest.MonkeyPatch, encoding: str, bar: str) -> None:
    _, out, _ = print_in(monkeypatch, encoding, "explain", photo, "--top-k", "1")
    assert out.splitlines()[2].split()[2] == bar * 22


def test_signs_fall_back_to_ascii() -> None:
    assert terminal.fitting("2 × 3 − 1 → 5 … “a” ▲+1", "ascii") == '2 x 3 - 1 -> 5 ... "a" ^+1'
    assert terminal.fitting("2 × 3 − 1 é 猫", "latin-1") == r"2 × 3 - 1 é \u732b"
    assert terminal.fitting("2 × 3", "no-such-encoding") == "2 x 3"
    assert all(replacement.isascii() for replacement in terminal.ASCII.values())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_errors_are_printed_in_every_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = print_in(monkeypatch, encoding, "explain", "猫.png")
    assert (code, out, err) == (2, "", "vitscope: \\u732b.png does not exist\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}],
    ids=str,
)
def test_the_environment_sets_the_encoding(tmp_path: Path, environment: dict[str, str]) -> None:
    result = process("demo", environment=environment, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b" 73.5%    ######" in result.stdout
    assert result.stdout.splitlines()[-1] == b"wrote vitscope-demo.png"


FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no device that is always full")


@pytest.mark.slow
@needs_full
@pytest.mark.parametrize("arguments", [["models"], ["--help"], ["explain", "--help"], ["methods", "--json"]], ids=str)
def test_a_full_disk_is_one_line(arguments: list[str]) -> None:
    with FULL.open("w") as full:
        result = process(*arguments, stdout=full)
    assert (result.returncode, result.stderr) == (1, b"vitscope: cannot print to stdout: No space left on device\n")


@pytest.mark.slow
@needs_full
def test_a_figure_is_written_even_if_nothing_can_be_printed(tmp_path: Path) -> None:
    with FULL.open("w") as full:
        result = process("demo", stdout=full, cwd=tmp_path)
    assert (result.returncode, result.stderr.count(b"\n")) == (1, 1)
    assert (tmp_path / "vitscope-demo.png").exists()


@pytest.mark.slow
@needs_full
def test_the_exit_code_is_right_even_if_no_error_can_be_printed() -> None:
    with FULL.open("w") as full:
        assert process("explain", "nowhere.png", stderr=full).returncode == 2
        assert process("models", stderr=full).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_closed_streams_are_one_line() -> None:
    command = f'"{sys.executable}" -m vitscope.cli'
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}

    def shell(line: str) -> tuple[int, bytes]:
        result = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, check=False)
        return result.returncode, result.stderr

    code, err = shell(f"{command} models >&-")
    assert (code, err.count(b"\n")) == (1, 1)
    assert err.startswith(b"vitscope: cannot print: stdout is closed")
    assert shell(f"{command} models 2>&-") == (0, b"")
    code, err = shell(f"{{ {command} models; echo $? >&2; }} | true")
    assert err == b"vitscope: cannot print to stdout: Broken pipe\n1\n"


def test_a_broken_stream_raises_every_time() -> None:
    """A library that ignores the first error does not hide it."""
    broken = text_stream("utf-8")
    safe = terminal.SafeStream(broken, terminal._STYLES, needed=True)
    broken.close()
    for attempt in (lambda: safe.write("a"), lambda: safe.write(""), safe.flush):
        with pytest.raises(terminal.WorkError, match="cannot print to stdout: it is closed"):
            attempt()
    quiet = terminal.SafeStream(broken, terminal._STYLES)
    assert quiet.write("a") == 1


def test_ctrl_c_during_the_imports_is_one_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def interrupt(name: str, *arguments: Any) -> Any:
        if name == "vitscope.cli.commands":
            raise KeyboardInterrupt
        return load(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", interrupt)
    code, out, err = call(capsys, monkeypatch, "models")
    assert (code, out, err) == (1, "", "vitscope: interrupted; finished results are kept\n")


def test_nothing_is_imported_before_main() -> None:
    """Ctrl-C during an import outside main would print a traceback."""
    code = "import sys, vitscope.cli; print([name for name in sys.modules if name.startswith(('typer', 'vitscope.'))])"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout == "['vitscope.cli']\n"


LONG = "a" * 300


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "{}", "--out", f"{LONG}.png"],
        ["explain", "{}", "--out", f"{LONG}/a.png"],
        ["explain", "{}", "--model", LONG],
        ["explain", f"{LONG}.png"],
        ["explain", "{}", "--out", "a\0.png"],
        ["explain", "{}", "--model", "a\0b"],
        ["explain", "a\0.png"],
        ["explain", "{}", "--weights", f"{LONG}.pth"],
        ["lime", "{}", "--arrays", f"{LONG}.npz"],
        ["lime", "{}", "--segments", f"{LONG}.npy"],
        ["lime", "{}", "--examples", LONG],
        ["compose", "{}", "--object", f"{LONG}.png"],
        ["compose", "{}", "--object", "1,1,9,9", "--out", LONG],
        ["compose", "--annotations", f"{LONG}.toml"],
    ],
    ids=lambda arguments: " ".join(arguments).replace(LONG, "long").replace("\0", "NUL"),
)
def test_an_impossible_file_name_is_one_line(
    photo: str, capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    code, out, err = call(capsys, monkeypatch, *(argument.replace("{}", photo) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert len(err) < 250
    assert "at most 255 are possible" in err or "without the character NUL" in err or "embedded null byte" in err
    assert [path.name for path in Path().iterdir()] == [photo]


@pytest.mark.slow
def test_a_photo_with_the_longest_possible_name_is_explained(
    photo: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(photo).rename(f"{'ä' * 125}.png")
    code, out, err = call(capsys, monkeypatch, "explain", f"{'ä' * 125}.png")
    assert (code, err) == (0, "")
    assert Path(f"{'ä' * 100}-explain.png").exists()
    assert out.endswith(f"wrote {'ä' * 100}-explain.png\n")


@pytest.mark.parametrize("device", ["meta", "meta:0"])
def test_the_meta_device_is_one_line(photo: str, capsys: Any, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    code, out, err = call(capsys, monkeypatch, "explain", photo, "--device", device)
    assert (code, out) == (1, "")
    assert err == "vitscope: --device is 'meta', which holds no numbers: pass cpu, cuda or mps\n"
