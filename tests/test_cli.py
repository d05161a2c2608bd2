"""Laws of the command line: it does what it is told, or says why not in one sentence."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mambakit import cli

COMMANDS = ("train", "generate", "evaluate", "doctor")
TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind.\n" * 40


def write_config(folder, **changes):
    tables = {
        "data": {"files": [str(folder / "text.txt")], "split": "position"},
        "tokenizer": {"kind": "character"},
        "model": {"d_model": 8, "n_layer": 1, "d_state": 2},
        "training": {"steps": 3, "batch_size": 2, "length": 16, "evaluate_every": 2},
        "report": {"prompt": "To ", "tokens": 5},
    }
    for table, values in changes.items():
        tables[table] = tables.get(table, {}) | values
    path = folder / "run.toml"
    # JSON's numbers, strings and lists are TOML's too
    path.write_text(
        "\n".join(
            f"[{table}]\n" + "\n".join(f"{key} = {json.dumps(v)}" for key, v in values.items())
            for table, values in tables.items()
        )
    )
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train once; the tests read this run, or spoil a copy of it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    assert cli.main(["train", str(write_config(folder)), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Give an empty folder with a text, and make it the current one."""
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, *arguments):
    """Run a command that must fail; return its sentence.

    An exception that got out would be a traceback for the user, and fails the test.
    """
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("mambakit: ")
    assert said.count("\n") == 1, said
    return said


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "mambakit", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_until(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_shows_examples_that_the_command_line_accepts(self, capsys, command):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
        examples = re.findall(r"^  (mambakit .*)$", capsys.readouterr().out, re.M)
        assert examples
        for example in examples:
            for one in example.split(" && "):
                cli._parser().parse_args(shlex.split(one)[1:])

    def test_is_quick_because_it_does_not_import_torch(self):
        script = (
            "import sys\n"
            "from mambakit.cli import main\n"
            "try:\n    main(['train', '--help'])\n"
            "finally:\n    assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
        )
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
        assert ended.returncode == 0, ended.stderr

    def test_version(self, capsys):
        with pytest.raises(SystemExit) as ended:
            cli.main(["--version"])
        assert ended.value.code == 0
        assert re.fullmatch(r"mambakit \d+\.\d+\.\d+\n", capsys.readouterr().out)

    def test_unknown_command_is_refused(self, capsys):
        with pytest.raises(SystemExit) as ended:
            cli.main(["tarin"])
        assert ended.value.code == 2


class TestTrain:
    def test_leaves_a_run_folder(self, trained):
        left = {path.name for path in trained.iterdir()}
        assert {"config.toml", "tokenizer.json", "metrics.jsonl", "checkpoints"} <= left

    def test_set_wins_over_the_file(self, place, capsys):
        config = write_config(place)
        code = cli.main(
            ["train", str(config), "--out", "run", "--set", "training.steps=2",
             "--set", "model.d_model=4"]
        )  # fmt: skip
        assert code == 0
        assert "steps = 2\n" in Path("run/config.toml").read_text()
        assert json.loads(next(Path("run").rglob("config.json")).read_text())["d_model"] == 4

    def test_without_out_the_folder_is_named_after_the_file(self, place, capsys):
        assert cli.main(["train", str(write_config(place))]) == 0
        assert Path("runs/run/config.toml").is_file()

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ("training.stps=3", "training.steps"),
            ("trianing.steps=3", "training"),
            ("training.steps=fast", "training.steps"),
            ("training.steps=0", "training.steps"),
            ("model.d_modle=3", "model.d_model"),
            ("model.d_state=257", "d_state"),
            ("training", "table.key=value"),
            ("training.length=100000", "200001"),
            ("data.files=[]", "data.files"),
            ("data.files=['nowhere.txt']", "nowhere.txt"),
            ("data.files=['empty.txt']", "empty.txt"),
            ("data.files=['latin.txt']", "UTF-8"),
            ("tokenizer.kind='nowhere.json'", "nowhere.json"),
            ("tokenizer.kind='text.txt'", "text.txt"),
            ("training.device='abacus'", "abacus"),
        ],
    )
    def test_bad_values_are_refused_and_leave_nothing(self, place, capsys, change, words):
        (place / "empty.txt").touch()
        (place / "latin.txt").write_bytes(TEXT.encode() + "né".encode("latin-1") * 99)
        config = write_config(place)
        before = files(place)
        assert words in refused(capsys, "train", config, "--out", "run", "--set", change)
        assert files(place) == before

    def test_a_config_that_is_missing_or_not_toml_is_refused(self, place, capsys):
        assert "nowhere.toml" in refused(capsys, "train", "nowhere.toml")
        (place / "bad.toml").write_text("[data\n")
        assert "bad.toml" in refused(capsys, "train", "bad.toml")
        (place / "bytes.toml").write_bytes(b"\xff\xfe")
        assert "bytes.toml" in refused(capsys, "train", "bytes.toml")

    def test_a_run_folder_that_exists_is_refused_and_kept(self, place, run, capsys):
        before = files(run)
        said = refused(capsys, "train", write_config(place), "--out", run)
        assert "--resume" in said
        assert files(run) == before

    def test_a_place_that_cannot_be_written_is_refused(self, place, capsys):
        # a path below a file is as closed to root as to everybody else
        said = refused(
            capsys, "train", write_config(place), "--out", place / "text.txt" / "run"
        )
        assert "text.txt" in said
        assert (place / "text.txt").read_text() == TEXT

    def test_resume_needs_a_run_and_its_own_config(self, place, run, capsys):
        config = write_config(place)
        assert "run to resume" in refused(capsys, "train", config, "--out", "none", "--resume")
        before = files(run)
        said = refused(
            capsys, "train", run / "config.toml", "--out", run, "--resume",
            "--set", "model.d_model=12",
        )  # fmt: skip
        assert "model.d_model" in said
        assert files(run) == before

    def test_a_disk_that_fills_up_ends_in_a_sentence_and_no_half_checkpoint(self, place):
        """A limit on the size of a file refuses a write just where a full disk would."""
        limit = 20_000
        config = write_config(place, model={"d_model": 64})
        process = start(
            "train", config, "--out", "run", cwd=place,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )  # fmt: skip
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2, said
        assert "Traceback" not in said
        assert re.search(r"^mambakit: cannot write .*", said, re.M), said
        left = place / "run" / "checkpoints"
        assert not left.exists() or not list(left.rglob("model.safetensors"))

    def test_ctrl_c_saves_and_tells_how_to_go_on(self, place):
        config = write_config(
            place, training={"steps": 10**6, "evaluate_every": 10**6, "log_every": 1}
        )
        command = ["train", config, "--out", "run"]
        steps = []
        for _ in range(2):
            process = start(*command, cwd=place)
            metrics = place / "run" / "metrics.jsonl"
            seen = metrics.stat().st_size if metrics.exists() else 0
            wait_until(lambda: metrics.exists() and metrics.stat().st_size > seen, process)  # noqa: B023
            process.send_signal(signal.SIGINT)
            out, said = process.communicate(timeout=60)
            assert process.returncode == 130
            assert "Traceback" not in said
            stopped = re.search(r"stopped after step (\d+) .*to go on: mambakit (.*)", out)
            assert stopped, out
            steps.append(int(stopped[1]))
            # the second round runs what the first one said
            command = shlex.split(stopped[2])
        assert steps[1] > steps[0] > 0


