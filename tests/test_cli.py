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

COMMANDS = ("train", "generate", "evaluate", "convert", "doctor")
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

    @pytest.mark.skipif(os.name != "posix", reason="files have no such permissions here")
    def test_who_may_read_the_config_may_read_the_weights(self, trained):
        modes = {path.name: path.stat().st_mode for path in files(trained)}
        assert {"config.toml", "model.safetensors", "training.safetensors"} <= modes.keys()
        assert len({*modes.values()}) == 1, modes

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
            ("tokenizer.kind=char", "did you mean character?"),
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

    def test_it_goes_on_where_it_was_left(self, run, place, capsys):
        def text(*arguments):
            assert cli.main(["generate", str(run), "--temperature", "0", *arguments]) == 0
            return capsys.readouterr().out.removesuffix("\n")

        file = str(place / "kept.state")
        whole = text("--prompt", "To be", "--max-new-tokens", "12")
        first = text("--prompt", "To be", "--max-new-tokens", "5", "--save-state", file)
        then = text("--state", file, "--max-new-tokens", "7", "--stream")
        assert first + then == whole
        text("--prompt", "To ", "--max-new-tokens", "0", "--save-state", file)
        assert (
            "To " + text("--state", file, "--prompt", "be", "--max-new-tokens", "12") == whole
        )

    def test_a_model_that_is_no_run_writes_the_same_text(self, run, place, capsys):
        def text(*arguments):
            assert cli.main(["generate", *arguments, "--prompt", "To be", "--seed", "3"]) == 0
            return capsys.readouterr().out

        expected = text(str(run))
        assert cli.main(["convert", str(run), "model", "--layout", "mamba_ssm"]) == 0
        capsys.readouterr()
        assert text("model") == expected
        tokenizer = Path("model/tokenizer.json").rename("moved.json")
        said = refused(capsys, "generate", "model", "--prompt", "To be")
        assert "model must have a tokenizer.json beside the model" in said
        assert "--tokenizer" in said
        for named in (str(tokenizer), "character:text.txt"):
            assert text("model", "--tokenizer", named) == expected
        said = refused(capsys, "generate", "model", "--prompt", "To be", "--tokenizer", "byte")
        assert "it is another model's" in said

    def test_a_state_that_cannot_be_saved_is_refused_before_the_work(
        self, run, place, capsys, monkeypatch
    ):
        import mambakit.training

        loads = []
        monkeypatch.setattr(mambakit.training, "load_model", lambda *_: loads.append(1))
        arguments = ("generate", run, "--prompt", "To be", "--save-state")
        said = refused(capsys, *arguments, "text.txt/below")
        assert said == "mambakit: cannot write text.txt/below: Not a directory\n"
        assert "it is a folder" in refused(capsys, *arguments, place)
        assert not loads

    def test_a_character_that_is_only_begun_is_not_written(self, place, capsys):
        """An untrained model of bytes writes many of them."""
        from mambakit import MambaConfig, MambaLM
        from mambakit.data import ByteTokenizer
        from mambakit.generation import generate_text

        model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=256))
        model.save_pretrained("bytes")
        arguments = ["generate", "bytes", "--tokenizer", "byte", "--prompt", "é"]
        written = []
        for seed in range(40):
            settings = {"max_new_tokens": 3, "seed": seed}
            (whole,) = generate_text(model, ByteTokenizer(), ["é"], **settings)
            more = ["--max-new-tokens", "3", "--seed", str(seed)]
            assert cli.main([*arguments, *more]) == 0
            text = capsys.readouterr().out.removeprefix("é").removesuffix("\n")
            assert whole in (text, text + "\ufffd")
            written.append(text == whole)
        assert {*written} == {True, False}

    def test_the_device_is_that_which_is_named(self, run, place, capsys, monkeypatch):
        from mambakit.models import MambaLM

        moves, move = [], MambaLM.to

        def note(model, device):
            moves.append(str(device))
            return move(model, "cpu")

        monkeypatch.setattr(MambaLM, "to", note)
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        arguments = ["generate", str(run), "--prompt", "To be", "--seed", "3"]
        said = set()
        for device in ([], ["--device", "auto"], ["--device", "cpu"], ["--device", "cpu:0"]):
            assert cli.main([*arguments, *device]) == 0
            assert cli.main(["evaluate", str(run), "text.txt", *device]) == 0
            said.add(capsys.readouterr().out)
        assert moves == ["cpu"] * 6 + ["cpu:0"] * 2
        assert len(said) == 1

    @pytest.mark.parametrize("command", ["generate", "evaluate"])
    def test_a_device_that_cannot_be_used_is_one_sentence(self, run, place, capsys, command):
        what = ["--prompt", "a"] if command == "generate" else ["text.txt"]
        for device, words in (
            ("gpu", "auto or a PyTorch device such as cpu or cuda:0, got 'gpu'"),
            ("meta", "one that computes, got 'meta'"),
            ("cuda:99", "auto or a device that is here ("),
            ("privateuseone", "auto or a device that is here ("),
        ):
            said = refused(capsys, command, run, *what, "--device", device)
            assert said.startswith(f"mambakit: {command}: --device must be {words}")

    def test_weights_may_be_rounded(self, run, capsys):
        arguments = ["generate", str(run), "--prompt", "To be", "--max-new-tokens", "12"]
        for weights in ("bf16", "int8"):
            assert cli.main([*arguments, "--seed", "3", "--weights", weights]) == 0
            assert len(capsys.readouterr().out) == len("To be") + 12 + len("\n")

    def test_without_the_library_rounded_weights_are_one_sentence(
        self, run, capsys, monkeypatch
    ):
        from mambakit.ops import _native

        monkeypatch.setattr(_native, "unavailable", lambda: "the CPU library was not built")
        arguments = ("generate", run, "--prompt", "To be", "--weights", "int8")
        assert refused(capsys, *arguments) == (
            "mambakit: generate: weights must be None here, got 'int8': "
            "the CPU library was not built\n"
        )

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], "give --prompt, --prompt-file or --state"),
            (["--state", "nowhere.state"], "nowhere.state"),
            (["--state", "latin.txt"], "truncated or damaged"),
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

    def test_a_model_that_is_no_run_has_the_same_score(self, run, place, capsys):
        assert cli.main(["evaluate", str(run), "text.txt"]) == 0
        expected = capsys.readouterr().out
        assert cli.main(["convert", str(run), "model"]) == 0
        Path("model/tokenizer.json").unlink()
        capsys.readouterr()
        assert "--tokenizer" in refused(capsys, "evaluate", "model", "text.txt")
        arguments = ["--tokenizer", "character:text.txt"]
        assert cli.main(["evaluate", "model", "text.txt", *arguments]) == 0
        assert capsys.readouterr().out == expected
        assert cli.main(["convert", "model", "bare"]) == 0
        assert capsys.readouterr().out.endswith(", layout mambakit, no tokenizer\n")

    def test_files_that_cannot_be_read_are_named(self, run, place, capsys):
        (place / "empty.txt").touch()
        (place / "latin.txt").write_bytes(b"n\xe9")
        for name in ("nowhere.txt", "empty.txt", "latin.txt"):
            assert name in refused(capsys, "evaluate", run, name)

    def test_a_folder_without_text_is_one_sentence(self, run, place, capsys):
        (place / "nothing" / "below").mkdir(parents=True)
        said = refused(capsys, "evaluate", run, "text.txt", "nothing")
        assert said == "mambakit: data: the folder nothing must hold files, got none\n"
        (place / "nothing" / "below" / "empty.txt").touch()
        said = refused(capsys, "evaluate", run, "nothing")
        assert said == "mambakit: data: nothing must hold text, got only empty files\n"


