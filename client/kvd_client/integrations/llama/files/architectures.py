"""What K/V a model keeps, layer by layer, from its file's metadata: the shape, without bytes.

The rules are those of the llama.cpp in llama-cpp-python 0.3.36. Most architectures keep K and V
rows in each layer, of as many elements as heads times length of a head, and need no rule of their
own. `_WINDOWS` has those with a sliding window, `_layers_of` and `_layers_with_kv` name the few
others. An architecture that is in no list is refused: a size that may be wrong is worse than none.

Which models cannot share is decided here as the engine decides it with the loaded model.
"""

from collections.abc import Mapping
from typing import NamedTuple

from kvd_client.integrations.llama.errors import Reason
from kvd_client.integrations.llama.files.gguf_header import BadModelFile, GgufHeader, Value

MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS."""
MAX_ELEMENTS = 1 << 24
"""Of one row; far more than any model has."""


class LayerShape(NamedTuple):
    """One layer's rows of a token, in elements, and of a head, which element types must divide.
    `v_elements` is None where K alone is kept (MLA)."""

    k_elements: int
    v_elements: int | None
    k_head: int
    v_head: int


class Window(NamedTuple):
    """A sliding window of `n_tokens`; in a chunked one all of a chunk goes at its end."""

    n_tokens: int
    is_chunked: bool


class KvShape(NamedTuple):
    """`layers` see the whole sequence, `window_layers` a window of it; both in order.

    `unshareable` says why, and `why` in a sentence, if kvd cannot share this model's K/V.
    """

    architecture: str
    context_length: int
    layers: tuple[LayerShape, ...]
    window_layers: tuple[LayerShape, ...]
    window: Window | None
    has_positions: bool
    """Whether each cell has 12 bytes of positions more (M-RoPE)."""
    unshareable: Reason | None
    why: str


class NoKvShape(Exception):
    """This model keeps no K/V that has a size a token; `reason` says why it cannot be shared."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _WindowRule(NamedTuple):
    """How llama.cpp finds which layers have a window, and of which size.

    `every`: each such layer sees all, the last of each group, or the first with `dense_first`; 0:
    only an array says it. `default`: the size without a key, 0 if there must be one. With
    `optional`, no size or 0 means no window; `fixed` is the size whatever the key says.
    """

    every: int
    dense_first: bool = False
    default: int = 0
    optional: bool = False
    fixed: int = 0
    chunked: bool = False


_WINDOWS = {
    "afmoe": _WindowRule(4, optional=True),
    "cohere2": _WindowRule(4),
    "cohere2moe": _WindowRule(4, dense_first=True),
    "exaone-moe": _WindowRule(4),
    "exaone4": _WindowRule(4, default=4096),
    "gemma2": _WindowRule(2, default=4096),
    "gemma3": _WindowRule(6, optional=True),
    "gemma3n": _WindowRule(5),
    "gemma4": _WindowRule(0),
    "gpt-oss": _WindowRule(2),
    "granite_swa": _WindowRule(0),
    "laguna": _WindowRule(4, dense_first=True, optional=True),
    "llama4": _WindowRule(4, fixed=8192, chunked=True),
    "maple": _WindowRule(0),
    "mellum": _WindowRule(4, optional=True),
    "mimo2": _WindowRule(0),
    "muse-glimmer": _WindowRule(4),
    "olmo2": _WindowRule(4, optional=True),
    "plamo3": _WindowRule(8, optional=True),
    "smallthinker": _WindowRule(4, dense_first=True, optional=True, fixed=4096),
    "spark2_5": _WindowRule(0),
    "step35": _WindowRule(0),
}


