"""Laws of the Hub: what is cached needs no network, and each refusal has its own sentence.

A server on this machine stands in for the Hub, so that huggingface_hub itself is exercised.
"""

import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mambakit import MambaConfig, MambaLM
from mambakit.models.hub import locate

constants = pytest.importorskip("huggingface_hub.constants")
errors = pytest.importorskip("huggingface_hub.errors")

COMMIT = "0123456789" * 4


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers ``/owner/name/resolve/revision/file`` as the Hub does; the rest is unknown."""

    folder: Path
    asked: list[str]

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        self.answer(None)

    def answer(self, body):
        _, _, name, _, revision, file = (self.path + "/////").split("/")[:6]
        path = self.folder / file
        if name == "broken":
            return self.refuse(500, "")
        if name == "gated":
            return self.refuse(403, "GatedRepo")
        if name not in ("model", "empty"):
            return self.refuse(404, "RepoNotFound")
        if revision not in ("main", "v1", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if not path.is_file() or (name == "empty" and file != "config.json"):
            return self.refuse(404, "EntryNotFound")
        content = path.read_bytes()
        self.asked.append(f"{self.command} {revision} {file}")
        self.send_response(200)
        self.send_header("ETag", f'"{hash(content):x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if body is None else body)
        return None

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        """Keep the requests out of the tests' output."""


def point_to(monkeypatch, tmp_path, port):
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve the files of a folder; the cache is empty."""
    (tmp_path / "served").mkdir()
    handler = type("Here", (Hub,), {"folder": tmp_path / "served", "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        point_to(monkeypatch, tmp_path, server.server_port)
        yield handler
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Make an empty cache, and a Hub that nobody answers for."""
    point_to(monkeypatch, tmp_path, 9)
    return tmp_path / "cache"


def make():
    torch.manual_seed(0)
    return MambaLM(MambaConfig(d_model=12, n_layer=1, vocab_size=21, d_state=4))


def fill_cache(cache, write):
    """Lay out a snapshot as huggingface_hub does."""
    repository = cache / "models--owner--model"
    write(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def same(model, other):
    for (name, parameter), (_, expected) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert_close(parameter, expected, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("layout", ["mambakit", "hf", "mamba_ssm"])
def test_a_model_is_fetched_once_and_then_taken_from_the_cache(hub, layout):
    make().save_pretrained(hub.folder, layout=layout)
    (hub.folder / "README.md").write_text("not needed")
    same(MambaLM.from_pretrained("owner/model"), make())
    assert sum(line.startswith("GET") for line in hub.asked) == 2
    hub.asked.clear()
    same(MambaLM.from_pretrained("owner/model", revision="v1"), make())
    same(MambaLM.from_pretrained("owner/model"), make())
    assert not [line for line in hub.asked if line.startswith("GET")]
    hub.asked.clear()
    same(MambaLM.from_pretrained("owner/model", local_files_only=True), make())
    assert not hub.asked


def test_a_tokenizer_is_fetched_beside_the_weights_and_not_needed(hub):
    make().save_pretrained(hub.folder)
    (hub.folder / "tokenizer.json").write_text("{}")
    folder = locate("owner/model")
    assert (folder / "tokenizer.json").read_text() == "{}"
    (folder / "tokenizer.json").unlink()
    assert locate("owner/model", local_files_only=True) == folder
    same(MambaLM.from_pretrained("owner/model", local_files_only=True), make())


def test_all_shards_of_one_commit_are_fetched(hub):
    model = make()
    model.save_pretrained(hub.folder)
    (hub.folder / "model.safetensors").rename(hub.folder / "one.safetensors")
    names = ", ".join(f'"{name}": "one.safetensors"' for name, _ in model.named_parameters())
    index = hub.folder / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{{names}}}}}')
    same(MambaLM.from_pretrained("owner/model"), model)
    assert f"GET {COMMIT} one.safetensors" in hub.asked