class TestConvert:
    def test_a_run_becomes_a_checkpoint_of_any_layout(self, run, place, capsys):
        from mambakit import MambaLM
        from mambakit.training import load_run

        whole = (run / "tokenizer.json").read_text()
        for source, target, layout in (
            (run, "hf", "hf"), ("hf", "ssm", "mamba_ssm"), ("ssm", "own", "mambakit"),
        ):  # fmt: skip
            assert cli.main(["convert", str(source), target, "--layout", layout]) == 0
            said = capsys.readouterr().out
            words = rf"{target}: [\d,]+ parameters, float32, layout {layout}"
            assert re.fullmatch(words + r", with tokenizer\.json\n", said)
            assert Path(target, "tokenizer.json").read_text() == whole
        first = load_run(run).model.state_dict()
        last = MambaLM.from_pretrained("own").state_dict()
        assert first.keys() == last.keys()
        assert all(first[name].equal(last[name]) for name in first)

    def test_dtype_converts_the_weights(self, run, place, capsys):
        assert cli.main(["convert", str(run), "short", "--dtype", "bfloat16"]) == 0
        assert "bfloat16, layout mambakit, with tokenizer.json\n" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["nowhere/at/all", "new"], "there is no folder nowhere/at/all"),
            (["text.txt", "new"], "text.txt must be a folder, got a file"),
            (
                [".", "new"],
                ". must hold a run or a model, got neither config.toml nor config.json",
            ),
            (["RUN", "RUN"], "must be no run folder: choose another"),
            (["RUN", "RUN/text"], "cannot write"),
            (["RUN", "new", "--revision", "v1"], "revision must be None for a folder"),
        ],
    )
    def test_bad_arguments_are_one_sentence(self, run, place, capsys, arguments, words):
        (run / "text").touch()
        arguments = [argument.replace("RUN", str(run)) for argument in arguments]
        assert cli.main(["convert", *arguments]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
        assert not Path("new").exists()


class TestStreams:
    """What the process owes to the shell that starts it."""

    @pytest.mark.parametrize("closed", [(1,), (2,), (1, 2), (0, 1, 2)])
    def test_closed_ones_are_no_error_and_get_no_file(self, place, closed):
        def close():
            for descriptor in closed:
                os.close(descriptor)

        config = write_config(place, training={"log_every": 1})
        process = start("train", config, "--out", "run", cwd=place, preexec_fn=close)
        out, said = process.communicate(timeout=120)
        assert (process.returncode, said) == (0, "")
        assert bool(out) == (1 not in closed)
        # what is written to a closed output must not be found in a file
        rows = Path("run/metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [1, 2, 2, 3, 3]
        assert cli.main(["evaluate", "run", "text.txt"]) == 0

    def test_a_sentence_for_a_closed_error_stream_is_not_output(self, tmp_path):
        process = start(
            "generate", "nowhere", "--prompt", "a", cwd=tmp_path, preexec_fn=lambda: os.close(2)
        )
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 2

    def test_what_the_encoding_lacks_is_written_as_an_escape(self, run, place):
        (place / "café.txt").write_text(TEXT)
        ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
        process = start("evaluate", run, "café.txt", cwd=place, env=ascii_only)
        out, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, "")
        assert out.endswith("  caf\\xe9.txt\n")

    def test_a_run_outlives_its_reader(self, place):
        process = start("train", write_config(place), "--out", "run", cwd=place)
        process.stdout.close()
        said = process.stderr.read()
        process.stderr.close()
        assert (process.wait(timeout=120), said) == (0, "")
        assert list(Path("run/checkpoints").iterdir())

    def test_ctrl_c_saves_although_its_readers_have_left(self, place):
        """As in `mambakit train ... 2>&1 | tee log`, where Ctrl-C ends tee as well."""
        config = write_config(
            place, training={"steps": 10**6, "evaluate_every": 10**6, "log_every": 1}
        )
        process = start("train", config, "--out", "run", cwd=place)
        metrics = place / "run" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
        process.stdout.close()
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert list(Path("run/checkpoints").iterdir())


class TestStart:
    """Ctrl-C from the first import of the command on."""

    def run(self, interrupted):
        script = (
            "import sys\n"
            "class Interrupting:\n"
            "    def find_spec(name, *_):\n"
            f"        if name == {interrupted!r}: raise KeyboardInterrupt\n"
            "sys.meta_path.insert(0, Interrupting)\n"
            "sys.argv[1:] = ['doctor']\n"
            "from mambakit.__main__ import main\n"
            "sys.exit(main())\n"
        )
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )

    @pytest.mark.parametrize("interrupted", ["mambakit.cli", "argparse"])
    def test_an_interruption_before_the_command_is_quiet(self, interrupted):
        ended = self.run(interrupted)
        assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")

    @pytest.mark.parametrize("interrupted", ["mambakit.doctor", "torch"])
    def test_an_interruption_of_its_imports_is_one_line(self, interrupted):
        ended = self.run(interrupted)
        assert (ended.returncode, ended.stderr) == (130, "mambakit: interrupted\n")

    def test_nothing_is_imported_before_an_interruption_can_be_answered(self):
        script = (
            "import sys; before = set(sys.modules); import mambakit.__main__\n"
            "print(*sorted(set(sys.modules) - before))"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert ended.stdout.split() == ["mambakit", "mambakit.__main__"]


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

    def test_the_sentence_is_one_line_whatever_a_file_is_called(self, run, capsys):
        said = refused(capsys, "evaluate", run, "a\n\x1bcé")
        assert said.endswith("a\\n\\x1bcé\n")

    def test_the_command_itself_shows_no_traceback(self, tmp_path):
        process = start("generate", "nowhere", "--prompt", "a", cwd=tmp_path)
        out, said = process.communicate(timeout=60)
        assert (process.returncode, out) == (2, "")
        assert said.startswith("mambakit: ")
        assert said.count("\n") == 1