CHUNKED_WINDOWS = frozenset(name for name, rule in _WINDOWS.items() if rule.chunked)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PLAIN = _names(
    """
    apertus arcee arctic baichuan bailingmoe bailingmoe2 bitnet bloom chatglm codeshell
    cogvlm command-r dbrx deci deepseek deepseek2 deepseek2-ocr dots1 ernie4_5 ernie4_5-moe exaone
    falcon gemma glm4 glm4moe gpt2 gptneox granite granitemoe graniteswitch grok grovemoe hrm_text
    hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 internlm2 jais jais2 llama llama-embed maincoder
    minicpm minicpm3 minimax-m2 mistral3 mistral4 mpt nanbeige nemotron olmo olmoe openelm orion
    paddleocr pangu-embedded phi2 phi3 phimoe plamo qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe
    qwen3vl qwen3vlmoe refact seed_oss smollm3 stablelm starcoder starcoder2 talkie xverse
    """
)
_ALWAYS_M_ROPE = frozenset({"qwen2vl", "paddleocr", "qwen3vl", "qwen3vlmoe"})
_M_ROPE_IF_SECTIONS = frozenset({"glm4", "glm4moe", "hunyuan_vl"})
_MLA = frozenset({"deepseek2", "mistral4"})
_NO_FLASH_ATTENTION = frozenset({"grok"})
_RECURRENT = _names("mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7")
_HYBRID = _names(
    """
    bailingmoe3 deepseek4 falcon-h1 glm5-next granitehybrid jamba kimi-k3 kimi-linear lfm2 lfm2moe
    minimax-01 nemotron_h nemotron_h_moe plamo2 qwen35 qwen35moe qwen3next qwen4exp
    """
)
_INDEXED = _names("deepseek32 dots3note glm-dsa hy_v4 minimax-m3")
_ENCODER = _names("t5 t5encoder")
_DIFFUSION = _names("dream llada llada-moe rnd1")
_NOT_CAUSAL = _names(
    """
    bert eurobert gemma-embedding jina-bert-v2 jina-bert-v3 modern-bert neo-bert nomic-bert
    nomic-bert-moe
    """
)
ARCHITECTURES = _PLAIN | frozenset(_WINDOWS)
"""Those whose size is known."""

_GEMMA3N_LAYERS_WITH_KV = 20  # the rest use those of the last two that have some


def kv_shape(header: GgufHeader) -> KvShape:
    """The shape of the model's K/V. Raises NoKvShape, and BadModelFile for metadata that does not
    make a model."""
    metadata = _Metadata(header)
    _refuse_without_kv(metadata)
    n_all = metadata.number("block_count", 1, MAX_LAYERS)
    layers = _layers_of(metadata, n_all)
    windowed, window = _window_of(metadata, len(layers))
    if window is not None:
        layers = _with_window_heads(metadata, layers, windowed)
    layers = layers[: _layers_with_kv(metadata, n_all)]
    kept = list(zip(layers, windowed, strict=False))
    full = tuple(layer for layer, is_windowed in kept if not is_windowed)
    seeing = tuple(layer for layer, is_windowed in kept if is_windowed)
    has_positions = _has_m_rope(metadata)
    unshareable, why = _unshareable(metadata, layers, window)
    if unshareable is None and window is not None and not (full and seeing):
        unshareable = Reason.LAYOUT
        why = f"{'none' if not full else 'each'} of its layers sees all, though there is a window"
    return KvShape(
        metadata.architecture,
        metadata.number("context_length", 0, 1 << 31, 0),
        full,
        seeing,
        window,
        has_positions,
        unshareable,
        why,
    )


