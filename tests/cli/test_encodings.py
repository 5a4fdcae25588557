"""Any encoding can be printed, a stream that ends is one line, and so is Ctrl-C at any moment."""

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

from tests.helpers.command_line import call, process
from vitscope import cli
from vitscope.cli import terminal
from vitscope.models import bundled_path

pytestmark = pytest.mark.skipif(not (bundled_path("vit-nano") / "config.json").exists(), reason="no bundled model")
ENCODINGS = ("ascii", "cp1252", "cp437")


@pytest.fixture(name="photo")
def photo_in_an_empty_folder(tmp_path: Path, chelsea: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(chelsea).resize((64, 48)).save("Kätzchen 猫.png")
    return "Kätzchen 猫.png"


def stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True, newline="\n")


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code and decoded streams of a call whose stdout and stderr have an encoding."""
    out, err = stream(encoding), stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["vitscope", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert (sys.stdout, sys.stderr) == (out, err), "the streams are as before"
    texts = (part.buffer.getvalue().decode(encoding) for part in (out, err))  # type: ignore[attr-defined]
    return stop.value.code, *texts  # type: ignore[return-value]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "{}"],
        ["rollout", "{}"],
        ["attention", "{}"],
        ["lime", "{}", "-n", "30", "--segments", "patches"],
        ["explain", "{}", "--method", "rollout", "--method", "occlusion"],
        ["compose", "{}", "--object", "Maß=10,10,20,20", "--test", "split", "--no-attention"],
    ],
    ids=lambda arguments: f"{arguments[0]} {len(arguments)}",
)
def test_every_command_prints_in_every_encoding(
    photo: str, monkeypatch: pytest.MonkeyPatch, arguments: list[str], encoding: str
) -> None:
    code, out, err = printed(monkeypatch, encoding, *(argument.replace("{}", photo) for argument in arguments))
    assert code == 0, err
    assert "wrote K" in out
    assert "?" not in out, "a letter is never lost"
    assert r"\u732b" in out


@pytest.mark.parametrize(
    "command", ["--help", "attention", "explain", "lime", "compose", "finetune", "compare", "data"]
)
@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_the_help_is_printed_in_its_encoding(monkeypatch: pytest.MonkeyPatch, command: str, encoding: str) -> None:
    code, out, err = printed(monkeypatch, encoding, *([command] if command == "--help" else [command, "--help"]))
    assert (code, err) == (0, "")
    assert "Usage: " in out


@pytest.mark.parametrize(
    ("encoding", "bar"), [("ascii", "#"), ("latin-1", "#"), ("cp1252", "#"), ("cp437", "█"), ("utf-8", "█")]
)
def test_bars_fall_back_to_ascii(photo: str, monkeypatch: pytest.MonkeyPatch, encoding: str, bar: str) -> None:
    _, out, _ = printed(monkeypatch, encoding, "explain", photo, "--top-k", "1")
    assert out.splitlines()[2].split()[2] == bar * 22


def test_signs_fall_back_to_ascii() -> None:
    assert terminal.fitting("2 × 3 − 1 → 5 … “a” ▲+1", "ascii") == '2 x 3 - 1 -> 5 ... "a" ^+1'
    assert terminal.fitting("2 × 3 − 1 é 猫", "latin-1") == r"2 × 3 - 1 é \u732b"
    assert terminal.fitting("2 × 3", "no-such-encoding") == "2 x 3"
    assert all(replacement.isascii() for replacement in terminal.ASCII.values())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_errors_are_printed_in_every_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = printed(monkeypatch, encoding, "explain", "猫.png")
    assert (code, out, err) == (2, "", "vitscope: \\u732b.png does not exist\n")


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}],
    ids=str,
)
def test_a_process_of_its_own_does_it_too(tmp_path: Path, environment: dict[str, str]) -> None:
    done = process("demo", environment=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b" 73.5%    ######" in done.stdout
    assert done.stdout.splitlines()[-1] == b"wrote vitscope-demo.png"


FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")


@needs_full
@pytest.mark.parametrize("arguments", [["models"], ["--help"], ["explain", "--help"], ["methods", "--json"]], ids=str)
def test_a_full_disk_is_one_line(arguments: list[str]) -> None:
    with FULL.open("w") as full:
        done = process(*arguments, stdout=full)
    assert (done.returncode, done.stderr) == (1, b"vitscope: cannot print to stdout: No space left on device\n")


@needs_full
def test_a_figure_is_written_though_nothing_can_be_printed(tmp_path: Path) -> None:
    with FULL.open("w") as full:
        done = process("demo", stdout=full, cwd=tmp_path)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert (tmp_path / "vitscope-demo.png").exists()


@needs_full
def test_where_no_error_can_be_printed_the_exit_code_says_it() -> None:
    with FULL.open("w") as full:
        assert process("explain", "nowhere.png", stderr=full).returncode == 2
        assert process("models", stderr=full).returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
def test_closed_streams_are_one_line() -> None:
    command = f'"{sys.executable}" -m vitscope.cli'
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}

    def shell(line: str) -> tuple[int, bytes]:
        done = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, check=False)
        return done.returncode, done.stderr

    code, err = shell(f"{command} models >&-")
    assert (code, err.count(b"\n")) == (1, 1)
    assert err.startswith(b"vitscope: cannot print: stdout is closed")
    assert shell(f"{command} models 2>&-") == (0, b"")
    code, err = shell(f"{{ {command} models; echo $? >&2; }} | true")
    assert err == b"vitscope: cannot print to stdout: Broken pipe\n1\n"


def test_a_stream_that_fails_fails_again() -> None:
    """A library that swallows the first error does not hide it."""
    broken = stream("utf-8")
    safe = terminal.SafeStream(broken, terminal._STYLES, needed=True)
    broken.close()
    for attempt in (lambda: safe.write("a"), lambda: safe.write(""), safe.flush):
        with pytest.raises(terminal.WorkError, match="cannot print to stdout: it is closed"):
            attempt()
    quiet = terminal.SafeStream(broken, terminal._STYLES)
    assert quiet.write("a") == 1


def test_ctrl_c_while_the_command_line_is_imported_is_one_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def interrupted(name: str, *rest: Any) -> Any:
        if name == "vitscope.cli.commands":
            raise KeyboardInterrupt
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    code, out, err = call(capsys, monkeypatch, "models")
    assert (code, out, err) == (1, "", "vitscope: interrupted; finished results are kept\n")


def test_nothing_of_the_command_line_is_imported_before_main() -> None:
    """What is imported earlier, Ctrl-C could interrupt with a traceback."""
    code = "import sys, vitscope.cli; print([name for name in sys.modules if name.startswith(('typer', 'vitscope.'))])"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "['vitscope.cli']\n"


LONG = "a" * 300


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
        ["compose", "--recipe", f"{LONG}.toml"],
    ],
    ids=lambda arguments: " ".join(arguments).replace(LONG, "long").replace("\0", "NUL"),
)
def test_a_name_that_no_file_can_have_is_one_line(
    photo: str, capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    code, out, err = call(capsys, monkeypatch, *(argument.replace("{}", photo) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert len(err) < 250
    assert "at most 255 are possible" in err or "without the character NUL" in err or "embedded null byte" in err
    assert [path.name for path in Path().iterdir()] == [photo]


def test_the_longest_name_of_a_photo_still_gives_a_figure(
    photo: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(photo).rename(f"{'ä' * 125}.png")
    code, out, err = call(capsys, monkeypatch, "explain", f"{'ä' * 125}.png")
    assert (code, err) == (0, "")
    assert Path(f"{'ä' * 100}-explain.png").exists()
    assert out.endswith(f"wrote {'ä' * 100}-explain.png\n")


@pytest.mark.parametrize("device", ["meta", "meta:0"])
def test_the_device_without_numbers_is_one_line(
    photo: str, capsys: Any, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    code, out, err = call(capsys, monkeypatch, "explain", photo, "--device", device)
    assert (code, out) == (1, "")
    assert err == "vitscope: --device is 'meta', which holds no numbers: pass cpu, cuda or mps\n"