@pytest.mark.parametrize(
    ("name", "revision", "kind", "words"),
    [
        ("owner/none", None, ValueError, "no folder owner/none, and no model of this name"),
        ("owner/gated", None, RuntimeError, "only open to those who accepted its terms"),
        ("owner/model", "v9", ValueError, "owner/model on the Hub has no revision 'v9'$"),
        ("owner/empty", None, ValueError, "owner/empty on the Hub must hold config.json and"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, name, revision, kind, words):
    make().save_pretrained(hub.folder)
    with pytest.raises(kind, match=words) as caught:
        MambaLM.from_pretrained(name, revision=revision)
    assert "\n" not in str(caught.value)


def test_what_the_cache_holds_needs_no_network(cache, monkeypatch):
    fill_cache(cache, make().save_pretrained)
    same(MambaLM.from_pretrained("owner/model", local_files_only=True), make())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same(MambaLM.from_pretrained("owner/model"), make())
    same(MambaLM.from_pretrained("owner/model", revision=COMMIT), make())


def test_what_it_does_not_hold_is_one_sentence(cache, monkeypatch):
    with pytest.raises(
        RuntimeError, match=r"no folder owner/model, .* local_files_only rules out the network$"
    ):
        MambaLM.from_pretrained("owner/model", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"HF_HUB_OFFLINE rules out the network$"):
        MambaLM.from_pretrained("owner/model")


def test_half_a_model_in_the_cache_is_one_sentence(cache, monkeypatch):
    fill_cache(cache, make().save_pretrained)
    next(cache.rglob("model.safetensors")).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="or not all of it, and HF_HUB_OFFLINE rules out"):
        MambaLM.from_pretrained("owner/model")


def test_no_network_is_one_sentence_after_one_wait(cache, monkeypatch):
    calls = []

    def fail(*_, local_files_only=False, **__):
        calls.append(local_files_only)
        raise errors.LocalEntryNotFoundError("nothing") from ConnectionError("unplugged\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(RuntimeError, match=r"the Hub cannot be reached \(unplugged\)$"):
        MambaLM.from_pretrained("owner/model")
    assert calls == [False]


def test_a_network_that_breaks_between_files_is_told_as_such(cache, monkeypatch):
    fill_cache(cache, make().save_pretrained)
    next(cache.rglob("model.safetensors")).unlink()
    calls = []

    def fail(repository, name, *, revision, local_files_only):
        calls.append(local_files_only)
        if name == "config.json":
            return str(next(cache.rglob(name)))
        cause = None if local_files_only else ConnectionError("unplugged")
        raise errors.LocalEntryNotFoundError("nothing") from cause

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(RuntimeError, match=r"the Hub cannot be reached \(unplugged\)$"):
        MambaLM.from_pretrained("owner/model")
    assert calls == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(OSError, "No space left on device"), (errors.HTTPError, "peer closed the connection")],
)
def test_a_transfer_that_breaks_off_is_one_sentence(cache, monkeypatch, kind, reason):
    def fail(*_, **__):
        raise kind(f"{reason}\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(RuntimeError, match=f"cannot fetch owner/model from the Hub: {reason}$"):
        MambaLM.from_pretrained("owner/model")


def test_a_missing_client_is_named(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match=r"pip install 'mambakit\[hub\]'$"):
        MambaLM.from_pretrained("owner/model")


@pytest.mark.parametrize(
    "source",
    [
        "gpt2",
        "./owner/model",
        "../model",
        "~/model",
        "/owner/model",
        "a/b/c",
        "owner/",
        "",
        "o\n/m",
    ],
)
def test_what_is_no_id_is_a_path_and_asks_nobody(cache, source):
    if not source:
        assert locate(source) == Path()  # the current folder, as everywhere
        return
    with pytest.raises(ValueError, match=r"^from_pretrained: there is no folder"):
        locate(source)


def test_a_folder_wins_over_an_id_and_has_no_revision(cache, tmp_path):
    make().save_pretrained("owner/model")
    same(MambaLM.from_pretrained("owner/model"), make())
    with pytest.raises(ValueError, match="revision must be None for a folder, got 'main'"):
        MambaLM.from_pretrained("owner/model", revision="main")


def test_the_command_obeys_the_hubs_environment(tmp_path):
    fill_cache(tmp_path / "hub", make().save_pretrained)
    script = (
        "from mambakit.cli import main\n"
        "print(*[main(['convert', f'owner/{name}', 'out']) for name in ('model', 'other')])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout.splitlines()[-1] == "0 2", ended.stderr
    assert re.fullmatch(r"mambakit: from_pretrained: there is no folder .*\n", ended.stderr)
    same(MambaLM.from_pretrained(tmp_path / "out"), make())