class _Metadata:
    """The keys of one architecture, checked when they are read."""

    def __init__(self, header: GgufHeader) -> None:
        self.path = header.path
        self._values: Mapping[str, Value] = header.values
        kind = header.values.get("general.type", "model")
        if kind != "model":
            raise self.bad(f"it is of type {kind!r}, not a model")
        architecture = header.values.get("general.architecture")
        if not isinstance(architecture, str):
            raise self.bad("its metadata has no general.architecture: it is not a model")
        self.architecture = architecture

    def bad(self, what: str) -> BadModelFile:
        return BadModelFile(f"{self.path}: {what}")

    def find(self, name: str) -> Value | None:
        """The value of `architecture.name`, if there is one."""
        return self._values.get(f"{self.architecture}.{name}")

    def number(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number in low .. high; without a default it must be there."""
        value = self.find(name)
        if value is None:
            if default is None:
                raise self.bad(f"its metadata has no {self.architecture}.{name}")
            return default
        return self._check(name, value, low, high)

    def numbers(self, name: str, count: int, default: tuple[int, ...] | None) -> tuple[int, ...]:
        """So many numbers, one for each layer; or one number for all."""
        value = self.find(name)
        if value is None:
            if default is None:
                raise self.bad(f"its metadata has no {self.architecture}.{name}")
            return default
        if not isinstance(value, tuple):
            return (self._check(name, value, 0, MAX_ELEMENTS),) * count
        if len(value) != count:
            raise self.bad(f"{self.architecture}.{name} has {len(value)} numbers, not {count}")
        return tuple(self._check(name, each, 0, MAX_ELEMENTS) for each in value)

    def flags(self, name: str, count: int) -> tuple[bool, ...] | None:
        """One flag for each layer from the first on, false for the rest; None if it is no array."""
        value = self.find(name)
        if not isinstance(value, tuple):
            return None
        if len(value) > MAX_LAYERS:
            raise self.bad(f"{self.architecture}.{name} has {len(value)} flags")
        return (*(bool(each) for each in value), *(False,) * count)[:count]

    def _check(self, name: str, value: Value, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            raise self.bad(
                f"{self.architecture}.{name} is {value!r}, not a number from {low} to {high}"
            )
        return value


def _refuse_without_kv(metadata: _Metadata) -> None:
    """Raise NoKvShape for what keeps no rows of K and V, BadModelFile for what is not known."""
    name = metadata.architecture
    if name in ARCHITECTURES:
        return
    if name in _RECURRENT or name in _HYBRID:
        kind = "recurrent" if name in _RECURRENT else "hybrid"
        raise NoKvShape(
            Reason.RECURRENT,
            f"{name} is {kind}: it keeps a state of constant size, whatever the number of "
            "tokens, which cannot be cut into blocks. kvd does not share it",
        )
    if name in _INDEXED:
        raise NoKvShape(
            Reason.LAYOUT,
            f"{name} keeps an index beside K and V, of a form of its own. kvd does not share it",
        )
    if name in _ENCODER or name in _DIFFUSION:
        kind = "has an encoder" if name in _ENCODER else "is a diffusion model"
        raise NoKvShape(
            Reason.ENCODER,
            f"{name} {kind}: K/V of a token depends on what follows it. kvd does not share it",
        )
    if name in _NOT_CAUSAL:
        raise NoKvShape(
            Reason.NOT_CAUSAL, f"{name} computes embeddings: it keeps no K/V that could be shared"
        )
    raise metadata.bad(
        f"its architecture {name!r} is not one whose K/V is known here; nothing is told rather "
        "than something wrong"
    )


def _layers_of(metadata: _Metadata, n_all: int) -> tuple[LayerShape, ...]:
    """All layers that a context keeps K/V for, as if each of them had some."""
    n_head = metadata.numbers("attention.head_count", n_all, None)
    n_head_kv = metadata.numbers("attention.head_count_kv", n_all, n_head)
    if not n_head[0]:
        raise metadata.bad(f"{metadata.architecture}.attention.head_count is 0 in the first layer")
    head = metadata.number("embedding_length", 1, MAX_ELEMENTS) // n_head[0]
    k_head = metadata.number("attention.key_length", 0, MAX_ELEMENTS, head)
    v_head = metadata.number("attention.value_length", 0, MAX_ELEMENTS, head)
    # Of a model with heads that predict several tokens at once (MTP) a context keeps the trunk.
    n_trunk = n_all - metadata.number("nextn_predict_layers", 0, n_all, 0)
    heads = list(n_head_kv[: n_trunk or n_all])
    if metadata.architecture == "graniteswitch":
        heads = [*n_head_kv, 1]  # the router, which has one head
    elif metadata.architecture == "nanbeige":
        heads *= metadata.number("num_loops", 1, MAX_LAYERS // len(heads), 1)
    is_mla = metadata.architecture in _MLA and bool(
        metadata.number("attention.key_length_mla", 0, MAX_ELEMENTS, 0)
    )
    layers = tuple(
        LayerShape(k_head * n, None if is_mla else v_head * n, k_head, v_head) for n in heads
    )
    if max(layer.k_elements + (layer.v_elements or 0) for layer in layers) > MAX_ELEMENTS:
        raise metadata.bad(f"a row of K and V has more than {MAX_ELEMENTS} elements")
    return layers


def _layers_with_kv(metadata: _Metadata, n_all: int) -> int:
    """How many layers, from the first on, have K/V of their own."""
    if metadata.architecture == "gemma3n":
        return _GEMMA3N_LAYERS_WITH_KV
    if metadata.architecture == "gemma4":
        return n_all - metadata.number("attention.shared_kv_layers", 0, n_all, 0)
    return MAX_LAYERS


def _window_of(metadata: _Metadata, n_layers: int) -> tuple[tuple[bool, ...], Window | None]:
    """Which layers have a window, and which one it is."""
    none = (False,) * n_layers, None
    rule = _WINDOWS.get(metadata.architecture)
    if rule is None or (metadata.architecture == "exaone4" and n_layers != 64):
        return none
    key = "attention.sliding_window"
    size = metadata.number(key, 0, 1 << 31, 0)
    if rule.optional and not size:
        return none
    if rule.chunked and size == 0 and metadata.find(key) is not None:
        return none
    size = rule.fixed or size or rule.default
    if not size:
        raise metadata.bad(f"its metadata has no {metadata.architecture}.{key}")
    pattern = "attention.sliding_window_pattern"
    flags = metadata.flags(pattern, n_layers)
    if flags is None:
        if not rule.every:
            raise metadata.bad(f"its metadata has no array {metadata.architecture}.{pattern}")
        every = metadata.number(pattern, 0, MAX_ELEMENTS, rule.every)
        full = 0 if rule.dense_first else every - 1
        flags = tuple(every == 0 or layer % every != full for layer in range(n_layers))
    return flags, Window(size, rule.chunked)


def _with_window_heads(
    metadata: _Metadata, layers: tuple[LayerShape, ...], windowed: tuple[bool, ...]
) -> tuple[LayerShape, ...]:
    """The layers with a window may have heads of another length."""

    def resize(layer: LayerShape) -> LayerShape:
        k_head = metadata.number("attention.key_length_swa", 0, MAX_ELEMENTS, layer.k_head)
        v_head = metadata.number("attention.value_length_swa", 0, MAX_ELEMENTS, layer.v_head)
        n_head_kv = layer.k_elements // layer.k_head if layer.k_head else 0
        return LayerShape(k_head * n_head_kv, v_head * n_head_kv, k_head, v_head)

    return tuple(
        resize(layer) if is_windowed else layer
        for layer, is_windowed in zip(layers, windowed, strict=True)
    )


def _has_m_rope(metadata: _Metadata) -> bool:
    if metadata.architecture in _M_ROPE_IF_SECTIONS:
        sections = metadata.numbers("rope.dimension_sections", 4, (0, 0, 0, 0))
        return sections[0] > 0 and sections[1] > 0
    return metadata.architecture in _ALWAYS_M_ROPE


def _unshareable(
    metadata: _Metadata,
    layers: tuple[LayerShape, ...],
    window: Window | None,
) -> tuple[Reason | None, str]:
    """Why the engine would refuse this model, in the order in which it asks."""
    name = metadata.architecture
    if window is not None and window.is_chunked:
        return Reason.SLIDING_WINDOW, "its window is chunked: all of it goes at a chunk's end"
    if metadata.find("attention.causal") is False:
        return Reason.NOT_CAUSAL, "its attention is not causal: K/V depends on what follows"
    if name in _NO_FLASH_ATTENTION:
        return Reason.FLASH_ATTENTION, (
            "llama.cpp computes it without flash attention, and then keeps V transposed"
        )
    if any(layer.v_elements is None for layer in layers):
        return Reason.LAYOUT, "it keeps K without V (MLA), which is another form of block"
    return None, ""
