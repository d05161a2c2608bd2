"""What the decode benchmark checks, and the Llama that it measures."""

import pytest
import torch
from torch.testing import assert_close

from benchmarks import gpu, gpu_decode, tables
from benchmarks.llama import EPS, HEAD, THETA, LlamaStep, Shape, parameters, shape_like
from benchmarks.rows import Row, write
from mambakit import MambaConfig
from mambakit.models.config import PUBLISHED

SHAPE = Shape(width=2 * HEAD, layers=2, hidden=96, vocabulary=50)


def test_the_llama_is_a_llama():
    transformers = pytest.importorskip("transformers")
    step = LlamaStep(SHAPE, 3, 7, device="cpu", dtype=torch.float32, compile=False)
    config = transformers.LlamaConfig(
        vocab_size=SHAPE.vocabulary, hidden_size=SHAPE.width, intermediate_size=SHAPE.hidden,
        num_hidden_layers=SHAPE.layers, num_attention_heads=SHAPE.width // HEAD,
        tie_word_embeddings=True, rms_norm_eps=EPS, rope_theta=THETA,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(step.embedding)
        for theirs, ours in zip(model.model.layers, step.layers, strict=True):
            attention, mlp = theirs.self_attn, theirs.mlp
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            for projection, rows in zip(projections, ours.qkv.chunk(3), strict=True):
                projection.weight.copy_(rows)
            for projection, rows in zip(
                (mlp.gate_proj, mlp.up_proj), ours.gate_up.chunk(2), strict=True
            ):
                projection.weight.copy_(rows)
            attention.o_proj.weight.copy_(ours.out)
            mlp.down_proj.weight.copy_(ours.down)
    cache = transformers.DynamicCache()
    for i, (keys, values) in enumerate(step.caches):
        cache.update(keys[:, :, :6].clone(), values[:, :, :6].clone(), i)
    tokens = torch.tensor([1, 2, 3])
    with torch.no_grad():
        wanted = model(
            tokens[:, None], past_key_values=cache, position_ids=torch.full((3, 1), 6)
        ).logits[:, 0]
    assert_close(step(tokens), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["130m", "1.4b", "2.8b"])
def test_a_llama_of_a_mambas_size_has_its_parameters(name):
    width, layers = PUBLISHED[name]
    ours = MambaConfig.published(name)
    d, m, r = ours.d_inner, ours.d_model, ours.rank
    mamba = layers * (3 * d * m + d * (2 * r + 2 * 16 + 24)) + 50280 * m
    assert parameters(shape_like(width, layers, 50280)) == pytest.approx(mamba, rel=0.05)


def test_cases_have_names_of_their_own():
    names = [*map(str, gpu_decode.CASES), gpu_decode.READING]
    assert len(set(names)) == len(names)


def test_rows_become_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    case = str(gpu_decode.CASES[0])
    machine = {
        "device": "a GPU", "multiprocessors": 1, "torch": "2", "cuda": "13",
        "transformers": "5", "commit": "c", "date": "d",
    }  # fmt: skip
    rows = [
        Row("gpu decode", case, subject, "ms", [ms], machine=machine)
        for subject, ms in (
            ("mambakit", 1.0), ("mambakit, step alone", 0.9), (gpu_decode.FLOOR, 0.5),
            (gpu_decode.LLAMA, 2.0),
        )
    ]  # fmt: skip
    write(rows, tmp_path / "a-gpu" / "gpu_decode.jsonl")
    block = tables.render(tmp_path)["gpu_decode"]
    assert f"| {case} | 1 ms | 0.9 ms | 2x | 2 ms | 2x | - | - |" in block