class TestGenerate:
    def test_streamed_or_not_the_same_seed_writes_the_same_text(self, run, capsys):
        said = []
        for stream in ([], ["--stream"]):
            arguments = ["--prompt", "To be", "--max-new-tokens", "12", "--seed", "3"]
            assert cli.main(["generate", str(run), *arguments, *stream]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1]
        assert said[0].startswith("To be")
        assert len(said[0]) == len("To be") + 12 + len("\n")

    def test_a_prompt_may_come_from_a_file_and_the_text_ends_before_a_stop(self, run, capsys):
        (run / "prompt.txt").write_text("To be")
        whole = ["generate", str(run), "--prompt-file", str(run / "prompt.txt"), "--seed", "3"]
        assert cli.main(whole) == 0
        text = capsys.readouterr().out
        stop = text[9:11]
        assert cli.main([*whole, "--stop", stop]) == 0
        begun = text[len("To be") :].index(stop) + len("To be")
        assert capsys.readouterr().out == text[:begun] + "\n"

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--prompt", ""], "at least one token"),
            (["--prompt", "€"], "€"),
            (["--prompt", "a", "--temperature", "-1"], "temperature"),
            (["--prompt", "a", "--top-k", "0"], "top_k"),
            (["--prompt", "a", "--top-p", "1.5"], "top_p"),
            (["--prompt", "a", "--min-p", "-1"], "min_p"),
            (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty"),
            (["--prompt", "a", "--max-new-tokens", "-1"], "max_new_tokens"),
            (["--prompt", "a", "--stop", ""], "stop"),
            (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
            (["--prompt-file", "latin.txt"], "UTF-8"),
        ],
    )
    def test_bad_arguments_are_refused(self, trained, place, capsys, arguments, words):
        (place / "latin.txt").write_bytes(b"n\xe9")
        assert words in refused(capsys, "generate", trained, *arguments)

    @pytest.mark.parametrize(
        ("file", "spoil", "words"),
        [
            ("model.safetensors", lambda data: data[: len(data) // 2], "model.safetensors"),
            ("model.safetensors", lambda data: b"\xff" * len(data), "model.safetensors"),
            ("model.safetensors", lambda data: b"", "model.safetensors"),
            ("config.json", lambda data: data[:20], "config.json"),
            ("config.json", lambda data: data.replace(b'_model": 8', b'_model": 16'), "shape"),
            (
                "config.json",
                lambda data: data.replace(b'n_layer": 1', b'n_layer": 2'),
                "layers.1",
            ),
            ("config.json", lambda data: data.replace(b"d_state", b"d_sttae"), "d_state"),
            ("config.toml", lambda data: data[:-3], "config.toml"),
            ("tokenizer.json", lambda data: data[:-9], "tokenizer.json"),
            ("training.json", lambda data: data[:-9], "training.json"),
        ],
    )
    def test_a_damaged_or_foreign_file_is_named(self, run, capsys, file, spoil, words):
        spoilt = list(run.rglob(file))
        assert spoilt
        for path in spoilt:
            whole = path.read_bytes()
            path.write_bytes(spoil(whole))
            assert path.read_bytes() != whole
        assert words in refused(capsys, "generate", run, "--prompt", "To be")

    def test_a_folder_that_holds_no_run_is_refused(self, place, capsys):
        assert str(place) in refused(capsys, "generate", place, "--prompt", "a")
        assert "nowhere" in refused(capsys, "generate", "nowhere", "--prompt", "a")

    def test_a_reader_that_leaves_ends_it_quietly(self, run):
        process = start(
            "generate", run, "--prompt", "To be", "--stream", "--max-new-tokens", 100_000
        )
        assert process.stdout.read(1) == "T"
        process.stdout.close()
        said = process.stderr.read()
        process.stderr.close()
        assert process.wait(timeout=60) == 141
        assert said == ""


class TestEvaluate:
    def test_shows_each_file_and_all_together(self, run, place, capsys):
        (place / "short.txt").write_text("To be")
        assert cli.main(["evaluate", str(run), "text.txt", "short.txt"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[-1] for line in lines[1:]] == ["text.txt", "short.txt", "together"]
        bits = [float(line.split()[0]) for line in lines[1:]]
        assert min(bits[:2]) <= bits[2] <= max(bits[:2])

    def test_files_that_cannot_be_read_are_named(self, run, place, capsys):
        (place / "empty.txt").touch()
        (place / "latin.txt").write_bytes(b"n\xe9")
        for name in ("nowhere.txt", "empty.txt", "latin.txt"):
            assert name in refused(capsys, "evaluate", run, name)


def test_a_closed_output_is_no_error(monkeypatch, run, place):
    """Python gives ``None`` for an output that the caller has closed."""
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["evaluate", str(run), str(place / "text.txt")]) == 0


class TestErrors:
    def test_a_bug_keeps_its_traceback(self, monkeypatch):
        def broken():
            raise ValueError("not raised by the package")

        monkeypatch.setattr("mambakit.doctor.report", broken)
        with pytest.raises(ValueError, match="not raised by the package"):
            cli.main(["doctor"])

    def test_an_interruption_anywhere_exits_with_130(self, monkeypatch, capsys):
        def interrupted():
            raise KeyboardInterrupt

        monkeypatch.setattr("mambakit.doctor.report", interrupted)
        assert cli.main(["doctor"]) == 130
        assert capsys.readouterr().err == "mambakit: interrupted\n"

    def test_an_error_of_the_system_names_the_file(self, monkeypatch, capsys):
        def unreadable():
            raise PermissionError(13, os.strerror(13), "a.txt")

        monkeypatch.setattr("mambakit.doctor.report", unreadable)
        assert refused(capsys, "doctor") == "mambakit: a.txt: Permission denied\n"

    def test_doctor_exits_with_1_when_a_check_fails(self, monkeypatch):
        monkeypatch.setattr("mambakit.doctor.report", lambda: False)
        assert cli.main(["doctor"]) == 1

    def test_the_command_itself_shows_no_traceback(self, tmp_path):
        process = start("generate", "nowhere", "--prompt", "a", cwd=tmp_path)
        out, said = process.communicate(timeout=60)
        assert (process.returncode, out) == (2, "")
        assert said.startswith("mambakit: ")
        assert said.count("\n") == 1
