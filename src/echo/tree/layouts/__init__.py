"""A packed step in the layout that an engine's kernels read, and back.

Exporters are device work: no read-backs, shapes from host integers, ``out=`` for an engine's persistent buffers. Importers read on the
host, a batch at a time, and check everything. Bytes a row say what a layout costs: ``n`` rows for every request, ``context`` tokens
before the step.

==================  =========================================  ==============================================================
layout              exporter, importer                         cost
==================  =========================================  ==============================================================
SGLang links        :func:`sglang`, :func:`from_sglang`        uniform; 40 bytes a row
SGLang masks        :func:`sglang_mask`,                       uniform; FULL_MASK context + n bytes a row, QLEN_ONLY n,
                    :func:`from_sglang_mask`                   QLEN_ONLY_BITPACKING 1 to 4
SGLang, vLLM chain  :func:`chains`, :func:`from_chains`        ragged; chains only; 28 bytes a row
FlashInfer          :func:`flashinfer`,                        ragged; (context + q) / 8 bytes a row, or a byte an entry flat
                    :func:`from_flashinfer`
FlashInfer XQA      :func:`flashinfer_xqa`,                    ragged; a view, nothing
                    :func:`from_flashinfer_xqa`
TensorRT-LLM        :func:`tensorrt_llm`,                      uniform; 16 + 4 * ceil(n / 32) bytes a row
                    :func:`from_tensorrt_llm`
vLLM ``qq_bias``    :func:`qq_bias`, :func:`from_qq_bias`      one tree for the whole batch; 4 * N bytes a row
Hugging Face        :func:`hugging_face`,                      uniform; past + n entries a row
                    :func:`from_hugging_face`
==================  =========================================  ==============================================================

:func:`unpad` takes what an engine computed on uniform rows back to the packed rows.
"""

from echo.tree.layouts.ragged import (
    Chains,
    FlashInferMask,
    chains,
    flashinfer,
    flashinfer_xqa,
    qq_bias,
)
from echo.tree.layouts.uniform import (
    HuggingFaceInputs,
    SGLangLinks,
    TensorRTLinks,
    hugging_face,
    sglang,
    sglang_mask,
    tensorrt_llm,
    unpad,
)

__all__ = [
    "Chains",
    "FlashInferMask",
    "HuggingFaceInputs",
    "SGLangLinks",
    "TensorRTLinks",
    "chains",
    "flashinfer",
    "flashinfer_xqa",
    "hugging_face",
    "qq_bias",
    "sglang",
    "sglang_mask",
    "tensorrt_llm",
    "unpad",
]
